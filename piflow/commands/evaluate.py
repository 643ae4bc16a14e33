"""checkpoint -> metrics, picture grid and one HTML report, all logged to the run in MLflow.

RUN_DIR/evaluation/              report.html, grid.jpg, pictures/ (every picture that was drawn),
                                 figures/step_*.json (of each prompt, by checkpoint)
RUN_DIR/evaluation-NAME-HASH/    the same of an adapter, ours or a published one; MLflow isn't told
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from piflow import storage
from piflow.config import Recipe
from piflow.storage.foreign import redacted

if TYPE_CHECKING:
    from PIL.Image import Image

    from piflow.data.prompt_set import ListedPrompts
    from piflow.data.reader import PromptStore
    from piflow.evaluation.compare import Evaluation
    from piflow.evaluation.drawing import Drawing, Plan
    from piflow.evaluation.networks import Instruments
    from piflow.evaluation.others import Other
    from piflow.evaluation.report import Lineage, ShownPrompt
    from piflow.inference.settings import SamplingSettings
    from piflow.roles.adapter import Adapter
    from piflow.roles.trio import Trio
    from piflow.runs.tracking import Tracker
    from piflow.training.preflight import Run

GRID_PROMPTS = 8  # rows of the picture grid
SHOWN_PROMPTS = 8  # of the worst, and of the best, in the report
SHOWN_PIXELS = 24e6  # of all pictures in the report, however many
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
    from piflow.evaluation import figures
    from piflow.evaluation.drawing import Drawing, Plan
    from piflow.evaluation.networks import open_instruments
    from piflow.runs import folder as run_folder
    from piflow.runs.origin import NOTE, description
    from piflow.runs.predicted import kept_table
    from piflow.runs.tracking import MlflowTracker, place_of
    from piflow.runtime.ray_job import submission_id
    from piflow.training.checkpoint import STATE_FILE, read_state, require_same_run

    record = run_folder.require_run(recipe)
    uri = place_of(recipe, record)
    checkpoint = checkpoint or run_folder.newest_checkpoint(recipe.run_dir)
    found, store, listed = _prompts(recipe, show_progress)
    instruments = open_instruments(recipe.evaluation)
    state = read_state(checkpoint)
    require_same_run(state, recipe, found.store.manifest_hash, checkpoint)
    folder = storage.join(recipe.run_dir, FOLDER)
    digest = storage.sha256(storage.join(checkpoint, STATE_FILE))
    cautions = _cautions(recipe, elastic=recipe.policy.type == "gmflow")
    others = _others(recipe)
    pictures = storage.join(folder, PICTURES)
    plan = Plan.of(recipe, store, pictures, digest, others, listed.prompts)
    drawing = Drawing(recipe, plan, store)
    if drawing.num_missing():
        _draw(recipe, found, store, plan, drawing, checkpoint, show_progress)
    result = _measured(recipe, drawing, found, instruments, listed, show_progress)
    lineage = _lineage(recipe, record.mlflow_run_id, store.manifest_hash, f"step {state.step}")
    measured = _figures(recipe, found, result, f"step {state.step}", digest)
    name = f"{figures.FOLDER}/{run_folder.checkpoint_name(state.step)}.json"
    storage.write_bytes(storage.join(folder, name), measured)
    files = [name, *_write_report(recipe, result, folder, lineage, cautions)]
    tracker = MlflowTracker(uri, record.mlflow_run_id, recipe.run_dir)
    tracker.log_checkpoint(state.step, {"piflow.recipe_hash": recipe.hash()})
    tracker.log_summary(summary(result), state.step, _log_prompts(tracker, recipe, result, store))
    told, ran = _told(result, state.step), kept_table(recipe.run_dir)
    note = description(recipe, store.manifest_hash, submission_id(), told, ran)
    tracker.set_tags({NOTE: note})
    for name in files:
        tracker.log_artifact(f"{FOLDER}/{name}")
    if problem := tracker.close():
        print(f"not yet in MLflow: {problem}. It is kept in the run's folder for the next command")
    print(f"report written to {storage.join(folder, 'report.html')}")
    return result


def of_adapter(
    recipe: Recipe, adapter: str, *, subfolder: str | None = None, show_progress: bool = True
) -> Evaluation:
    """Measure an adapter against the recipe's teacher, on the recipe's prompts; in this process.

    Base, encoder, prompts and the teacher's guidance are the recipe's, the few-step schedule is the
    adapter's. No run is needed.

    Args:
        adapter: path, URI or, on the hub, ``owner/name`` of its folder.
        subfolder: of that place.

    Returns:
        All figures and pictures.

    Raises:
        ValueError: no store, or an adapter of another family or base than the recipe's, or one that
            was trained with other embedded guidance.
    """
    from piflow.evaluation import figures
    from piflow.evaluation.drawing import Drawing, Plan
    from piflow.evaluation.networks import open_instruments
    from piflow.inference.places import adapter_files, adapter_place
    from piflow.inference.settings import student_of
    from piflow.progress import progress
    from piflow.roles.merged import read_student, student_sha256

    place = adapter_place(adapter, subfolder)
    files = adapter_files(place)
    student = read_student(files)
    settings, sampled = _as_the_adapter_has_it(recipe, student, place)
    cautions = _cautions(sampled, elastic=student.config.clock() is None)
    found, store, listed = _prompts(recipe, show_progress)
    instruments = open_instruments(recipe.evaluation)
    digest = student_sha256(files)
    name = f"{FOLDER}-{storage.base_name(place)}-{digest[:8]}"
    folder = storage.join(recipe.run_dir, name)
    others = _others(recipe)
    pictures = storage.join(folder, PICTURES)
    plan = Plan.of(sampled, store, pictures, digest, others, listed.prompts)
    drawing = Drawing(sampled, plan, store)
    if drawing.num_missing():
        with progress(f"{name}: pictures", drawing.total, show=show_progress) as bar:
            _draw_here(
                drawing, lambda: student_of(student, settings, with_teacher=True), bar.advance
            )
    result = _measured(recipe, drawing, found, instruments, listed, show_progress)
    lineage = _lineage(sampled, "none", store.manifest_hash, place)
    measured = _figures(sampled, found, result, redacted(place), digest)
    storage.write_bytes(storage.join(folder, figures.FOLDER, "adapter.json"), measured)
    _write_report(sampled, result, folder, lineage, cautions)
    print(f"report written to {storage.join(folder, 'report.html')}")
    return result


def _as_the_adapter_has_it(
    recipe: Recipe, student: Adapter, where: str
) -> tuple[SamplingSettings, Recipe]:
    """Settings of the adapter on the recipe's base, and the recipe with the adapter's schedule.

    Raises:
        ValueError: as of `of_adapter`.
    """
    from piflow.inference.settings import settings_of

    objective = recipe.distillation()
    settings = settings_of(student, where, recipe.model.path)
    if settings.model.family != recipe.model.family:
        raise ValueError(
            f"{where} is a student of the family {settings.model.family}, the recipe's teacher is "
            f"of {recipe.model.family}: evaluate it with a recipe of its own family"
        )
    guided = recipe.guidance.embedded
    if settings.embedded_guidance is not None and settings.embedded_guidance != guided:
        raise ValueError(
            f"{where} was trained with embedded guidance {settings.embedded_guidance:g}, the "
            f"recipe's is {guided}: set guidance.embedded={settings.embedded_guidance:g}, which "
            "teacher and student share"
        )
    settings = settings.model_copy(
        update={"model": recipe.model, "encoder": recipe.encoder, "embedded_guidance": guided}
    )
    changed = objective.model_copy(update=asdict(settings.few_step))
    policy = student.config.policy()
    if policy.type == recipe.policy.type:  # which a recipe's other keys have to go with
        policy = recipe.policy
    parts = {"objective": changed.model_dump(mode="json"), "policy": policy.model_dump(mode="json")}
    tree = {**recipe.model_dump(mode="json"), **parts}
    return settings, Recipe.model_validate(tree)


def _prompts(recipe: Recipe, show_progress: bool) -> tuple[Run, PromptStore, ListedPrompts]:
    """What preflight found, the store of the evaluation's prompts, and those of a set of its own.

    Raises:
        ValueError, OSError: as `preflight` and `read_prompt_set`.
    """
    from piflow.commands import embed
    from piflow.data.prompt_set import ListedPrompts, read_prompt_set
    from piflow.training.preflight import preflight

    config = recipe.evaluation
    if config.prompt_set is None:
        if recipe.embed.mode == "online":
            embed.prepare_online(recipe, evaluation=True, show_progress=show_progress)
        found = preflight(recipe, evaluation=True)
        return found, found.store, ListedPrompts((), None)
    listed = read_prompt_set(config.prompt_set, config.prompts)
    found = preflight(recipe)
    folder = storage.join(recipe.run_dir, FOLDER)
    store = embed.prepare_prompt_set(recipe, listed.prompts, folder, show_progress=show_progress)
    return found, store, listed


def _others(recipe: Recipe) -> list[Other]:
    """Other people's models, checked, with nothing large read."""
    if not recipe.evaluation.others:
        return []  # diffusers' pipelines take seconds to import
    from piflow.evaluation.other_pipelines import open_others

    return open_others(recipe.evaluation, recipe.model)


