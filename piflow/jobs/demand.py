"""The machines of a stage: how many, and what a pod on each asks for."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from piflow import storage
from piflow.config import Recipe
from piflow.jobs.values import Values

Stage = Literal["embed", "distill", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_LONGEST_NAME = 47  # of a RayJob: Kubernetes' services of its cluster append to it
_GPU_GROUP, _CPU_GROUP = "gpu", "cpu"


@dataclass(frozen=True)
class Group:
    """Machines of one kind, each of which one pod or Ray node uses.

    Attributes:
        name: ``gpu`` or ``cpu``.
        fewest: without which the stage can't start; the group itself begins with none.
        most: machines at once.
        gpus: of each.
        cpus: of each.
        memory_gib: of each.
    """

    name: str
    fewest: int
    most: int
    gpus: int
    cpus: int
    memory_gib: int


@dataclass(frozen=True)
class Demand:
    """What a stage runs on.

    Attributes:
        groups: the one with GPUs first, if there is one.
        driver_gpus: GPUs of the driver itself, which then runs on a machine with GPUs and not on
            the head: an evaluation's without workers.
    """

    stage: Stage
    groups: tuple[Group, ...]
    driver_gpus: int = 0

    @property
    def has_gpus(self) -> bool:
        """Whether the first group's machines have GPUs."""
        return self.groups[0].gpus > 0


def demand(recipe: Recipe, values: Values, stage: Stage) -> Demand:
    """The machines of a stage.

    Raises:
        ValueError: recipe and machines don't go together; the message says what would.
    """
    if stage == "embed":
        fewest, most = recipe.embed.encoders
        share = recipe.embed.gpus_per_encoder
        if share:
            gpus = _gpu_group(values, math.ceil(fewest * share), math.ceil(most * share))
            return Demand(stage, (gpus, _cpu_group(values)))
        return Demand(stage, (_cpu_group(values, fewest, most, 1.0, "embed.encoders"),))
    if stage == "evaluate":
        return _evaluation(recipe, values)
    return Demand(stage, _training_groups(recipe, values))


def _evaluation(recipe: Recipe, values: Values) -> Demand:
    """Encoders of `evaluation.prompt_set` come first, and have ended when pictures are drawn.

    A driver that draws by itself has its GPU from the start, beside theirs.
    """
    workers, runtime = recipe.evaluation_workers, recipe.runtime
    encoders = (0, 0) if recipe.evaluation.prompt_set is None else recipe.embed.encoders
    share = recipe.embed.gpus_per_encoder
    gpus = [math.ceil(count * share) for count in encoders]
    driver = int(runtime.use_gpu and not workers)
    if runtime.use_gpu:
        gpus = [max(workers, driver + count) for count in gpus]
    cpus = []
    if encoders[1] and not share:
        cpus.append(_cpu_group(values, encoders[0], encoders[1], 1.0, "embed.encoders"))
    if workers and not runtime.use_gpu:
        each = runtime.cpus_per_worker
        cpus.append(_cpu_group(values, workers, workers, each, "evaluation.workers"))
    groups = [_larger(cpus) if cpus else _cpu_group(values)]
    if gpus[1]:
        groups.insert(0, _gpu_group(values, gpus[0], gpus[1]))
    return Demand("evaluate", tuple(groups), driver_gpus=driver)


def _larger(groups: Sequence[Group]) -> Group:
    """As many machines as each of these groups of one kind needs."""
    fewest, most = (max(getattr(group, end) for group in groups) for end in ("fewest", "most"))
    return replace(groups[0], fewest=fewest, most=most)


def _training_groups(recipe: Recipe, values: Values) -> tuple[Group, ...]:
    runtime, embed = recipe.runtime, recipe.embed
    fewest, most = runtime.worker_range
    if not runtime.use_gpu:
        each = runtime.cpus_per_worker
        return (_cpu_group(values, fewest, most, each, "runtime.num_workers"),)
    encoders = math.ceil(embed.encoders[1] * embed.gpus_per_encoder)
    beside = encoders if embed.mode == "online" else 0
    group = _gpu_group(values, fewest + beside, most + beside)
    if not beside and most % group.gpus:
        lower, upper = most // group.gpus * group.gpus, -(-most // group.gpus) * group.gpus
        raise ValueError(
            f"runtime.num_workers = {runtime.num_workers} takes {most} GPUs and machines have "
            f"{group.gpus} (gpu_machines.gpus): {upper - most} would be paid for and idle; use "
            f"{lower} or {upper} workers"
        )
    asked = math.ceil(runtime.cpus_per_worker * group.gpus)
    if asked > group.cpus:
        raise ValueError(
            f"runtime.cpus_per_worker = {runtime.cpus_per_worker:g} for {group.gpus} workers takes "
            f"{asked} CPUs of a machine with {group.cpus} (gpu_machines.cpus); use at most "
            f"{group.cpus / group.gpus:g}"
        )
    return group, _cpu_group(values)


