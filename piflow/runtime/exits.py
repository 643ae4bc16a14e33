"""With which code a command ends, and the errors that say more than that something is wrong.

Whoever starts the command again (a job system, a supervisor) needs to know whether that can help.
"""

from __future__ import annotations

from enum import IntEnum

from piflow.data.cluster import ResourcesError
from piflow.runtime.signals import StoppedError


class WorkersFailedError(RuntimeError):
    """The workers failed more often than `runtime.max_failures` allows; says why the last did."""


class WorkersLostError(WorkersFailedError):
    """The same, and the last failure was of Ray or a machine, not of what the workers do."""


class RayLostError(ConnectionError):
    """Ray itself ended or doesn't answer; what was saved before is good."""


def is_ray_lost(error: BaseException) -> bool:
    """Whether Ray was gone when this ended the work: the error, or what a signal came on top of."""
    return isinstance(error, RayLostError) or isinstance(error.__context__, RayLostError)


class ExitCode(IntEnum):
    """Of a command; `docs/operations.md` explains them to operators."""

    DONE = 0
    MISTAKE = 1  # in recipe, inputs, credentials or code: comes back until its cause is removed
    USAGE = 2  # wrong options, which the command line's library finds
    NO_ROOM = 69  # sysexits.h's EX_UNAVAILABLE: the cluster lacks what the recipe asks for
    UNEXPECTED = 70  # EX_SOFTWARE: the traceback lies in a file that the message names
    TRY_AGAIN = 75  # EX_TEMPFAIL: Ray, a machine, MLflow or a storage was away
    HANGUP = 129  # 128 + the signal's number, as shells count
    INTERRUPTED = 130
    TERMINATED = 143


def exit_code(error: BaseException) -> ExitCode:
    """The code for an error that ended a command."""
    if isinstance(error, StoppedError):
        return ExitCode(128 + error.number)
    if isinstance(error, ResourcesError):
        return ExitCode.NO_ROOM
    if isinstance(error, ConnectionError | TimeoutError | WorkersLostError):
        return ExitCode.TRY_AGAIN
    if isinstance(error, ValueError | ArithmeticError | OSError | WorkersFailedError):
        return ExitCode.MISTAKE
    return ExitCode.UNEXPECTED