def _cautions(recipe: Recipe, *, elastic: bool) -> list[str]:
    """What is to be said of `evaluation.nfe`; it is printed as well.

    Args:
        recipe: with the student's own schedule.
        elastic: whether its policy is a GM.

    Raises:
        ValueError: fewer than it was trained for, and it isn't.
    """
    from piflow.sampling import check_nfe

    trained = recipe.distillation().nfe
    found = [check_nfe(nfe, trained, elastic=elastic) for nfe in sorted(set(recipe.evaluation.nfe))]
    for text in filter(None, found):
        print(f"careful: {text}")
    return [text for text in found if text]


def _draw_here(drawing: Drawing, load: Callable[[], Trio], advance: Callable[[int], None]) -> None:
    """Draw in this process, on a GPU if there is one.

    Args:
        load: teacher and student.
    """
    from piflow.inference.drawing import choose_device
    from piflow.sharding.single import SingleStrategy

    strategy = SingleStrategy(choose_device("auto"))
    drawing.draw_others(strategy, advance=advance)
    if drawing.rest_is_drawn(strategy, advance):
        return
    trio = load()
    for module in trio.modules:
        strategy.prepare(module, trio.block_classes)
    drawing.draw(trio, strategy, advance=advance)


def _draw(
    recipe: Recipe,
    found: Run,
    store: PromptStore,
    plan: Plan,
    drawing: Drawing,
    checkpoint: str,
    show_progress: bool,
) -> None:
    """Draw what is missing: on workers, or in this process on a GPU if there is one.

    Args:
        store: of the evaluation's prompts.
    """
    if recipe.evaluation_workers:
        from piflow.runtime.evaluating import draw_on_workers

        run = replace(found, store=store)
        draw_on_workers(run, plan, checkpoint, drawing.total, show_progress=show_progress)
        return
    from piflow.progress import progress
    from piflow.training.export import student_of_checkpoint

    commit = storage.commit_of(found.absolute.model.path)

    def load() -> Trio:
        manifest = found.store.manifest_hash
        return student_of_checkpoint(recipe, checkpoint, "ema", manifest, base_commit=commit)[0]

    with progress(f"{recipe.name}: pictures", drawing.total, show=show_progress) as bar:
        _draw_here(drawing, load, bar.advance)