def _gpu_group(values: Values, fewest: int, most: int) -> Group:
    machine = values.gpu_machines
    if machine is None:
        raise ValueError(
            f"the recipe needs {most} GPU(s), and the values have no gpu_machines; add them, or "
            "use a recipe without GPUs"
        )
    gpus = min(machine.gpus, most)
    cpus, memory = machine.cpus * gpus // machine.gpus, machine.memory_gib * gpus // machine.gpus
    count = [-(-number // gpus) for number in (fewest, most)]
    return Group(_GPU_GROUP, count[0], count[1], gpus, max(cpus, 1), max(memory, 1))


def _cpu_group(
    values: Values, fewest: int = 0, most: int = 0, cpus_each: float = 1.0, key: str = ""
) -> Group:
    """Machines without GPUs, with room for `most` processes of `cpus_each` if there are any."""
    machine = values.cpu_machines
    count = 0, machine.most
    if most:
        each = int(machine.cpus // cpus_each)
        count = (-(-fewest // each), -(-most // each)) if each else (machine.most + 1,) * 2
        if count[1] > machine.most:
            raise ValueError(
                f"{key} asks for {most} processes of {cpus_each:g} CPUs; cpu_machines gives at "
                f"most {machine.most} machines of {machine.cpus} CPUs, room for "
                f"{machine.most * each}; raise cpu_machines.most, or ask for fewer"
            )
    return Group(_CPU_GROUP, count[0], count[1], 0, machine.cpus, machine.memory_gib)


def job_name(recipe: Recipe, values: Values, stage: str) -> str:
    """The name of a stage's job, valid as a Kubernetes name.

    Raises:
        ValueError: the recipe's name can't be one; `run_name` then gives another.
    """
    run = values.run_name or re.sub(r"[._]", "-", recipe.name)
    name = f"{run}-{stage}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"{name!r} can't be a job's name: expected at most {_LONGEST_NAME} characters of a-z, "
            "0-9 and -, a letter first; set run_name in the values"
        )
    return name


def local_places(recipe: Recipe) -> dict[str, str]:
    """What the recipe names that is a path and no URI: key -> path."""
    places = {
        "run_dir": recipe.run_dir,
        "model.path": recipe.model.path,
        "model.vae": recipe.model.vae,
        "training.init_from": recipe.training.init_from,
        "model.lora.path": None if recipe.model.lora is None else recipe.model.lora.path,
        "encoder.path": recipe.encoder.model_dump().get("path"),
        "embed.prompts": recipe.embed.prompts,
        "embed.store": recipe.embed.store,
        "evaluation.prompt_list": recipe.evaluation.prompt_list,
        "evaluation.references": recipe.evaluation.references,
        "evaluation.prompt_set.path": getattr(recipe.evaluation.prompt_set, "path", None),
        **recipe.evaluation.network_places,
        **recipe.evaluation.other_places,
    }
    return {
        key: place for key, place in places.items() if place and storage.scheme(place) == "file"
    }


def require_tracking_elsewhere(recipe: Recipe) -> None:
    """A run on object storage can't keep MLflow's default database in its folder.

    Raises:
        ValueError: says what to name.
    """
    if recipe.tracking.uri is None and storage.on_objects(recipe.run_dir):
        raise ValueError(
            "tracking.uri is empty, and the default (SQLite in the run's folder) can't be in an "
            "object store; name an MLflow server: tracking.uri = https://…"
        )


def require_reachable(recipe: Recipe, shared_folder: str | None) -> None:
    """All of the recipe's places are reached from every machine.

    Args:
        shared_folder: path under which all machines see the same files; None: there is none.

    Raises:
        ValueError: names the keys that aren't.
    """
    local = local_places(recipe)
    if shared_folder is not None:
        inside = f"{shared_folder.rstrip('/')}/"
        local = {key: place for key, place in local.items() if not _is_inside(place, inside)}
    if local:
        told = ", ".join(f"{key} = {place}" for key, place in local.items())
        where = "the values name no shared folder" if shared_folder is None else shared_folder
        raise ValueError(
            f"these places are on one machine only, {told} ({where}); use s3://, gs://, "
            "abfs://, hf:// or package://, or a folder that all machines share"
        )
    require_tracking_elsewhere(recipe)
    if (recipe.tracking.uri or "").startswith("sqlite:"):
        raise ValueError(
            f"tracking.uri = {recipe.tracking.uri} is a file on one machine, which ends with the "
            "job; name an MLflow server: tracking.uri = https://…"
        )


def _is_inside(place: str, folder: str) -> bool:
    """Whether a local place, relative to `folder` (which ends in ``/``) or absolute, lies in it."""
    path = posixpath.normpath(posixpath.join(folder, place.removeprefix("file://")))
    return path.startswith(folder)
