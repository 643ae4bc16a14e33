"""How workers come to stop before the last step: asked to, together and after a step."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from piflow.runtime.mailbox import StopReason


class Stops:
    """What may ask workers to stop; all of them agree after every step. To be made on all ranks.

    Ray runs the train loop outside of the main thread, where Python can't handle signals.
    faulthandler can, from anywhere: SIGTERM leaves the threads' stacks in a file, and the file's
    size is the sign. It also takes the place of Ray's own handler, which ends the process.
    """

    def __init__(self, mailbox: Any, rank: int) -> None:
        self._mailbox = mailbox
        self._rank = rank
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._answer: Any = None  # the mailbox's, on its way
        self._asked = StopReason.NONE
        self._terminated = tempfile.TemporaryFile()
        faulthandler.register(signal.SIGTERM, file=self._terminated, chain=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see `kept_handlers`

    def agreed(self) -> StopReason:
        """The weightiest reason that any worker knows of; a collective."""
        reason = self._requested() if self._rank == 0 else StopReason.NONE
        if ray.train.get_preemption_info() is not None or self._got_sigterm():
            reason = max(reason, StopReason.MOVE)
        if self._group is None:
            return reason
        everyone = torch.tensor(int(reason))
        dist.all_reduce(everyone, dist.ReduceOp.MAX, group=self._group)
        return StopReason(int(everyone))

    def close(self) -> None:
        """SIGTERM ends the process again."""
        faulthandler.unregister(signal.SIGTERM)
        self._terminated.close()

    def _got_sigterm(self) -> bool:
        return os.fstat(self._terminated.fileno()).st_size > 0

    def _requested(self) -> StopReason:
        """What the mailbox said last; nobody waits for it, so it may be a step old."""
        if self._answer is None:
            self._answer = self._mailbox.requested.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            self._asked = ray.get(self._answer)
            self._answer = None
        return self._asked