def _measured(
    recipe: Recipe,
    drawing: Drawing,
    found: Run,
    instruments: Instruments,
    listed: ListedPrompts,
    show_progress: bool,
) -> Evaluation:
    """Everything that the recipe asks for, in this process."""
    from piflow.evaluation.compare import measure
    from piflow.progress import progress

    total = instruments.pictures_to_see(drawing.total)
    with progress(f"{recipe.name}: features", total, show=show_progress and total > 0) as bar:
        return measure(
            drawing,
            recipe.evaluation.measured,
            retrieve=found.retrieval,
            instruments=instruments,
            categories=listed.categories,
            advance=bar.advance,
        )


def _figures(recipe: Recipe, found: Run, result: Evaluation, student: str, digest: str) -> bytes:
    """The file of figures of a student, whose hash is `digest`."""
    from piflow.evaluation.figures import figures_of

    made = figures_of(
        recipe,
        result,
        student=student,
        checkpoint=digest,
        base=found.base_sha256,
        encoder=found.encoder,
    )
    return made.model_dump_json(indent=1).encode()


def _log_prompts(
    tracker: Tracker, recipe: Recipe, result: Evaluation, store: PromptStore
) -> Mapping[str, Any]:
    """The prompts as the run's dataset for evaluation."""
    own = recipe.evaluation.prompt_set
    place = own.path if own is not None else recipe.evaluation.prompt_list or store.uri
    digest = hashlib.sha256(json.dumps(result.prompts).encode()).hexdigest()
    profile = {"rows": len(result.prompts), "seeds": recipe.evaluation.seeds}
    name = f"prompts-{storage.base_name(place)}"
    return tracker.log_dataset(name, storage.absolute(place), digest, "evaluation", profile)


def _told(result: Evaluation, step: int) -> dict[str, str]:
    """The headline figures in words."""
    gain, ratio = result.psnr_gain, result.diversity_ratio
    return {
        "step": str(step),
        "endpoint PSNR over the teacher's in as many steps": f"{gain.value:+.2f} dB "
        f"({gain.low:+.2f} to {gain.high:+.2f})",
        "diversity over the reference's": f"{ratio.value:.3f} "
        f"({ratio.low:.3f} to {ratio.high:.3f})",
        "prompts, pictures each": f"{len(result.prompts)}, "
        f"{next(iter(result.pictures.values())).shape[1]}",
    }


