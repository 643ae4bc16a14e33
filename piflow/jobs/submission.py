"""A recipe as one submitted job: its stages, its command, its name, and what it needs there."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

from piflow import storage
from piflow.config import BUILT_IN, Recipe
from piflow.jobs.arrival import ARRIVED as ARRIVED
from piflow.jobs.demand import local_places, require_tracking_elsewhere
from piflow.jobs.package import ARRIVAL, RECIPE
from piflow.runtime.exits import ExitCode

Stage = Literal["embed", "pretrain", "distill", "evaluate", "export"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_DISTILLATION: tuple[Stage, ...] = ("embed", "distill", "evaluate", "export")
_PRETRAINING: tuple[Stage, ...] = ("embed", "pretrain")
_TAKEN_ALONG = (
    "embed.prompts",
    "evaluation.prompt_list",
    "evaluation.prompt_set.path",
)  # by `package`, if they are relative
_LONGEST_NAME = 40
_CLIENTS = {
    "s3": "boto3=piflow[s3]",
    "gs": "google.cloud.storage=piflow[gcs]",
    "abfs": "azure.storage.blob=piflow[azure]",
}

RUN, NAME, STAGES_KEY, CONTENT = "piflow.run", "piflow.name", "piflow.stages", "piflow.content"
"""Keys of a job's metadata, which everybody who reaches the dashboard may read."""


def stages_of(recipe: Recipe, asked: str | None = None) -> tuple[Stage, ...]:
    """The stages to run, in their order.

    Args:
        asked: names with commas between; default: all that the recipe needs.

    Raises:
        ValueError: a name is none, or the recipe has no such stage.
    """
    possible = _DISTILLATION if recipe.objective.type == "pi_id" else _PRETRAINING
    if recipe.embed.mode == "online":
        possible = tuple(stage for stage in possible if stage != "embed")
    if asked is None:
        return possible
    names = [name.strip() for name in asked.split(",") if name.strip()]
    wrong = [name for name in names if name not in possible]
    if wrong or not names:
        raise ValueError(
            f"--stages {asked}: expected some of {','.join(possible)} for this recipe (objective."
            f"type = {recipe.objective.type}, embed.mode = {recipe.embed.mode})"
        )
    return tuple(stage for stage in possible if stage in names)


def run_key(recipe: Recipe) -> str:
    """The same for every job of a run, another one for every other run."""
    identity = f"{recipe.hash()} {recipe.run_dir}"
    return f"{recipe.name[:_LONGEST_NAME]}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def command(recipe: Recipe, stages: Sequence[Stage], version: str) -> str:
    """The shell command of the job, in its package's folder; a failed stage ends it.

    SIGTERM reaches the shell and the stage. The shell waits for the stage, which saves, and starts
    no other: were it gone at once, nobody might reap the stage, and Ray, for which a zombie runs
    on, would wait for it until the job's grace is over.
    """
    modules = [part for need in needs(recipe, stages) for part in ("--module", need)]
    first = ["python", ARRIVAL, "--piflow", version, *modules]
    each = [["piflow", stage, RECIPE] for stage in stages]
    stages_in_turn = " && ".join(shlex.join(words) for words in [first, *each])
    return f"trap 'exit {ExitCode.TERMINATED:d}' TERM; {stages_in_turn}"


def needs(recipe: Recipe, stages: Sequence[Stage]) -> list[str]:
    """Modules that not every image has, as `arrival` takes them."""
    places = [recipe.run_dir, recipe.model.path, recipe.embed.store, recipe.embed.prompts]
    wanted = {
        "mlflow=piflow[mlflow]": any(stage != "embed" for stage in stages),
        **{
            need: any(storage.scheme(place) == kind for place in places)
            for kind, need in _CLIENTS.items()
        },
        "deepspeed=piflow[deepspeed]": recipe.runtime.uses_deepspeed,
        "torchao=piflow[lowbit]": "8bit" in recipe.training.optimizer.type,
        "emoji=piflow[demo]": "evaluate" in stages and recipe.evaluation.retrieval,
        "torchmetrics=piflow[metrics]": "evaluate" in stages and recipe.evaluation.compares_sets,
    }
    own = re.split(r"[.:]", recipe.model.family)[0]
    is_module = recipe.model.family not in BUILT_IN and find_spec(own) is not None
    return [need for need, is_wanted in wanted.items() if is_wanted] + [f"{own}="] * is_module


def require_drawing_on_workers(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """An evaluation of a recipe for GPUs may not draw in the job's driver, which has none.

    Raises:
        ValueError: it would.
    """
    if "evaluate" in stages and recipe.runtime.use_gpu and not recipe.evaluation_workers:
        raise ValueError(
            "evaluation.workers is 0: the evaluation would draw in the job's driver, which runs on "
            "the head and holds no GPU. Leave the key out (as many workers as the training starts "
            "with) or give a number, such as --set evaluation.workers=1"
        )


def require_places(recipe: Recipe) -> None:
    """What the job keeps or reads must be reached from other machines, under the same name.

    Prompts may be a relative path: `package` takes them along.

    Raises:
        ValueError: names the keys that aren't, and what to write.
    """
    wrong = [
        f"{key} = {place}"
        for key, place in local_places(recipe).items()
        if key not in _TAKEN_ALONG and not os.path.isabs(place)
    ]
    if wrong:
        raise ValueError(
            f"these places are on this machine only, {', '.join(wrong)}: write s3://…, or an "
            "absolute path on a disk that all machines of the cluster share (--set "
            f"{wrong[0].partition(' ')[0]}=/shared/…)"
        )
    require_tracking_elsewhere(recipe)
