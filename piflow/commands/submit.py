"""recipe -> a job on a cluster, or the job of the same run that is there already."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from piflow import storage
from piflow.config import Recipe
from piflow.jobs import package, submission
from piflow.jobs.demand import STAGES as RENDERED
from piflow.jobs.demand import demand
from piflow.jobs.submission import Stage
from piflow.jobs.values import load_values
from piflow.runtime.signals import StoppedError
from piflow.storage.foreign import shown
from piflow.storage.scratch import scratch

if TYPE_CHECKING:
    from piflow.jobs.fit import WorkerGib
    from piflow.jobs.package import Package
    from piflow.runtime.job_server import Job, JobServer

_ARRIVAL_SECONDS = 60.0  # for which a job's start is watched
_POLL_SECONDS = 0.5
_LOG_LINE = 4000  # characters of a job's line that a terminal gets


def main(
    recipe: Recipe,
    *,
    address: str | None = None,
    stages: str | None = None,
    named: Sequence[Path] = (),
    values: Path | None = None,
    wait_for_nodes: bool = False,
    stop_seconds: int = 600,
    follow: bool = False,
) -> int:
    """Submit a recipe's stages as one job, or attach to the run's job that has not ended.

    Args:
        address: of the cluster's dashboard; default as `piflow.runtime.job_server.connect`.
        stages: names with commas between; default: all that the recipe needs.
        named: the user's own modules and other files that go along.
        values: a values file (`piflow render`), which says what machines may come.
        wait_for_nodes: machines may still join a cluster without an autoscaler.
        stop_seconds: that the job has to save when it is stopped.
        follow: print the job's log until it ends.

    Returns:
        With `follow` the job's exit code, else 0 if it has started.

    Raises:
        ValueError: recipe, package or cluster can't be used; nothing was started.
        ConnectionError: nobody answers at the address.
    """
    chosen = submission.stages_of(recipe, stages)
    submission.require_places(recipe)
    submission.require_drawing_on_workers(recipe, chosen)
    if values is not None:
        known = load_values(values)
        for stage in RENDERED:
            if stage in chosen:
                demand(recipe, known, stage)
    with scratch("package") as folder:
        packed = package.build(Path(folder), recipe, named)
        from piflow.runtime.job_server import JobTakenError, connect

        server = connect(address)
        while True:
            earlier = _jobs_of(server, submission.run_key(recipe))
            running = next((job for job in reversed(earlier) if not job.has_ended), None)
            if running is not None:
                _attached(server, running, chosen, packed)
                break
            worker_gib = _checked(recipe, chosen)
            _require_fit(recipe, chosen, server, worker_gib, values is not None or wait_for_nodes)
            try:
                running = _submit(server, recipe, chosen, packed, len(earlier) + 1, stop_seconds)
                break
            except JobTakenError:
                continue  # somebody else was faster: attach to theirs
    _tell(server, recipe, running)
    if follow:
        return follow_job(server, running)
    return _arrived(server, running)


def _jobs_of(server: JobServer, run: str) -> list[Job]:
    return [job for job in server.jobs() if job.metadata.get(submission.RUN) == run]


def _submit(
    server: JobServer,
    recipe: Recipe,
    stages: Sequence[Stage],
    packed: Package,
    number: int,
    stop_seconds: int,
) -> Job:
    """Start the run's job of this number: two that do so at once can't both."""
    run = submission.run_key(recipe)
    job_id = f"{run}-{number}"
    metadata = {
        submission.RUN: run,
        submission.NAME: recipe.name,
        submission.STAGES_KEY: ",".join(stages),
        submission.CONTENT: packed.sha256,
    }
    server.submit(
        job_id,
        submission.command(recipe, stages, version("piflow")),
        str(packed.folder),
        grace=stop_seconds,
        metadata=metadata,
    )
    print(f"job {job_id}: {' -> '.join(stages)}, {len(packed.files)} files sent", flush=True)
    for name, why in packed.left_out:
        print(f"  left out: {shown(name)} ({why})")
    return server.job(job_id)


def _attached(server: JobServer, job: Job, stages: Sequence[Stage], packed: Package) -> None:
    """Say that the run's job is there, and how it differs from what was asked for."""
    print(f"job {shown(job.id)} of this run is {job.status.lower()}: attached to it", flush=True)
    theirs = job.metadata.get(submission.STAGES_KEY, "")
    if theirs != ",".join(stages):
        print(f"  it runs {shown(theirs)}; submit the other stages when it has ended")
    if job.metadata.get(submission.CONTENT) != packed.sha256:
        print(
            "  it was sent with other files or options of the recipe, and keeps them; `piflow stop "
            f"{shown(job.id)}` and submit again to change them: no step is lost"
        )