def summary(result: Evaluation) -> dict[str, float]:
    """The figures as MLflow metrics, e.g. `eval/student_4_nfe/psnr`."""
    from piflow.config.metrics import COLUMNS

    values = {f"eval/{name}": figure.value for name, figure in result.figures.items()}
    for method in result.methods:
        key = "eval/" + method.name.lower().replace(",", "").replace(" ", "_")
        for column, value in method.values.items():
            values[f"{key}/{COLUMNS[column].key}"] = value
        values[f"{key}/seconds"] = method.seconds
        values[f"{key}/seconds_a_picture"] = method.seconds_a_picture
    for point in result.curve:
        key = "eval/" + point.student.lower().replace(",", "").replace(" ", "_")
        for name, figure in point.figures.items():
            values[f"{key}/{name}"] = figure.value
    return values


def _lineage(recipe: Recipe, run_id: str, manifest_hash: str, student: str) -> Lineage:
    from piflow.evaluation.report import Lineage

    packages = ["piflow", "torch", "diffusers", "transformers", "peft", "ray", "mlflow"]
    packages += ["torchmetrics"] if recipe.evaluation.compares_sets else []
    return Lineage(
        run_id=run_id,
        recipe_hash=recipe.hash(),
        manifest_hash=manifest_hash,
        student=student,
        versions={"python": platform.python_version()} | {p: version(p) for p in packages},
    )


def _write_report(
    recipe: Recipe,
    result: Evaluation,
    folder: str,
    lineage: Lineage,
    cautions: Sequence[str] = (),
) -> list[str]:
    """Write grid.jpg and report.html to the folder, each whole or not at all.

    Returns:
        Names of what belongs to the report, in that folder; the report, written last, is the last.
    """
    import torch

    from piflow.evaluation.report import EvaluationReport, render_html, worst_and_best
    from piflow.evaluation.sheet import grid, jpeg_bytes
    from piflow.inference.pixels import strip, to_image

    frames = recipe.model.num_frames
    rows = worst_and_best(result.per_prompt, SHOWN_PROMPTS)
    first = range(min(GRID_PROMPTS, len(result.prompts)))
    names = [method.name for method in result.methods if method.is_headline]
    kept, pictures = [], {}
    for method in result.methods:
        if not (method.is_headline or method.is_student):
            continue
        own = result.pictures[method.name]
        pictures[method.name] = [to_image(strip(own[row, 0], frames)) for row in rows]
        if method.is_headline:
            kept.append(strip(own[: len(first), 0], frames).clone())
    sheet = jpeg_bytes(grid(list(torch.stack(kept, dim=1)), result.prompts[: len(first)], names))
    shown = _shown(result, rows, pictures)
    report = EvaluationReport(
        title=f"{recipe.name}: few-step student against its teacher",
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        prompts=len(result.prompts),
        seeds=recipe.evaluation.seeds,
        batch_size=recipe.evaluation.batch_size,
        methods=result.methods,
        figures=result.figures,
        curve=result.curve,
        others=result.others,
        categories=result.by_category,
        cautions=cautions,
        metrics=result.metrics,
        lineage=lineage,
        shown=shown,
        prompt_results=result.per_prompt,
        prompt_categories=result.categories,
        recipe_yaml=recipe.to_yaml(),
    )
    html = render_html(report).encode()
    for name, content in {"grid.jpg": sheet, "report.html": html}.items():
        storage.write_bytes(storage.join(folder, name), content)
    linked = [picture.path for row in shown for picture in row.pictures]
    return [*dict.fromkeys(linked), "grid.jpg", "report.html"]


def _shown(
    result: Evaluation, rows: Sequence[int], pictures: Mapping[str, Sequence[Image]]
) -> tuple[ShownPrompt, ...]:
    """What the report shows of some prompts.

    Args:
        rows: the prompts' numbers.
        pictures: by method, of these prompts.
    """
    from piflow.evaluation.report import ShownPicture, ShownPrompt
    from piflow.evaluation.sheet import page_picture

    each = SHOWN_PIXELS / max(1, len(rows) * len(pictures))
    found = []
    for place, row in enumerate(rows):
        prompt = result.per_prompt[row]
        shown = [
            ShownPicture(
                name,
                f"{PICTURES}/{result.files[name][row]}",
                *page_picture(images[place], each),
            )
            for name, images in pictures.items()
        ]
        found.append(
            ShownPrompt(
                prompt.prompt,
                row,
                "" if result.categories is None else result.categories[row],
                prompt.psnr_teacher,
                prompt.psnr_student,
                tuple(shown),
            )
        )
    return tuple(found)
