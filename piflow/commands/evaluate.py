"""checkpoint -> metrics, picture grid and one HTML report, all logged to the run in MLflow.

RUN_DIR/evaluation/  report.html, grid.jpg, pictures/ (every picture that was drawn)
"""

from __future__ import annotations

import platform
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

from piflow.config import Recipe

if TYPE_CHECKING:
    from piflow.evaluation.compare import Evaluation
    from piflow.evaluation.drawing import Drawing, Plan
    from piflow.training.preflight import Run

GRID_PROMPTS = 8  # rows of the picture grid
FOLDER = "evaluation"  # in the run's
PICTURES = "pictures"  # in that


def main(
    recipe: Recipe, *, checkpoint: str | None = None, show_progress: bool = True
) -> Evaluation:
    """Measure a checkpoint's EMA student against its teacher.

    Returns:
        All figures and pictures.

    Raises:
        ValueError: no run, checkpoint or store, or they don't fit the recipe.
    """
    from piflow import storage
    from piflow.commands import embed
    from piflow.evaluation.compare import measure
    from piflow.evaluation.drawing import Drawing, Plan
    from piflow.runs import folder as run_folder
    from piflow.runs.tracking import MlflowTracker
    from piflow.training.checkpoint import STATE_FILE, read_state, require_same_run
    from piflow.training.preflight import preflight

    record = run_folder.require_run(recipe)
    checkpoint = checkpoint or run_folder.newest_checkpoint(recipe.run_dir)
    if recipe.embed.mode == "online":
        embed.prepare_online(recipe, evaluation=True, show_progress=show_progress)
    found = preflight(recipe, evaluation=True)
    store = found.store
    state = read_state(checkpoint)
    require_same_run(state, recipe, store.manifest_hash, checkpoint)
    folder = storage.join(recipe.run_dir, FOLDER)
    digest = storage.sha256(storage.join(checkpoint, STATE_FILE))
    plan = Plan.of(recipe, store, storage.join(folder, PICTURES), digest)
    drawing = Drawing(recipe, plan, store)
    if drawing.num_missing():
        _draw(recipe, found, plan, drawing, checkpoint, show_progress)
    result = measure(drawing, retrieve=found.retrieval)
    files = _write_report(recipe, result, record.mlflow_run_id, store.manifest_hash, state.step)
    tracker = MlflowTracker(record.tracking_uri, record.mlflow_run_id, recipe.run_dir)
    tracker.log_summary(summary(result), step=state.step)
    for name in files:
        tracker.log_artifact(f"{FOLDER}/{name}")
    if problem := tracker.close():
        print(f"not yet in MLflow: {problem}. It is kept in the run's folder for the next command")
    print(f"report written to {storage.join(folder, 'report.html')}")
    return result


def _draw(
    recipe: Recipe, found: Run, plan: Plan, drawing: Drawing, checkpoint: str, show_progress: bool
) -> None:
    """Draw what is missing: on workers, or in this process on a GPU if there is one."""
    if recipe.evaluation_workers:
        from piflow.runtime.evaluating import draw_on_workers

        draw_on_workers(found, plan, checkpoint, drawing.total, show_progress=show_progress)
        return
    from piflow.inference.drawing import choose_device
    from piflow.progress import progress
    from piflow.sharding.single import SingleStrategy
    from piflow.training.export import student_of_checkpoint

    trio, _ = student_of_checkpoint(recipe, checkpoint, "ema", found.store.manifest_hash)
    strategy = SingleStrategy(choose_device("auto"))
    for module in trio.modules:
        strategy.prepare(module, trio.block_classes)
    with progress(f"{recipe.name}: pictures", drawing.total, show=show_progress) as bar:
        drawing.draw(trio, strategy, advance=bar.advance)


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


def _write_report(
    recipe: Recipe, result: Evaluation, run_id: str, manifest_hash: str, step: int
) -> list[str]:
    """Write grid.jpg and report.html to RUN_DIR/evaluation, each whole or not at all.

    Returns:
        Names of what belongs to the report, in that folder; the report, written last, is the last.
    """
    import torch

    from piflow import storage
    from piflow.evaluation.report import EvaluationReport, Lineage, PictureLinks, render_html
    from piflow.evaluation.sheet import grid, jpeg_bytes

    prompts = result.prompts[:GRID_PROMPTS]
    columns = [pictures[: len(prompts), 0] for pictures in result.pictures.values()]
    rows = list(torch.stack(columns, dim=1))
    sheet = jpeg_bytes(grid(rows, prompts, list(result.pictures)))
    links = tuple(
        PictureLinks(
            prompt,
            tuple((name, f"{PICTURES}/{files[row]}") for name, files in result.files.items()),
        )
        for row, prompt in enumerate(prompts)
    )
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
        grid_jpeg=sheet,
        grid_caption="Every row starts from one noise; seeds were not seen in training.",
        picture_links=links,
        prompt_results=result.per_prompt,
        recipe_yaml=recipe.to_yaml(),
    )
    html = render_html(report).encode()
    folder = storage.join(recipe.run_dir, FOLDER)
    for name, content in {"grid.jpg": sheet, "report.html": html}.items():
        storage.write_bytes(storage.join(folder, name), content)
    linked = [path for row in links for _, path in row.pictures]
    return [*dict.fromkeys(linked), "grid.jpg", "report.html"]
