"""An alias of the model registry that moves to a version if the recipe's gates hold, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from piflow.config import Recipe
from piflow.config.metrics import FIGURES, figures_over, metric_of

if TYPE_CHECKING:
    from piflow.evaluation.figures import Figures
    from piflow.evaluation.gating import Verdict
    from piflow.evaluation.metrics import Interval
    from piflow.runs.promotion import Registry, Version


def main(
    recipe: Recipe,
    *,
    version: int | None = None,
    alias: str = "champion",
    dry_run: bool = False,
    force: bool = False,
) -> int:
    """Move the alias to a version of the recipe's, if its gates hold.

    Args:
        version: default: the newest one of this recipe.
        dry_run: only say what would be done.
        force: move it in any case; the version's tags keep that and what spoke against it.

    Returns:
        The version's number.

    Raises:
        ValueError: a gate doesn't hold, and by how much; no such version, or one without figures.
        ConnectionError: the MLflow server is away.
    """
    from piflow.evaluation.gating import judge

    recipe.distillation()
    registry = _registry(recipe, alias)
    champion = registry.holder()
    chosen = _chosen(recipe, registry.name, registry.versions(), version)
    if champion is not None and champion.number == chosen.number:
        print(f"version {chosen.number} of {registry.name} is {alias} already; nothing to do")
        return chosen.number
    gates = recipe.registry.parsed()
    measured: dict[str, Interval | str] = {}
    try:
        if gates:
            measured = _measured(recipe, registry, chosen, champion)
    except ValueError as error:
        if not force:
            raise
        measured = dict.fromkeys(FIGURES, str(error))
    verdicts = judge(gates, measured)
    compared = "no version has it yet" if champion is None else f"version {champion.number} has it"
    lines = [
        f"{registry.name}: version {chosen.number} ({chosen.checkpoint}) for {alias}; {compared}",
        *_lines(verdicts),
    ]
    print("\n".join(lines), flush=True)
    failed = [verdict for verdict in verdicts if not verdict.holds]
    if failed and not force:
        told = "; ".join(f"{item.gate.text}: {item.told}" for item in failed)
        raise ValueError(
            f"{len(failed)} of {len(verdicts)} gates don't hold, {alias} stays where it is: {told}"
        )
    if dry_run:
        print(f"dry run: {alias} would move to version {chosen.number}")
        return chosen.number
    registry.promote(chosen, champion, why="\n".join(lines), forced=bool(failed))
    print(f"{alias} is version {chosen.number} of {registry.name} now")
    return chosen.number


def roll_back(recipe: Recipe, *, alias: str = "champion") -> int:
    """Move the alias back to the version that had it before.

    Returns:
        That version's number.

    Raises:
        ValueError: no version has the alias, or none had it before.
        ConnectionError: the MLflow server is away.
    """
    registry = _registry(recipe, alias)
    left, target = registry.roll_back()
    print(f"{alias} of {registry.name} went back from version {left} to version {target}")
    return target


def _registry(recipe: Recipe, alias: str) -> Registry:
    """The recipe's registered model, on the server that its run is logged to."""
    from piflow.runs import folder as run_folder
    from piflow.runs.promotion import Registry
    from piflow.runs.tracking import deliver_kept, place_of

    record = run_folder.require_same_recipe(recipe)
    if record is None and recipe.tracking.uri is None:
        record = run_folder.require_run(recipe)  # which says what to do
    uri = place_of(recipe, record)
    if record is not None:
        deliver_kept(uri, record.mlflow_run_id, recipe.run_dir)
    return Registry(uri, recipe.tracking.model_name or recipe.name, alias)


def _chosen(recipe: Recipe, name: str, versions: Sequence[Version], number: int | None) -> Version:
    """The version with that number, or the newest one of the recipe.

    Raises:
        ValueError: there is none; it is of another recipe, holds weights that are never evaluated,
            or isn't ready.
    """
    from piflow.runs.promotion import RECIPE_TAG, WEIGHTS_TAG

    own = [item for item in versions if recipe.is_run_of(item.tags.get(RECIPE_TAG, ""))]
    if number is None:
        if not own:
            raise ValueError(
                f"no version of {name} is of this recipe ({recipe.hash()}): `piflow export` makes "
                "one"
            )
        chosen = own[0]
    else:
        found = [item for item in versions if item.number == number]
        if not found:
            known = ", ".join(str(item.number) for item in versions[:10]) or "none"
            raise ValueError(f"{name} has no version {number}; the newest are {known}")
        chosen = found[0]
        if chosen not in own:
            raise ValueError(
                f"version {number} of {name} is of another recipe, which has gates of its own: "
                "promote it with that recipe"
            )
    if not chosen.is_ready:
        raise ValueError(f"version {chosen.number} of {name} isn't ready: export it again")
    if chosen.tags.get(WEIGHTS_TAG) != "ema":
        raise ValueError(
            f"version {chosen.number} of {name} doesn't hold the averaged weights, which alone are "
            "evaluated: use one that was exported with --weights ema"
        )
    return chosen


def _measured(
    recipe: Recipe, registry: Registry, chosen: Version, champion: Version | None
) -> dict[str, Interval | str]:
    """The figures of a version, and against the present champion; or why there are none.

    Raises:
        ValueError: the version's checkpoint wasn't evaluated.
    """
    from piflow import storage
    from piflow.evaluation.figures import alone, not_over, over
    from piflow.runs.folder import CHECKPOINTS
    from piflow.runs.promotion import WEIGHTS_TAG

    figures = _figures(registry, chosen)
    if figures is None:
        checkpoint = storage.join(recipe.run_dir, CHECKPOINTS, chosen.checkpoint)
        raise ValueError(
            f"version {chosen.number} of {registry.name} wasn't evaluated: run `piflow evaluate` "
            f"with --checkpoint {checkpoint}, then this again"
        )
    absent = {
        name: f"{metric_of(name)} wasn't measured when it was evaluated: evaluate again with it"
        for name in figures_over(champion=False)
    }
    measured: dict[str, Interval | str] = {**absent, **alone(figures)}
    if champion is None:
        return measured
    try:
        of_champion = _figures(registry, champion)
        if of_champion is None or champion.tags.get(WEIGHTS_TAG) != "ema":
            raise ValueError(
                f"version {champion.number}, which has {registry.alias}, has no figures: run "
                "`piflow evaluate` for its checkpoint"
            )
        return {**measured, **not_over(figures, of_champion), **over(figures, of_champion)}
    except ValueError as error:
        return {**measured, **dict.fromkeys(figures_over(champion=True), str(error))}


def _figures(registry: Registry, version: Version) -> Figures | None:
    """Those of a version's checkpoint.

    Raises:
        ValueError: they can't be read, or are of another checkpoint of the same name.
    """
    from piflow.evaluation.figures import read_figures
    from piflow.runs.promotion import CHECKPOINT_SHA_TAG

    content = registry.figures(version)
    if content is None:
        return None
    figures = read_figures(content, f"the figures of version {version.number}")
    if version.tags.get(CHECKPOINT_SHA_TAG, figures.checkpoint) != figures.checkpoint:
        raise ValueError(
            f"version {version.number} was exported from another {version.checkpoint} than the one "
            "that was evaluated: evaluate it again"
        )
    return figures


def _lines(verdicts: Sequence[Verdict]) -> list[str]:
    return [
        f"  {'holds' if item.holds else 'FAILS'}  {item.gate.text}: {item.told}"
        for item in verdicts
    ]
