"""Saving a run's checkpoints behind its training steps, and finding one to go on from.

train thread                               writer thread, one save at a time
step s: wait for the save before   --> copy own shards to host memory; step s+1's update waits
step s+1, ...                          write own shards, upload them, tell everyone their sha256
                                       rank 0: state.json, then delete what isn't kept
step s+n: take_finished() <--------------- seconds

The writers of all workers agree through a group of their own: collectives of two threads on one
group would meet in another order on another worker. `state.json` comes last, so that a kill at any
moment leaves folders that don't count (see `piflow.runs.folder`) and the previous checkpoint as it
was.

`dcp.async_save` ends where the shards are written. Upload, the workers' agreement, `state.json` and
retention come after it, in the same thread; so the thread is ours, and in it `dcp.save` writes.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from piflow import storage
from piflow.config import TrainingConfig
from piflow.runs import folder as run_folder
from piflow.sharding.everyone import of_rank_0, rank
from piflow.storage.scratch import scratch
from piflow.training.checkpoint import (
    STATE_FILE,
    CheckpointError,
    DamagedCheckpointError,
    FileRecord,
    RunState,
    gather_files,
    load_checkpoint,
    require_step,
    state_file,
    write_shards,
)
from piflow.training.snapshot import Snapshot
from piflow.training.step import Trainer

_PAUSES = (1.0, 5.0, 20.0)  # seconds before an object store is tried again


@dataclass(frozen=True)
class Saved:
    """One finished save."""

    step: int
    stall_seconds: float  # training waited: for the save before, and for the copy to host memory
    write_seconds: float  # from then until the checkpoint was complete
    kept: tuple[int, ...] = ()  # steps of all checkpoints that are there now; on rank 0


class CheckpointSaver:
    """Writes checkpoints into a run's folder, one at a time, in a thread.

    Every worker makes one (a collective) and calls its methods at the same steps.

    Args:
        run_dir: URI of the run's folder; with several machines they must share it.
        training: which checkpoints are kept.
        before_seal: called on rank 0, in the thread, when all files are there and before they
            become a checkpoint: what must not be lost with the steps before it.
    """

    def __init__(
        self,
        run_dir: str,
        training: TrainingConfig,
        before_seal: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir = run_dir
        self.training = training
        self._before_seal = before_seal
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank = rank()
        self._saves: list[Future[Saved]] = []  # not yet taken; the last may be running

    def save(self, trainer: Trainer, state: RunState) -> Future[Saved]:
        """Start to copy the trainer's state to host memory, and to write it.

        The trainer's next update waits for the copies, its forward and backward passes don't.

        Returns:
            What is set when the checkpoint is complete on all workers, or to a CheckpointError.

        Raises:
            CheckpointError: the save before this one failed.
        """
        began = time.perf_counter()
        self.wait()
        snapshot = Snapshot(trainer)
        stall = time.perf_counter() - began
        future: Future[Saved] = Future()
        self._saves.append(future)
        threading.Thread(
            target=self._run,
            args=(future, snapshot, state, stall),
            name=f"checkpoint-{state.step}",
            daemon=True,  # a worker that fails must be able to exit
        ).start()
        return future

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: the save failed.
        """
        for future in self._saves:
            future.result()

    def take_finished(self) -> list[Saved]:
        """The saves that finished since the last call; doesn't wait.

        Raises:
            CheckpointError: a save failed.
        """
        finished = [future for future in self._saves if future.done()]
        self._saves = [future for future in self._saves if future not in finished]
        return [future.result() for future in finished]

    def _run(
        self, future: Future[Saved], snapshot: Snapshot, state: RunState, stall: float
    ) -> None:
        began = time.perf_counter()
        uri = run_folder.checkpoint_uri(self.run_dir, state.step)
        try:
            kept = self._write(uri, snapshot.copy(), state)
        except CheckpointException as error:  # not an `Exception`: nobody else would catch it
            cause, _ = next(iter(error.failures.values()))
            future.set_exception(_save_error(uri, cause))
        except Exception as error:  # whatever it is, the train thread shall raise it
            future.set_exception(_save_error(uri, error))
        else:
            took = time.perf_counter() - began
            future.set_result(Saved(state.step, stall + snapshot.waited, took, kept))

    def _write(self, uri: str, tensors: Mapping[str, Tensor], state: RunState) -> tuple[int, ...]:
        """All workers' shards, then `state.json`, then retention; returns which steps are kept."""
        if self._rank == 0:  # of an earlier attempt; the others wait for rank 0 before they write
            _tried(uri, lambda: run_folder.delete_checkpoint(uri))
        with _staging(uri) as folder:
            mine = write_shards(folder, tensors, self._group)
            problem = _upload(folder, uri)
        files = gather_files(mine, problem, self._group)
        if self._rank == 0:
            _tried(uri, self._before_seal)
            _tried(uri, lambda: _seal(uri, state, files))
            return self._delete_old()
        return ()

    def _delete_old(self) -> tuple[int, ...]:
        """Retention; returns which steps are kept, if the storage tells."""
        kept = self.training
        try:
            run_folder.delete_old_checkpoints(
                self.run_dir, kept.keep_last, kept.keep_every, kept.keep_best
            )
            return tuple(run_folder.checkpoints(self.run_dir))
        except OSError:
            return ()  # the new checkpoint is good: the next save deletes what is left over


