"""Jobs that `piflow submit` sent to a cluster: list them, read what they print, stop one."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from rich.table import Table

from piflow.commands.submit import follow_job, write_log
from piflow.jobs import submission
from piflow.progress import PlainConsole
from piflow.runtime.exits import ExitCode
from piflow.runtime.signals import StoppedError
from piflow.storage.foreign import shown

if TYPE_CHECKING:
    from piflow.runtime.job_server import Job

_POLL_SECONDS = 1.0
_SPARE_SECONDS = 30.0  # after a job's grace, until the job server says that it has ended
_STOPPED = "piflow: stopped by "  # begins a command's last line (`StoppedError`)


def show(address: str | None = None) -> list[Job]:
    """Print a table of a cluster's jobs that piflow submitted, the newest first."""
    from piflow.runtime.job_server import connect

    server = connect(address)
    found = [job for job in reversed(server.jobs()) if submission.RUN in job.metadata]
    table = Table(title=f"{server.address}: {len(found)} job(s)")
    table.add_column("job", no_wrap=True)
    for column in ("stages", "state", "exit code", "started", "took"):
        table.add_column(column)
    for job in found:
        table.add_row(*_row(job))
    PlainConsole().print(table)
    return found


def _row(job: Job) -> tuple[str, ...]:
    started, took = "", ""
    if job.started is not None:
        started = datetime.fromtimestamp(job.started).strftime("%Y-%m-%d %H:%M")
        took = str(timedelta(seconds=round((job.ended_at or time.time()) - job.started)))
    code = str(job.code) if job.has_ended else ""
    stages = shown(job.metadata.get(submission.STAGES_KEY, ""), 100).replace(",", ", ")
    return shown(job.id, 100), stages, job.status.lower(), code, started, took


def logs(name: str, address: str | None = None, *, follow: bool = False) -> int:
    """Print what a job has printed; with `follow` until it ends.

    Returns:
        With `follow` the job's exit code, else 0.

    Raises:
        ValueError: there is no such job.
    """
    from piflow.runtime.job_server import by_name, connect

    server = connect(address)
    job = by_name(server.jobs(), name)
    if follow:
        return follow_job(server, job)
    write_log(server.log(job.id))
    return ExitCode.DONE


def stop(name: str, address: str | None = None) -> int:
    """Have a job save its step and end; wait for that and say what was saved.

    Returns:
        0 if the job has ended by itself or had the time to save; else 1.

    Raises:
        ValueError: there is no such job.
        TimeoutError: it hasn't ended long after it should have.
    """
    from piflow.runtime.job_server import by_name, connect

    server = connect(address)
    job = by_name(server.jobs(), name)
    if job.has_ended:
        print(f"job {shown(job.id)} has ended: {job.status.lower()}, exit code {job.code}")
        return ExitCode.DONE
    server.stop(job.id)
    print(f"job {shown(job.id)}: SIGTERM is sent, it has {job.grace} s to save", flush=True)
    end = time.monotonic() + job.grace + _SPARE_SECONDS
    try:
        while not (job := server.job(job.id)).has_ended:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job.id} is still {job.status.lower()}; ask again later")
            time.sleep(_POLL_SECONDS)
    except StoppedError as error:
        raise StoppedError(error.number, f"job {job.id} goes on stopping") from None
    told = [line for line in server.log(job.id).splitlines() if line.startswith(_STOPPED)]
    if told:
        write_log(f"{told[-1].removeprefix('piflow: ')}\n")
        return ExitCode.DONE
    if job.status == "SUCCEEDED":
        print("it was done before it came to stop")
        return ExitCode.DONE
    print(
        f"job {shown(job.id)} ended without a word on a last save ({job.status.lower()}): the run "
        "goes on from its newest checkpoint"
    )
    return ExitCode.MISTAKE
