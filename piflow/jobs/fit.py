"""Whether a recipe fits a cluster's machines, and which change of it would make it fit.

What Ray will be asked for (placement) and what the memory estimate says of GPUs. Changes are tried
in the order of what they cost: none of them changes what a run learns, some make it slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piflow.config import Recipe, RecipeError, parse_recipe
from piflow.jobs.submission import Stage
from piflow.planning.choices import SAVINGS
from piflow.planning.memory import GIB, SAFE_SHARE
from piflow.planning.plan import placed
from piflow.runtime.job_server import Node
from piflow.training.placement import measure

Bundle = Mapping[str, float]
WorkerGib = Callable[[Recipe], float]
"""What a worker of a recipe takes of a GPU's memory."""


class DoesNotFitError(ValueError):
    """The cluster has no room for the job, and none will come; the message says what would help."""


@dataclass(frozen=True)
class Ask:
    """What a stage asks of the cluster at once.

    Attributes:
        who: for messages.
        keys: the recipe's, that say so.
        bundles: each of which one machine must have.
    """

    who: str
    keys: str
    bundles: tuple[Bundle, ...]


def require_fit(
    recipe: Recipe, stages: Sequence[Stage], nodes: Sequence[Node], worker_gib: WorkerGib | None
) -> None:
    """Make sure that the machines have room for every stage, if nothing else runs on them.

    Args:
        worker_gib: None: the model can't be seen from here, nor GPUs' memory be checked.

    Raises:
        DoesNotFitError: they haven't; says what is asked, what there is, and the cheapest change.
    """
    problem = misfit(recipe, stages, nodes, worker_gib)
    if problem is None:
        return
    for keys in changes(recipe):
        try:
            changed = parse_recipe(_with(recipe.model_dump(mode="json"), keys))
        except RecipeError:
            continue
        if misfit(changed, stages, nodes, worker_gib) is None:
            options = " ".join(f"--set {key}={_written(value)}" for key, value in keys.items())
            raise DoesNotFitError(f"{problem}. It fits with {options}")
    raise DoesNotFitError(
        f"{problem}. No change of the recipe's runtime section makes it fit: add machines (and "
        "--wait-for-nodes, if they join after the job), or use another cluster"
    )


def misfit(
    recipe: Recipe, stages: Sequence[Stage], nodes: Sequence[Node], worker_gib: WorkerGib | None
) -> str | None:
    """Why a recipe has no room; None: it has."""
    for stage in stages:
        for ask in _asks(recipe, stage):
            if not _placed(ask.bundles, nodes):
                told = _told(ask.bundles)
                return f"{ask.who} need {told} ({ask.keys}); the cluster has {there(nodes)}"
    training = any(stage in ("distill", "pretrain") for stage in stages)
    if worker_gib is None or not training or not recipe.runtime.use_gpu:
        return None
    known = [node for node in nodes if node.gpus and node.gpu_gib is not None]
    if not known:
        return None
    smallest = min(known, key=lambda node: node.gpu_gib or 0.0)
    needed, free = worker_gib(recipe), SAFE_SHARE * (smallest.gpu_gib or 0.0)
    if needed <= free:
        return None
    return (
        f"a worker takes about {needed:.1f} GiB of GPU memory (`piflow check` says of what), and "
        f"{smallest.name}'s {smallest.gpu_kind} has {smallest.gpu_gib:.0f} GiB, of which "
        f"{free:.0f} are counted on"
    )


def there(nodes: Sequence[Node]) -> str:
    """The machines, equal ones together: ``2 x {CPU: 8, GPU: 1 (H100)}``."""
    texts = []
    for node in nodes:
        kind = f" ({node.gpu_kind})" if node.gpu_kind else ""
        gpus = f", GPU: {node.gpus:g}{kind}" if node.gpus else ""
        texts.append(f"{{CPU: {node.cpus:g}{gpus}}}")
    return ", ".join(f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts)) or "none"