def restore_newest(
    run_dir: str,
    trainer: Trainer,
    open_folder: Callable[[str], AbstractContextManager[Path]],
    tell: Callable[[str], None],
    require: Callable[[RunState, str], None] = lambda state, uri: None,
) -> RunState | None:
    """Restore the newest checkpoint that is intact; every worker calls it, no save may be running.

    A damaged one costs the steps since the one before it, and nobody has to be woken up for that:
    it is told, left where it is, and written anew when training comes to its step again. Folders
    that a killed save left half written are deleted.

    Args:
        open_folder: gives a checkpoint's URI a local path.
        tell: what happened, for the one on call; on rank 0.
        require: raises a CheckpointError unless the state, of the checkpoint at the URI, is of this
            run.

    Returns:
        Where the run is; None: it has no checkpoint.

    Raises:
        CheckpointError: checkpoints of another recipe, or all of them are damaged: that is more
            likely the machine's fault or the storage's than theirs, and nothing starts from zero.
    """
    damaged: list[str] = []
    for step, uri in reversed(_candidates(run_dir).items()):
        try:
            with open_folder(uri) as folder:
                state = load_checkpoint(folder, trainer, _at(step, uri, require))
        except DamagedCheckpointError as error:
            damaged.append(f"step {step}: {error}")
            continue
        if damaged:
            tell(f"{'; '.join(damaged)}. Going on from step {state.step}, {uri}")
        return state
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {run_dir} is intact: {'; '.join(damaged)}. "
            "Check the machine and the storage; or restore one from a backup; or move them away, "
            "and the run starts from zero"
        )
    return None


def _at(
    step: int, uri: str, require: Callable[[RunState, str], None]
) -> Callable[[RunState], None]:
    """What is required of a state, for the checkpoint at the URI."""

    def required(state: RunState) -> None:
        require_step(state, step, uri)
        require(state, uri)

    return required


def _candidates(run_dir: str) -> dict[int, str]:
    """URIs by step, listed by rank 0 for all workers, so that all try the same ones."""
    found: dict[int, str] = {}
    if rank() == 0:
        run_folder.delete_half_written(run_dir)
        found = run_folder.sealed_checkpoints(run_dir)
    return of_rank_0(found)


@contextmanager
def _staging(uri: str) -> Iterator[Path]:
    """Where shards are written: on the spot if it is local, else in a temporary folder."""
    if storage.scheme(uri) == "file":
        yield Path(storage.filesystem(uri)[1])
        return
    with scratch("checkpoint") as folder:
        yield folder


def _upload(folder: Path, uri: str) -> str | None:
    """Bring the files to the storage, if they aren't there; returns what went wrong."""
    if storage.scheme(uri) == "file":
        return None

    try:
        _tried(uri, lambda: storage.upload_folder(uri, folder))
    except OSError as error:
        return f"upload failed {len(_PAUSES) + 1} times: {error}"
    return None


def _tried(uri: str, operation: Callable[[], None]) -> None:
    """Do it, several times if an object store fails: nobody waits for it but the next save."""
    for pause in _PAUSES if storage.on_objects(uri) else ():
        try:
            operation()
        except OSError:
            time.sleep(pause)
        else:
            return
    operation()


def _seal(uri: str, state: RunState, files: Mapping[str, FileRecord]) -> None:
    _require_files(uri, files)
    storage.write_bytes(storage.join(uri, STATE_FILE), state_file(state, files))


def _require_files(uri: str, files: Mapping[str, FileRecord]) -> None:
    """Rank 0 must see all workers' files: a checkpoint over several machines' disks is none."""
    found = storage.file_sizes(uri)
    missing = [name for name, record in files.items() if found.get(name) != record.size]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} files are not there as they were written, first "
            f"{missing[0]}; put run_dir on storage that all machines share"
        )


def _save_error(uri: str, error: BaseException) -> CheckpointError:
    text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += "; free some space, lower training.keep_last or use another run_dir"
    failure = CheckpointError(
        f"could not save checkpoint {uri}: {text}. Earlier checkpoints are as they were"
    )
    failure.__cause__ = error
    return failure
