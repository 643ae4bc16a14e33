"""Entries on their way to a server that may be away: one queue, in order, that nobody waits for.

    caller                  writer thread                                    folder
    put(entry) --> memory --> deliver(entries) --> server
                              server away: tried again after 1, 2, 4 ... 30 s
                   memory full, keep(), close(): what isn't delivered -----> 000001-*.jsonl, ...
                              server back, or the next process: files first, in order

Who owns what: the folder's files, what was read of the first of them and the requests belong to
the writer thread; the queue belongs to both, under the lock `_changed`. Whoever moves the queue to
a file (either thread) has it in `_writing` meanwhile, and the writer waits for that before it
delivers, so that the order stays.

Nothing is taken out before it is delivered or written to the folder, so an entry may be delivered
twice: after a lost answer, or a kill between a delivery and the deletion of its file. `deliver`
must recognise what is there. An entry carries the time when it was put, not when it arrives.

An entry that the server refuses, or that fails in a way nobody foresaw, is set aside in a file of
its own with the traceback (refused-*.json): the others go on, and it is counted and told. If the
folder refuses that file, the entry stays where it is, the others wait, and both are tried again, as
when the server is away.

Memory is bounded: beyond 32 MiB entries go to the folder, at the latest, at 64 MiB, by whoever puts
one more. If the folder refuses then, the oldest pictures are dropped, then the oldest of all; they
are counted and told. Files that lie on storage go as their URI and hash, whatever their size.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from piflow import storage
from piflow.storage.foreign import parse_object

Deliver = Callable[[Sequence["Entry"]], int]
Notice = Callable[[str, str], "Entry"]

MEMORY_BYTES = 32 * 2**20
_BULKY_BYTES = 4096  # entries from this size on are dropped first
_BATCH = 200  # entries that `deliver` is shown at once
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between tries
_CLOSING_PAUSE = 0.5
_OURS = re.compile(r"\d{6,}-[0-9a-f]{8}\.jsonl")  # files of entries to deliver
_FILE_BYTES = 2**30  # of such a file that is read; ours have a tenth of it
_REFUSED = "refused"  # files of entries that the server takes at no time
_log = logging.getLogger(__name__)


class ServerAwayError(ConnectionError):
    """The server doesn't answer, or says that it can't just now: worth another try."""


class RunRefusedError(ValueError):
    """The server answers, and takes nothing for this run: a person has to look."""


class EntryRefusedError(ValueError):
    """The server takes other entries, but not the first of these."""


@dataclass(frozen=True)
class Entry:
    """One thing to deliver."""

    kind: str
    time_us: int  # microseconds of UTC when it happened
    step: int
    data: dict[str, Any]  # JSON values

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return 100 + sum(
            len(value) if isinstance(value, str) else 60 * _count(value)
            for value in self.data.values()
        )


class Outbox:
    """Delivers entries in a thread; keeps those that it can't in a folder.

    Args:
        folder: URI; files that another process left there are delivered first.
        deliver: sends the first of the entries, or the first few; returns how many. Raises
            ServerAwayError (or another OSError), RunRefusedError or EntryRefusedError.
        notice: (name, text) -> an entry that tells of an outage or a loss.
        memory_bytes: entries beyond go to the folder; beyond twice of it some are dropped.
    """

    def __init__(
        self, folder: str, deliver: Deliver, notice: Notice, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._folder = folder
        self._deliver = deliver
        self._notice = notice
        self._limit = memory_bytes
        self._changed = threading.Condition()  # guards all below
        self._queue: deque[Entry] = deque()
        self._bytes = 0  # of the queue
        self._put = self._left = 0  # entries that ever came into the queue, and left it
        self._writing: list[Entry] = []  # on their way from the queue to a file
        self._files: list[str] | None = None  # undelivered ones, oldest first; None: not looked
        self._reading: deque[Entry] = deque()  # what is left of the first file
        self._lost: Counter[str] = Counter()  # kind -> entries dropped or refused, not yet told
        self._problem: str | None = None  # of the last try
        self._refused = False  # ... which waits for a person
        self._away_since: tuple[float, int] | None = None  # (monotonic s, UTC us)
        self._asked = False  # somebody waits for a try
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Take an entry; never waits for the server, for the storage only when full, never fails.

        Full is twice the memory. Something is dropped only if the folder then refuses as well.
        """
        with self._changed:
            self._queue.append(entry)
            self._bytes += entry.size
            self._put += 1
            self._changed.notify_all()
            if self._bytes <= 2 * self._limit:
                return
        if self._spill():
            return
        with self._changed:
            while self._bytes > 2 * self._limit and len(self._queue) > 1:
                self._drop_one()
            self._changed.notify_all()

    def keep(self, seconds: float) -> bool:
        """Wait until all that was put before is delivered or lies in the folder.

        If the server is away, one more try is made; then it is the folder's turn.

        Returns:
            Whether it is so; False: the folder refused as well.
        """
        with self._changed:
            goal = self._put
            self._ask()
            self._changed.wait_for(lambda: self._left >= goal or self._is_stuck(), seconds)
            if self._left >= goal:
                return True
        return self._spill()

    def close(self, seconds: float) -> str | None:
        """Deliver what is left for so long, then keep the rest in the folder; ends the thread.

        Returns:
            Why something was not delivered; None: everything was.
        """
        with self._changed:
            self._closing = True
            self._ask()
            self._changed.wait_for(
                lambda: self._is_empty() or (self._refused and not self._asked), seconds
            )
            self._closed = True
            self._changed.notify_all()
            if self._is_empty():
                return None
        kept = self._spill()
        problem = self._problem or f"not done within {seconds:.0f} s"
        return problem if kept else f"{problem}; and {self._folder} can't be written: they are lost"

    @property
    def refused(self) -> bool:
        """The last try was answered: the server takes nothing for this run."""
        return self._refused

    # ------------------------------------------------------------------------ the writer thread

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._is_empty())
                if self._closed:
                    return
            delivered = self._try()
            if self._bytes > self._limit:
                self._spill()
            if delivered:
                pause = _FIRST_PAUSE
            else:
                self._wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _wait(self, seconds: float) -> None:
        """Before the next try: less when somebody asks, until somebody asks when refused."""
        with self._changed:
            if self._closing:
                seconds = _CLOSING_PAUSE
            timeout = None if self._refused else seconds
            self._changed.wait_for(lambda: self._asked or self._closed, timeout)

    def _try(self) -> bool:
        """Deliver one batch; False: it shall be tried again."""
        try:
            batch = self._next()
        except OSError as error:
            self._note_failure(error)
            return False
        if not batch:
            return True
        try:
            done = self._deliver(batch)
        except (OSError, RunRefusedError) as error:
            self._note_failure(error)
            return False
        except Exception as error:  # whatever it is: the thread goes on, and the other entries
            if not self._set_aside(batch[0], error):
                return False
            done = 1
        self._note_delivery(batch[:done])
        return True

    def _set_aside(self, entry: Entry, error: Exception) -> bool:
        """Keep an entry that can't be delivered, with the reason; others must not wait for it.

        Returns:
            Whether the folder took it; if not, it is still to be delivered.
        """
        place = storage.join(self._folder, f"{_REFUSED}-{uuid.uuid4().hex[:8]}.json")
        reason = "".join(traceback.format_exception(error))
        # repr: a value that JSON has no form for may be what was wrong with the entry
        content = json.dumps({"entry": asdict(entry), "reason": reason}, indent=1, default=repr)
        try:
            storage.write_bytes(place, content.encode())
        except OSError as problem:
            self._note_failure(OSError(f"{error}; and it can't be set aside in {place}: {problem}"))
            return False
        # with the traceback: an error that nobody foresaw may be one of ours
        _log.warning("not delivered to MLflow, kept in %s", place, exc_info=error)
        with self._changed:
            self._lost[f"{entry.kind}, refused and set aside"] += 1
        return True

    def _next(self) -> list[Entry]:
        """The oldest entries: a file's, if there are any."""
        if not self._reading:
            name = self._oldest_file()
            if name is not None:
                self._read(name)
        with self._changed:
            if self._reading:
                return list(islice(self._reading, _BATCH))
            self._changed.wait_for(lambda: not self._writing)
            if self._files:
                return []  # written meanwhile; comes first
            return list(islice(self._queue, _BATCH))

    def _oldest_file(self) -> str | None:
        self._look()
        with self._changed:
            return self._files[0] if self._files else None

    def _look(self) -> None:
        """Find the files that earlier processes left."""
        with self._changed:
            if self._files is not None:
                return
        found = [name for name in storage.list_files(self._folder) if _OURS.fullmatch(name)]
        with self._changed:
            if self._files is None:
                self._files = found
                self._changed.notify_all()

    def _read(self, name: str) -> None:
        """Take in a file; what isn't an entry, or is none of ours by its size, is set aside."""
        place = storage.join(self._folder, name)
        try:
            size = storage.file_sizes(self._folder).get(name, 0)
            if size > _FILE_BYTES:
                _log.warning("%s has %d bytes, which is none of ours: left there", place, size)
                with self._changed:
                    self._lost["a file that is too large"] += 1
                self._forget(name)
                return
            content = storage.read_bytes(place, max_bytes=_FILE_BYTES)
        except FileNotFoundError:  # another process delivered it
            self._forget(name)
            return
        lines = content.splitlines()
        entries = [_parse(line, f"{name}, line {number}") for number, line in enumerate(lines, 1)]
        damaged = [line for line, entry in zip(lines, entries, strict=True) if entry is None]
        if damaged:
            kept = storage.join(self._folder, f"damaged-{uuid.uuid4().hex[:8]}.txt")
            storage.write_bytes(kept, b"\n".join(damaged))
            _log.warning("%d damaged lines of %s are kept in %s", len(damaged), place, kept)
        with self._changed:
            self._reading = deque(entry for entry in entries if entry is not None)
            if damaged:
                self._lost["a damaged file"] += len(damaged)
        if not self._reading:
            self._delete(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        with self._changed:
            if self._files and self._files[0] == name:
                del self._files[0]

    def _note_failure(self, error: Exception) -> None:
        with self._changed:
            first = self._problem is None
            self._problem = str(error)
            self._refused = isinstance(error, RunRefusedError)
            self._asked = False
            if self._away_since is None:
                self._away_since = (time.monotonic(), time.time_ns() // 1000)
            self._changed.notify_all()
        if first:
            _log.warning("not delivered to MLflow, tried again later: %s", error)

    def _note_delivery(self, entries: Sequence[Entry]) -> None:
        """Take them out of where they were, and tell what should be known."""
        finished = self._files[0] if self._files and len(self._reading) == len(entries) else None
        if finished is not None:
            self._delete(finished)
        with self._changed:
            if self._reading:
                for _ in entries:
                    self._reading.popleft()
                if not self._reading and self._files:
                    del self._files[0]
            else:
                done = {id(entry) for entry in entries}
                while self._queue and id(self._queue[0]) in done:
                    self._take(self._queue.popleft())
            self._problem, self._refused, self._asked = None, False, False
            self._tell()
            self._changed.notify_all()

    def _delete(self, name: str) -> None:
        try:
            storage.delete_file(storage.join(self._folder, name))
        except OSError as error:  # delivered again by the next process, which does no harm
            _log.warning("could not delete %s, which is delivered: %s", name, error)

    def _tell(self) -> None:
        """Entries about an outage that is over, and about what was lost."""
        since, self._away_since = self._away_since, None
        lost, self._lost = self._lost, Counter()
        if since is not None:
            clock = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(since[1] / 1e6))
            seconds = time.monotonic() - since[0]
            text = f"nothing was delivered for {seconds:.0f} s, from {clock} on"
            self.put(self._notice("tracking-away", text))
        if lost:
            text = ", ".join(f"{count} of {kind}" for kind, count in sorted(lost.items()))
            self.put(self._notice("tracking-lost", text))

    # -------------------------------------------------------------------- memory and the folder

    def _spill(self) -> bool:
        """Move the queue to a file; False: the storage refused, and it is as it was."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
            if not self._queue:
                return True
            entries = self._writing = list(self._queue)
            self._queue.clear()
            self._bytes = 0
        name = None
        try:
            name = self._write(entries)
        except OSError as error:
            _log.warning("could not keep %d entries in %s: %s", len(entries), self._folder, error)
        with self._changed:
            if name is None or self._files is None:
                self._queue.extendleft(reversed(entries))
                self._bytes += sum(entry.size for entry in entries)
            else:
                self._files.append(name)
                self._left += len(entries)
            self._writing = []
            self._changed.notify_all()
        return name is not None

    def _write(self, entries: Sequence[Entry]) -> str:
        """A file after all that are there; its name is this process's own."""
        self._look()
        with self._changed:
            number = int(self._files[-1].partition("-")[0]) + 1 if self._files else 1
        name = f"{number:06d}-{uuid.uuid4().hex[:8]}.jsonl"
        lines = "\n".join(json.dumps(asdict(entry)) for entry in entries)
        storage.write_bytes(storage.join(self._folder, name), lines.encode())
        return name

    def _drop_one(self) -> None:
        """The oldest bulky entry, else the oldest."""
        number = next((n for n, e in enumerate(self._queue) if e.size >= _BULKY_BYTES), 0)
        entry = self._queue[number]
        del self._queue[number]
        self._lost[f"{entry.kind}, dropped"] += 1
        self._take(entry)

    def _take(self, entry: Entry) -> None:
        self._bytes -= entry.size
        self._left += 1

    def _ask(self) -> None:
        self._asked = True
        self._changed.notify_all()

    def _is_stuck(self) -> bool:
        """A try was made since somebody asked, and it failed."""
        return self._problem is not None and not self._asked

    def _is_empty(self) -> bool:
        return self._files == [] and not (self._queue or self._reading or self._writing)


def _parse(line: bytes, where: str) -> Entry | None:
    try:
        entry = Entry(**parse_object(line, where=where, max_bytes=_FILE_BYTES))
    except (ValueError, TypeError):  # not one of ours, or damaged
        return None
    types = ((entry.kind, str), (entry.time_us, int), (entry.step, int), (entry.data, dict))
    return entry if all(isinstance(value, kind) for value, kind in types) else None


def _count(value: Any) -> int:
    """Leaves of a JSON value."""
    if isinstance(value, dict):
        return sum(_count(item) for item in value.values()) + 1
    return 1