def changes(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Keys and values that may help, the cheapest first."""
    runtime = recipe.runtime
    fewest, most = runtime.worker_range
    for cpus in (runtime.cpus_per_worker / 2, 1.0):
        if cpus < runtime.cpus_per_worker:
            yield {"runtime.cpus_per_worker": max(1.0, cpus)}
    for share in (0.5, 0.25, 0.0):
        if share < recipe.embed.gpus_per_encoder:
            yield {"embed.gpus_per_encoder": share}
    for count in range(fewest - 1, 0, -1):
        yield {"runtime.num_workers": count}
    savings = [{f"runtime.{key}": value for key, value in keys.items()} for keys in SAVINGS]
    yield from savings
    for count in range(most + 1, 4 * most + 1):
        yield {"runtime.num_workers": count}
    for count in range(fewest - 1, 0, -1):
        for saving in savings:
            yield {"runtime.num_workers": count, **saving}


def _asks(recipe: Recipe, stage: Stage) -> Iterator[Ask]:
    """What the stage's own code waits for, one after the other (`piflow.data.cluster`)."""
    embed, runtime = recipe.embed, recipe.runtime
    encoder = {"CPU": 1.0, "GPU": embed.gpus_per_encoder}
    worker = {"CPU": runtime.cpus_per_worker, "GPU": 1.0 if runtime.use_gpu else 0.0}
    if stage == "embed":
        yield Ask("embed's encoders", "embed.gpus_per_encoder", (encoder,))
    elif stage in ("distill", "pretrain"):
        bundles = (worker,) * runtime.worker_range[0]
        keys = "runtime.num_workers, use_gpu, cpus_per_worker"
        if embed.mode == "online":
            bundles += (encoder,) * embed.encoders[0]
            keys = f"{keys}, embed.encoders, gpus_per_encoder"
            yield Ask("workers and encoders", keys, bundles)
        else:
            yield Ask("the workers", keys, bundles)
    elif stage == "evaluate":
        if recipe.evaluation.prompt_set is not None:
            keys = "evaluation.prompt_set, embed.gpus_per_encoder"
            yield Ask("the encoders of an evaluation's prompts", keys, (encoder,))
        if recipe.evaluation_workers:
            keys = "evaluation.workers, runtime.use_gpu, cpus_per_worker"
            yield Ask("an evaluation's workers", keys, (worker,) * recipe.evaluation_workers)


def _placed(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> bool:
    """Whether every bundle finds a machine, the largest first."""
    free = [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes]
    for bundle in sorted(bundles, key=lambda b: (b["GPU"], b["CPU"]), reverse=True):
        fitting = [room for room in free if all(room[name] >= bundle[name] for name in bundle)]
        if not fitting:
            return False
        # what needs no GPU leaves machines that have some to what does
        room = min(fitting, key=lambda room: (room["GPU"], room["CPU"]))
        for name, amount in bundle.items():
            room[name] -= amount
    return True


class Estimate:
    """`WorkerGib` as `piflow plan` counts it; the model is counted once for each kind of passes."""

    def __init__(self) -> None:
        self._counted: dict[str, Any] = {}

    def __call__(self, recipe: Recipe) -> float:
        """With as many workers as the recipe has at least."""
        kind = recipe.runtime.activation_checkpointing
        if kind not in self._counted:
            self._counted[kind] = measure(recipe)
        model, passes = self._counted[kind]
        workers = recipe.runtime.worker_range[0]
        _, memory, _ = placed(recipe, model, passes, workers, free=0)  # auto: at least shards fit
        return memory.total / GIB


def _told(bundles: Sequence[Bundle]) -> str:
    texts = []
    for bundle in bundles:
        amounts = ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items() if amount)
        texts.append(f"{{{amounts}}}")
    return " and ".join(f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts))


def _with(tree: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with other values."""
    for key, value in keys.items():
        section, name = key.split(".")
        tree[section] = {**tree[section], name: value}
    return tree


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
