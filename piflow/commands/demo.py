"""The whole pipeline on one recipe: embed, distill, evaluate, export, sample; then one table."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from piflow.config import Recipe

if TYPE_CHECKING:
    from piflow.evaluation.compare import Evaluation

SAMPLE_PROMPTS = ["red heart", "pizza", "ghost", "sunflower"]
Result = TypeVar("Result")


def main(recipe: Recipe, *, show_progress: bool = True) -> Evaluation:
    """Run all parts on one Ray instance and print what came out.

    Parts that are done already (a finished store, a finished run) are not done again.
    """
    from piflow import storage
    from piflow.commands import distill, embed, evaluate, export, sample
    from piflow.inference.settings import places_of
    from piflow.runtime.session import ray_session

    seconds: dict[str, float] = {}

    def timed(name: str, part: Callable[[], Result]) -> Result:
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        result = part()
        seconds[name] = time.perf_counter() - began
        return result

    with ray_session(recipe):
        timed("embed", lambda: embed.main(recipe, show_progress=show_progress))
        timed("distill", lambda: distill.main(recipe, show_progress=show_progress))
    result = timed("evaluate", lambda: evaluate.main(recipe, show_progress=show_progress))
    folder, version = timed("export", lambda: export.main(recipe))
    pictures = Path(storage.absolute(recipe.run_dir)) / "samples"
    timed(
        "sample",
        lambda: sample.main(
            folder,
            SAMPLE_PROMPTS,
            out=str(pictures),
            choices=sample.Choices(allowed=places_of(recipe)),
            show_progress=show_progress,
        ),
    )
    _print_summary(recipe, result, seconds, folder, version, pictures)
    return result


def _print_summary(
    recipe: Recipe,
    result: Evaluation,
    seconds: dict[str, float],
    adapter: str,
    version: str,
    pictures: Path,
) -> None:
    from rich.table import Table

    from piflow.evaluation.report import headline
    from piflow.progress import PlainConsole
    from piflow.runs import folder as run_folder

    table = Table(title=f"{recipe.name}: {len(result.prompts)} prompts, held-out seeds")
    headings, rows = headline(result.methods)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(*row)
    gain, ratio = result.psnr_gain, result.diversity_ratio
    console = PlainConsole()
    if not console.is_terminal:
        console = PlainConsole(width=110)  # a log file has no width of its own
    console.print()
    console.print(table)
    console.print(
        f"student over teacher at equal steps: {gain.value:+.2f} dB "
        f"(95 % interval {gain.low:+.2f} to {gain.high:+.2f}); diversity ratio {ratio.value:.3f} "
        f"({ratio.low:.3f} to {ratio.high:.3f})"
    )
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(f"wall time: {times}; together {sum(seconds.values()) / 60:.1f} min")
    record = run_folder.require_run(recipe)
    console.print(f"report:   {pictures.parent / 'evaluation' / 'report.html'}", soft_wrap=True)
    console.print(f"adapter:  {adapter} (MLflow model version {version})", soft_wrap=True)
    console.print(f"pictures: {pictures}", soft_wrap=True)
    console.print(
        f"MLflow:   .venv/bin/mlflow ui --backend-store-uri {record.tracking_uri}", soft_wrap=True
    )
