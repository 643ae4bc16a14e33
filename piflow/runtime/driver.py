"""Ray's life cycle and a run's: checks first, then the MLflow run, then Ray Train's workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from piflow import rundir, storage
from piflow.checkpoint import load_state
from piflow.config import Recipe
from piflow.data.store import EmbeddingStore
from piflow.step import NonFiniteError
from piflow.tracking import RunStatus, deliver_kept, finish

_DATA_CPUS = 2  # logical CPUs for Ray Data's reading beside the workers, on a local instance


_FAILURES: dict[str, type[Exception]] = {"recipe": ValueError, "non-finite": NonFiniteError}


class WorkersFailedError(ChildProcessError):
    """The workers failed more often than `runtime.max_failures` allows; says why the last did."""


@contextmanager
def ray_session(recipe: Recipe) -> Iterator[None]:
    """Use the running Ray, or the cluster in RAY_ADDRESS, or a local instance for this block."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(recipe.runtime.worker_start_timeout)
    )
    import ray

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        workers = int(recipe.runtime.max_workers * recipe.runtime.cpus_per_worker)
        ray.init(
            num_cpus=max(os.cpu_count() or 1, workers + _DATA_CPUS),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def train(recipe: Recipe, *, show_progress: bool = True) -> int:
    """Start the recipe's run, or go on with it from its newest checkpoint.

    Returns:
        The number of optimiser steps done.

    Raises:
        ValueError: the run directory belongs to another recipe or store, or store, model and recipe
            don't fit one another.
        NonFiniteError: the loss went NaN or infinite; the newest checkpoint is good.
        WorkersFailedError: the workers failed more often than `runtime.max_failures` allows.
    """
    record = rundir.require_same_recipe(recipe)
    manifest_hash = check_store(recipe).manifest_hash
    rundir.require_same_store(recipe, record, manifest_hash)
    found = rundir.checkpoints(recipe.run_dir)
    if record is not None and found and max(found) >= recipe.training.steps:
        _tell_undelivered(deliver_kept(record.tracking_uri, record.mlflow_run_id, recipe.run_dir))
        print(
            f"{recipe.name}: all {recipe.training.steps} steps are done; raise training.steps "
            "to go on"
        )
        return max(found)
    record = _tracked(recipe, record, manifest_hash)
    with ray_session(recipe):
        _fit(_absolute(recipe), record, show_progress=show_progress)
    return load_state(storage.local_folder(rundir.newest_checkpoint(recipe.run_dir))).step


def check_store(recipe: Recipe) -> EmbeddingStore:
    """Open the recipe's store and make sure that the recipe's encoder wrote it.

    Raises:
        ValueError: no store, a damaged one, one of another encoder, or one without the recipe's
            negative prompt.
    """
    from piflow.data.encoders import encoder_identity

    store = EmbeddingStore.open(recipe.embed.store)
    store.require_encoder(encoder_identity(recipe.encoder))
    store.require_negative_prompt(recipe.guidance.negative_prompt)
    return store


def _absolute(recipe: Recipe) -> Recipe:
    """Workers have other working directories: make local paths absolute."""
    embed = recipe.embed.model_copy(update={"store": storage.absolute(recipe.embed.store)})
    paths = {"path": storage.absolute(recipe.model.path)}
    if recipe.model.vae is not None:
        paths["vae"] = storage.absolute(recipe.model.vae)
    model = recipe.model.model_copy(update=paths)
    return recipe.model_copy(
        update={"run_dir": storage.absolute(recipe.run_dir), "embed": embed, "model": model}
    )


def _tracked(
    recipe: Recipe, record: rundir.RunRecord | None, manifest_hash: str
) -> rundir.RunRecord:
    """The run's record, with an MLflow run that was started or is to be resumed."""
    from piflow import tracking

    uri = recipe.tracking.uri or tracking.default_tracking_uri(recipe.run_dir)
    params = recipe.model_dump(mode="json")
    run_dir = storage.absolute(recipe.run_dir)
    tags = {"piflow.recipe_hash": recipe.hash(), "piflow.run_dir": run_dir}
    if record is None:
        run_id = tracking.start(uri, recipe.tracking.experiment, recipe.name, params, tags)
    else:  # an address that has worked may be away, as in mid-run
        run_id = record.mlflow_run_id
        must_answer = uri != record.tracking_uri
        tracking.resume(uri, run_id, run_dir, params, tags, must_answer=must_answer)
    record = rundir.RunRecord(recipe.hash(), recipe.identity(), uri, run_id, manifest_hash)
    rundir.write_record(recipe.run_dir, record)
    return record


def _fit(recipe: Recipe, record: rundir.RunRecord, *, show_progress: bool) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from piflow.runtime.progress import progress_bar
    from piflow.runtime.worker import train_worker

    runtime = recipe.runtime
    system, path = storage.filesystem(recipe.run_dir)
    # a pair makes Ray Train elastic, which its declared types don't know
    workers: Any = runtime.worker_range if runtime.is_elastic else runtime.max_workers
    resources: dict[str, float] = {"CPU": runtime.cpus_per_worker}
    if runtime.use_gpu:
        resources["GPU"] = 1
    with progress_bar(f"{recipe.name}: steps", recipe.training.steps, show=show_progress) as board:
        config: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "recipe_hash": record.recipe_hash,
            "tracking_uri": record.tracking_uri,
            "run_id": record.mlflow_run_id,
            "board": board,
        }
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if runtime.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=runtime.use_gpu,
                resources_per_worker=resources,
            ),
            run_config=ray.train.RunConfig(
                name=rundir.CHECKPOINTS,
                storage_path=path,
                storage_filesystem=system,
                failure_config=ray.train.FailureConfig(max_failures=runtime.max_failures),
            ),
        )
        rundir.take_failure(recipe.run_dir)  # of an attempt whose driver died before it looked
        rundir.forget_reported(recipe.run_dir)
        try:
            trainer.fit()
            failure = rundir.take_failure(recipe.run_dir)
            if failure is not None:
                raise _FAILURES[failure.kind](failure.message)
        except BaseException as error:
            _finish(recipe, record, "FAILED")
            if isinstance(error, ray.train.WorkerGroupError):
                raise WorkersFailedError(_first_failure(error.worker_failures)) from error
            raise
    _finish(recipe, record, "FINISHED")


def _finish(recipe: Recipe, record: rundir.RunRecord, status: RunStatus) -> None:
    """Tell MLflow how the run ended; if it is away, whoever comes next does."""
    run_id = record.mlflow_run_id
    _tell_undelivered(finish(record.tracking_uri, run_id, recipe.run_dir, status))


def _tell_undelivered(problem: str | None) -> None:
    if problem is not None:
        print(
            f"MLflow lacks some of the run, which is kept in its folder: {problem}. The next "
            "`piflow distill`, `evaluate` or `export` delivers it"
        )


def _first_failure(failures: Mapping[int, Exception]) -> str:
    """What the lowest failed rank raised, without the remote traceback that comes before it."""
    if not failures:
        return "the workers failed"
    rank = min(failures)
    lines = str(failures[rank]).strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("  ")]
    message = "\n".join(lines[starts[-1] + 1 :] if starts else lines)
    return f"worker {rank} failed: {message}"