def _checked(recipe: Recipe, stages: Sequence[Stage]) -> WorkerGib | None:
    """What `piflow distill` checks before it starts, as far as its places can be seen from here.

    Returns:
        What a worker takes; None: the model lies elsewhere, or no GPU has to have room for it.
    """
    from piflow.data.manifest import MANIFEST
    from piflow.jobs import fit
    from piflow.runs import folder as run_folder
    from piflow.training.preflight import base_fingerprint, preflight

    if not any(stage in ("distill", "pretrain") for stage in stages):
        return None
    has_store = _is_here(storage.join(recipe.embed.store, MANIFEST))
    has_model = recipe.objective.type != "pi_id" or _is_here(recipe.model.path)
    lora = recipe.model.lora
    has_lora = lora is None or _is_here(lora.path)
    if has_store and has_model and has_lora and _is_here(recipe.model.vae):
        preflight(recipe)
        return fit.Estimate() if recipe.runtime.use_gpu else None
    unseen = {
        "embed.store": has_store or "embed" in stages,
        "model.path": has_model,
        "model.lora.path": has_lora,
        "model.vae": _is_here(recipe.model.vae),
    }
    if elsewhere := [key for key, seen in unseen.items() if not seen]:
        print(f"not seen from here, the job checks it first: {', '.join(elsewhere)}", flush=True)
    record = run_folder.require_same_recipe(recipe) if _is_here(recipe.run_dir) else None
    if not has_model or not has_lora:
        return None
    run_folder.require_same_base(recipe, record, base_fingerprint(recipe))
    return fit.Estimate() if recipe.runtime.use_gpu else None


def _is_here(place: str | None) -> bool:
    """Whether this machine sees a place, with its own keys."""
    try:
        return place is None or storage.exists(place)
    except (OSError, ImportError):
        return False


def _require_fit(
    recipe: Recipe,
    stages: Sequence[Stage],
    server: JobServer,
    worker_gib: WorkerGib | None,
    more_come: bool,
) -> None:
    """Make sure that the machines have room, or that more may come.

    Raises:
        ValueError: they haven't; says what would help.
    """
    from piflow.jobs import fit

    cluster = server.cluster()
    limit = recipe.runtime.worker_start_timeout
    if not cluster.may_grow and not more_come:
        fit.require_fit(recipe, stages, cluster.nodes, worker_gib)
        _tell_of_others(server, limit)
        return
    problem = fit.misfit(recipe, stages, cluster.nodes, worker_gib)
    if problem is not None:
        print(
            f"{problem}. The job asks for machines as it comes to the stage, and waits up to "
            f"{limit:.0f} s (runtime.worker_start_timeout)",
            flush=True,
        )


def _tell_of_others(server: JobServer, limit: float) -> None:
    """Say that jobs which have not ended may hold what this one needs.

    Args:
        limit: seconds that the run waits for its workers.
    """
    others = [shown(job.id) for job in server.jobs() if not job.has_ended]
    if others:
        count = "another job is" if len(others) == 1 else f"{len(others)} other jobs are"
        print(
            f"{count} on this cluster ({', '.join(others[:3])}{', …' if len(others) > 3 else ''}). "
            "Where GPUs or CPUs that this one needs are taken, it waits for them up to "
            f"{limit:.0f} s (runtime.worker_start_timeout) and then ends with exit code 69; "
            "submitted again later, it goes on",
            flush=True,
        )


def _tell(server: JobServer, recipe: Recipe, job: Job) -> None:
    """Where to look."""
    tracking = recipe.tracking
    uri = storage.redacted(tracking.uri) if tracking.uri else f"SQLite in {recipe.run_dir}"
    print(f"  dashboard: {server.page(job.id)}")
    print(f"  MLflow:    {uri}, experiment {shown(tracking.experiment)}, run {recipe.name}")
    print(f"  then:      piflow logs {job.id} --follow; piflow stop {job.id}", flush=True)


def _arrived(server: JobServer, job: Job) -> int:
    """Watch a job's first seconds: whether the cluster's image is one that can run it."""
    from piflow.runtime.exits import ExitCode

    end = time.monotonic() + _ARRIVAL_SECONDS
    while time.monotonic() < end:
        job, log = server.job(job.id), server.log(job.id)
        if job.has_ended:
            write_log(_problem(log) or job.message)
            return job.code
        if submission.ARRIVED in log:
            return ExitCode.DONE
        time.sleep(_POLL_SECONDS)
    print(f"the job is {job.status.lower()} after {_ARRIVAL_SECONDS:.0f} s and hasn't begun")
    return ExitCode.DONE


def _problem(log: str) -> str:
    """What piflow said of a job's end."""
    lines = [line for line in log.splitlines() if line.startswith("piflow: ")]
    return f"{lines[-1]}\n" if lines else "\n".join(log.splitlines()[-5:])


def write_log(text: str) -> None:
    """A part of a job's log to the terminal, which it can't take over by control characters."""
    lines = re.split(r"(\n)", text)
    sys.stdout.write("".join(line if line == "\n" else shown(line, _LOG_LINE) for line in lines))
    sys.stdout.flush()


def follow_job(server: JobServer, job: Job) -> int:
    """Print a job's log until it ends; a signal ends only that.

    Returns:
        The job's exit code.

    Raises:
        StoppedError: a signal; the job goes on.
    """
    try:
        job = server.follow(job.id, write_log)
    except StoppedError as error:
        raise StoppedError(
            error.number,
            f"job {job.id} runs on (`piflow logs {job.id} --follow`, `piflow stop {job.id}`)",
        ) from None
    if job.status == "FAILED" and job.exit_code is None:
        write_log(f"{job.message}\n")
    print(f"job {shown(job.id)}: {job.status.lower()}, exit code {job.code}")
    return job.code
