"""Whose a folder is: one driver at a time writes a run, and one `piflow embed` a store.

    local disk   RUN_DIR/driver.json is locked (flock); the kernel lets go when the process ends
    S3           RUN_DIR/driver.json is written on the condition that nobody else did; a thread
                 writes it anew every 5 s, and one that hasn't changed for 30 s is a dead driver's

    driver                                        another driver
    owned(run_dir) --> driver.json <-- is it mine? -- owned(run_dir): refused, or takes over
    workers: require_owner() before a checkpoint counts

Nobody compares clocks: who waits for a dead driver counts seconds by itself. A driver that was cut
off for so long that another took over is told by its next write, and ends; its workers can't seal
a checkpoint any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from piflow import storage
from piflow.runs.folder import RunDirectoryError
from piflow.storage import conditional

OWNER_FILE = "driver.json"
PROCESS = uuid.uuid4().hex  # this process, among all that ever owned a run
RENEW_SECONDS, LEASE_SECONDS = 5.0, 30.0


class RunTakenError(RunDirectoryError):
    """Another driver owns the run's folder.

    Attributes:
        owner: which one; None: that can't be told.
    """

    owner: Owner | None = None


@dataclass(frozen=True)
class Owner:
    """What `driver.json` says."""

    process: str
    host: str
    pid: int
    since: str  # UTC, for people
    beat: int = 0  # how often it was written anew

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, which started at {self.since}"

    @property
    def was_killed_here(self) -> bool:
        """It ran on this machine, and doesn't any more."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
            return False
        return self.pid == os.getpid() and self.process != PROCESS  # before the machine restarted


class Ownership:
    """Whether the folder is still this driver's; on a local disk it is, until the process ends.

    Attributes:
        lost: who took over meanwhile, because this driver couldn't reach the store.
    """

    lost: RunTakenError | None = None

    def require(self) -> None:
        """Go on only as the owner.

        Raises:
            RunTakenError: another driver has taken over.
        """
        if self.lost is not None:
            raise self.lost


@contextmanager
def owned(folder: str, file: str = OWNER_FILE) -> Iterator[Ownership]:
    """Own a folder while the block runs, which asks now and then whether it still does.

    Args:
        folder: a run's, or another one that has one writer at a time.
        file: in the folder, says whose it is.

    Raises:
        RunTakenError: another driver owns it; or has taken it over, because this one couldn't
            reach the store for half a minute.
        OSError: the folder can't be written.
    """
    uri = storage.join(folder, file)
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    mine = Owner(PROCESS, socket.gethostname(), os.getpid(), now)
    with _leased(uri, mine) if storage.scheme(uri) == "s3" else _locked(uri, mine) as ownership:
        yield ownership


def require_owner(folder: str, process: str, file: str = OWNER_FILE) -> None:
    """Make sure that the driver whose `PROCESS` this is owns the folder still.

    Raises:
        RunTakenError: it doesn't.
    """
    uri = storage.join(folder, file)
    owner = _parse(storage.read_bytes(uri)) if storage.exists(uri) else None
    if owner is None or owner.process != process:
        error = RunTakenError(f"run directory {folder} belongs to {owner or 'no driver'} by now")
        error.owner = owner
        raise error


# -------------------------------------------------------------------------------------- local disk


@contextmanager
def _locked(uri: str, mine: Owner) -> Iterator[Ownership]:
    path = Path(storage.filesystem(uri)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, uri):
        _write(path, mine.to_json())
        try:
            yield Ownership()
        finally:
            path.unlink(missing_ok=True)  # before the lock goes: nobody else can have it


def _lock(path: Path, uri: str) -> IO[bytes]:
    """The file at this path, locked; it may be deleted and made anew between opening and locking.

    Raises:
        RunTakenError: somebody else has locked it.
    """
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError as error:
            file.close()
            raise _taken(uri, _parse(path.read_bytes()) if path.exists() else None) from error
        except FileNotFoundError:
            pass  # deleted this moment
        file.close()


def _write(path: Path, content: bytes) -> None:
    """In place: a lock is the file's own, not its name's."""
    with path.open("r+b") as file:
        file.truncate()
        file.write(content)


# ---------------------------------------------------------------------------------- object stores


@contextmanager
def _leased(uri: str, mine: Owner) -> Iterator[Ownership]:
    ownership = Ownership()
    lease = _Lease(uri, mine, _take(uri, mine), ownership)
    thread = threading.Thread(target=lease.renew, name="ownership", daemon=True)
    thread.start()
    try:
        yield ownership
    finally:
        lease.ended.set()
        thread.join()
        ownership.require()
        try:
            conditional.delete_if(uri, lease.version)
        except OSError:
            pass  # it isn't renewed any more, and counts for half a minute at most


def _take(uri: str, mine: Owner) -> str:
    """Write the file, after a look at whose it is; returns its version."""
    found = conditional.read(uri)
    if found is not None:
        owner = _parse(found[0])
        if owner is not None and not owner.was_killed_here:
            _require_dead(uri, found[1], owner)
    version = conditional.write_if(uri, mine.to_json(), None if found is None else found[1])
    if version is not None:
        return version
    found = conditional.read(uri)  # whose answer was lost?
    owner = None if found is None else _parse(found[0])
    if found is None or owner is None or owner.process != mine.process:
        raise _taken(uri, owner)
    return found[1]


def _require_dead(uri: str, version: str, owner: Owner) -> None:
    """Wait until the file has not changed for so long that its owner must be dead."""
    print(f"{uri} belongs to {owner}: waiting {LEASE_SECONDS:.0f} s for a sign of life")
    since = time.monotonic()
    while time.monotonic() - since < LEASE_SECONDS:
        time.sleep(RENEW_SECONDS / 2)
        asked = time.monotonic()
        found = conditional.read(uri)
        if found is None:
            return
        if found[1] != version:
            raise _taken(uri, _parse(found[0]))
        if time.monotonic() - asked > LEASE_SECONDS / 3:
            since = time.monotonic()  # the store was away, and for the owner as well


class _Lease:
    """An owner's file on an object store, kept fresh by a thread."""

    def __init__(self, uri: str, owner: Owner, version: str, ownership: Ownership) -> None:
        self.uri = uri
        self.ownership = ownership
        self.owner = owner
        self.version = version
        self.ended = threading.Event()

    def renew(self) -> None:
        """Until it has ended, or somebody else took over, which `ownership` then says."""
        while not self.ended.wait(RENEW_SECONDS):
            try:
                self._write()
            except OSError:
                continue  # the store is away: nobody else can write there either
            except RunTakenError as error:
                self.ownership.lost = error
                return

    def _write(self) -> None:
        self.owner = replace(self.owner, beat=self.owner.beat + 1)
        version = conditional.write_if(self.uri, self.owner.to_json(), self.version)
        if version is None:
            found = conditional.read(self.uri)
            owner = None if found is None else _parse(found[0])
            if found is None or owner is None or owner.process != self.owner.process:
                raise _taken(self.uri, owner)
            version = found[1]  # written, but the answer was lost
        self.version = version


def _parse(content: bytes) -> Owner | None:
    """None: nobody's (its owner ended), or damaged."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _taken(uri: str, owner: Owner | None) -> RunTakenError:
    error = RunTakenError(
        f"{uri} belongs to {owner or 'another driver'}; one driver at a time writes a run. Wait "
        "for its end, or stop it, or set another run_dir"
    )
    error.owner = owner
    return error
