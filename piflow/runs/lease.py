"""Whose a folder is: one driver at a time writes a run, and one `piflow embed` a store.

    local disk   RUN_DIR/driver.json is locked (flock); the kernel lets go when the process ends
    objects      RUN_DIR/driver.json is written on the condition that nobody else did; a thread
                 writes it anew every 5 s, and one that hasn't changed for 30 s is a dead driver's

    driver                                        another driver
    owned(run_dir) --> driver.json <-- is it mine? -- owned(run_dir): refused, or takes over
    workers: require_owner() before a checkpoint counts

Nobody compares clocks: who waits for a dead driver counts seconds by itself. A driver that was cut
off for so long that another took over is told by its next write, and ends; its workers can't seal
a checkpoint any more.
"""

from __future__ import annotations

import errno
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
from piflow.storage.foreign import parse_object, shown

OWNER_FILE = "driver.json"
PROCESS = uuid.uuid4().hex  # this process, among all that ever owned a run
RENEW_SECONDS, LEASE_SECONDS = 5.0, 30.0
_FIELDS = {
    "process": str, "host": str, "pid": int, "since": str, "beat": int, "kernel": str,
    "started": int,
}  # fmt: skip


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
    kernel: str = ""  # as of `_kernel`; "" in files of version 0.1.0
    started: int = 0  # ticks of the kernel's clock; tells processes of one number apart

    @classmethod
    def this_process(cls) -> Owner:
        """This process, from now on."""
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid = os.getpid()
        started = _started(pid)
        kernel = _kernel() if started is not None else ""
        return cls(PROCESS, socket.gethostname(), pid, now, 0, kernel, started or 0)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def __str__(self) -> str:
        return f"process {self.pid} on {shown(self.host)}, which started at {shown(self.since)}"

    @property
    def was_killed_here(self) -> bool:
        """It ran where this process can see it, and doesn't any more.

        A host's name says nothing: containers share names, and each counts its processes from 1.
        """
        if not self.kernel or self.kernel != _kernel():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's
            return False
        started = _started(self.pid)
        return started is not None and started != self.started


def _kernel() -> str:
    """The kernel's boot and this process's namespaces, inside of which a number means one process.

    "": not known, on other systems than Linux or where `/proc` shows another namespace's processes.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "time")]
    except OSError:
        return ""
    return " ".join((boot, *spaces))


def _started(pid: int) -> int | None:
    """When a process started, 0 for one that has ended and waits to be reaped; None: not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] == "Z" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


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
    mine = Owner.this_process()
    with _leased(uri, mine) if storage.on_objects(uri) else _locked(uri, mine) as ownership:
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
    with _lock(path, uri) as file:
        _write(file, mine.to_json())
        storage.delete_left_over(str(path.parent))
        try:
            yield Ownership()
        finally:
            path.unlink(missing_ok=True)  # before the lock goes: nobody else can have it


def _lock(path: Path, uri: str) -> IO[bytes]:
    """The file at this path, locked; it may be deleted and made anew between opening and locking.

    Raises:
        RunTakenError: somebody else has locked it.
        RunDirectoryError: it is a link, whose target would be written.
    """
    while True:
        try:
            file = open(path, "a+b", opener=storage.without_links)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise RunDirectoryError(
                f"{uri} is a link to another file, which piflow never made; remove the link"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError as error:
            file.close()
            raise _taken(uri, _owner_in(path)) from error
        except FileNotFoundError:
            pass  # deleted this moment
        file.close()


def _owner_in(path: Path) -> Owner | None:
    try:
        with path.open("rb") as file:
            return _parse(file.read(conditional.MAX_BYTES))
    except FileNotFoundError:
        return None


def _write(file: IO[bytes], content: bytes) -> None:
    """In place: a lock is the file's own, not its name's."""
    file.truncate(0)
    file.write(content)
    file.flush()


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
    if found is not None and found[0].strip():
        owner = _parse(found[0])
        if owner is None or not owner.was_killed_here:
            _require_dead(uri, found[1], owner)
    version = conditional.write_if(uri, mine.to_json(), None if found is None else found[1])
    if version is not None:
        return version
    found = conditional.read(uri)  # whose answer was lost?
    owner = None if found is None else _parse(found[0])
    if found is None or owner is None or owner.process != mine.process:
        raise _taken(uri, owner)
    return found[1]


def _require_dead(uri: str, version: str, owner: Owner | None) -> None:
    """Wait until the file has not changed for so long that its owner must be dead."""
    whose = owner or "a driver that it does not name"
    print(f"{uri} belongs to {whose}: waiting {LEASE_SECONDS:.0f} s for a sign of life")
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
    """None: nobody's (its owner ended), or damaged. Keys of a later version don't count."""
    try:
        found = parse_object(content, where=OWNER_FILE)
        owner = Owner(**{key: found[key] for key in _FIELDS if key in found})
    except (ValueError, TypeError):
        return None
    values = asdict(owner)
    return owner if all(type(values[key]) is kind for key, kind in _FIELDS.items()) else None


def _taken(uri: str, owner: Owner | None) -> RunTakenError:
    error = RunTakenError(
        f"{uri} belongs to {owner or 'another driver'}; one driver at a time writes a run. Wait "
        "for its end, or stop it, or set another run_dir"
    )
    error.owner = owner
    return error
