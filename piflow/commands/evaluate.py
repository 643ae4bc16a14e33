"""checkpoint -> metrics, picture grid and one HTML report, all logged to the run in MLflow."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from piflow.config import Recipe

if TYPE_CHECKING:
    from piflow.evaluation.compare import Evaluation

GRID_PROMPTS = 8  # rows of the picture grid
NUM_METHODS = 4  # the teacher at three step counts, the student


def main(
    recipe: Recipe, *, checkpoint: str | None = None, show_progress: bool = True
) -> Evaluation:
    """Measure a checkpoint's EMA student against its teacher.

    Returns:
        All figures and pictures.

    Raises:
        ValueError: no run, checkpoint or store, or they don't fit the recipe.
    """
    import torch

    from piflow.commands import embed
    from piflow.evaluation.compare import evaluate
    from piflow.runs import folder as run_folder
    from piflow.runs.tracking import MlflowTracker
    from piflow.training.export import student_of_checkpoint
    from piflow.training.preflight import preflight

    record = run_folder.require_run(recipe)
    checkpoint = checkpoint or run_folder.newest_checkpoint(recipe.run_dir)
    if recipe.embed.mode == "online":
        embed.prepare_online(recipe, evaluation=True, show_progress=show_progress)
    found = preflight(recipe, evaluation=True)
    store = found.store
    trio, state = student_of_checkpoint(recipe, checkpoint, "ema")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for module in trio.modules:
        module.to(device)
    with _progress(recipe, show_progress) as advance:
        result = evaluate(recipe, trio, store, device, retrieve=found.retrieval, advance=advance)
    folder = _write_report(recipe, result, record.mlflow_run_id, store.manifest_hash, state.step)
    tracker = MlflowTracker(record.tracking_uri, record.mlflow_run_id, recipe.run_dir)
    tracker.log_summary(summary(result), step=state.step)
    tracker.log_artifact(folder, "evaluation")
    if problem := tracker.close():
        print(f"not yet in MLflow: {problem}. It is kept in the run's folder for the next command")
    print(f"report written to {folder / 'report.html'}")
    return result


def summary(result: Evaluation) -> dict[str, float]:
    """The figures as MLflow metrics, e.g. `eval/student_4_nfe/psnr`."""
    values = {
        "eval/psnr_gain_db": result.psnr_gain.value,
        "eval/diversity_ratio": result.diversity_ratio.value,
    }
    for method in result.methods:
        key = "eval/" + method.name.lower().replace(",", "").replace(" ", "_")
        figures = {
            "psnr_db": method.psnr,
            "diversity": method.diversity,
            "retrieval_at_1": method.retrieval_at_1,
            "seconds": method.seconds,
        }
        values |= {f"{key}/{name}": value for name, value in figures.items() if value is not None}
    return values


@contextmanager
def _progress(recipe: Recipe, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar over the pictures of all methods."""
    from rich.progress import Progress

    config = recipe.evaluation
    with Progress(disable=not show) as bar:
        total = config.prompts * config.seeds * NUM_METHODS
        task = bar.add_task(f"{recipe.name}: pictures", total=total)
        yield lambda done: bar.update(task, advance=done)


def _write_report(
    recipe: Recipe, result: Evaluation, run_id: str, manifest_hash: str, step: int
) -> Path:
    """Write report.html and grid.png to a local folder: RUN_DIR/evaluation."""
    import torch

    from piflow import storage
    from piflow.evaluation.report import EvaluationReport, Lineage, render_html
    from piflow.evaluation.sheet import grid, png_bytes

    prompts = result.prompts[:GRID_PROMPTS]
    columns = [pictures[: len(prompts), 0] for pictures in result.pictures.values()]
    rows = list(torch.stack(columns, dim=1))
    picture = png_bytes(grid(rows, prompts, list(result.pictures)))
    packages = ("piflow", "torch", "diffusers", "peft", "ray", "mlflow")
    report = EvaluationReport(
        title=f"{recipe.name}: few-step student against its teacher",
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        prompts=len(result.prompts),
        seeds=recipe.evaluation.seeds,
        methods=result.methods,
        psnr_gain=result.psnr_gain,
        diversity_ratio=result.diversity_ratio,
        lineage=Lineage(
            run_id=run_id,
            recipe_hash=recipe.hash(),
            manifest_hash=manifest_hash,
            checkpoint_step=step,
            versions={"python": platform.python_version()} | {p: version(p) for p in packages},
        ),
        grid_png=picture,
        grid_caption="Every row starts from one noise; seeds were not seen in training.",
        prompt_results=result.per_prompt,
        recipe_yaml=recipe.to_yaml(),
    )
    local = storage.scheme(recipe.run_dir) == "file"
    folder = Path(storage.absolute(recipe.run_dir) if local else tempfile.mkdtemp()) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(render_html(report))
    (folder / "grid.png").write_bytes(picture)
    return folder
