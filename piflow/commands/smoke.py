"""A recipe from prompts to pictures, with a tiny random model of its own classes: no downloads.

Sizes, paths, lengths and worker counts are made small. Policy, objective, guidance, encoder, codec,
LoRA targets, optimiser and every other choice stay the recipe's: they and the cluster are what is
tried.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piflow import storage
from piflow.config import ConditionSizes, Recipe, find_family
from piflow.config.family import resolve
from piflow.storage.scratch import scratch
from piflow.testing.shrink import (
    MODEL,
    NUM_PROMPTS,
    PROMPTS,
    SEEDS,
    SIDE,
    STEPS,
    shrink,
)

if TYPE_CHECKING:
    from piflow.inference.editing import Edit


@dataclass(frozen=True)
class PartResult:
    """A part that was run."""

    name: str
    seconds: float
    ok: bool


def main(
    recipe: Recipe, *, keep: Path | None = None, resume: bool = True, show_progress: bool = True
) -> list[PartResult]:
    """Run a shrunken recipe, and print a table of its parts, also when one fails.

    model: write the tiny model's folder; embed; distill, on two workers where the recipe can;
    resume: one more step on one worker; evaluate; export; load: the family's diffusers pipeline
    draws with the student (students of other parts are loaded only); sample.

    Args:
        recipe: of a distillation; none of its paths is read or written.
        keep: a new or empty local folder for all files; default: a temporary one. Workers on other
            machines must see the same folder under this path.
        resume: with the part of this name, which takes a third of the time.

    Raises:
        ValueError: the recipe distils nothing, or `keep` isn't empty.
        Exception: what the first part that fails raises; those after it are not run.
    """
    recipe.distillation()
    from piflow.runtime.session import cluster_gpus, ray_session

    results: list[PartResult] = []
    with _working_folder(keep) as folder, ray_session(shrink(recipe, folder, gpus=0)):
        gpus = cluster_gpus()
        small = shrink(recipe, folder, gpus=gpus)
        last = small
        if resume:
            last = shrink(recipe, folder, gpus=gpus, steps=STEPS + 1, workers=1)
        _quiet()
        parts = _parts(small, last, folder, show_progress)
        try:
            for name, part in parts.items():
                print(f"\n== {name}", flush=True)
                results.append(_timed(name, part, results))
        finally:
            _print_table(small, list(parts), results)
        if keep is not None:
            print(f"files are in {folder}")
    return results


def write_inputs(recipe: Recipe, folder: Path) -> None:
    """The tiny model and the prompts, of the recipe's columns, with pictures where it has some."""
    from piflow.testing.models import save_model

    embed = recipe.embed
    save_model(
        folder / MODEL,
        recipe.model,
        recipe.encoder,
        size=embed.height,
        guidance_embeds=recipe.guidance.embedded is not None,
        seed=recipe.seed,
    )
    texts = storage.read_bytes(PROMPTS).decode().splitlines()[:NUM_PROMPTS]
    prompts = recipe.encoder.example_prompts(texts)
    sizes: dict[str, int] = {}
    if embed.height_column is not None and embed.width_column is not None:
        sizes = {embed.height_column: embed.height, embed.width_column: embed.width}
    rows: list[dict[str, Any]] = [{embed.prompt_column: prompt, **sizes} for prompt in prompts]
    for kind, column in enumerate((embed.image_column, embed.condition_column)):
        for number, row in enumerate(rows if column is not None else ()):
            row[str(column)] = _write_picture(folder, kind * NUM_PROMPTS + number)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_picture(folder: Path, number: int) -> str:
    """Random pixels, more of them than a recipe made small asks for; the file's name.

    Every picture has the same size, so that those to be edited make batches of one shape.
    """
    import numpy as np
    from PIL import Image

    name = f"picture-{number}.png"
    shape = (2 * SIDE, 3 * SIDE, 3)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return name


def _parts(
    small: Recipe, last: Recipe, folder: Path, show_progress: bool
) -> dict[str, Callable[[], object]]:
    """Name -> what it does, in order; each finds what those before it wrote.

    `last` is `small` itself, or the recipe that its run is resumed with.
    """
    from piflow.commands import distill, embed, evaluate, export, sample
    from piflow.inference.settings import places_of

    adapter = str(folder / "adapter")
    pictures = str(folder / "samples")
    parts: dict[str, Callable[[], object]] = {
        "model": lambda: write_inputs(small, folder),
        "embed": lambda: embed.main(small, show_progress=show_progress),
        "distill": lambda: distill.main(small, show_progress=show_progress),
        "resume": lambda: _resume(last, show_progress),
        "evaluate": lambda: evaluate.main(last, show_progress=show_progress),
        "export": lambda: export.main(last, out=adapter),
        "load": lambda: _load(small, folder / MODEL, adapter),
        "sample": lambda: sample.main(
            adapter,
            _some_prompts(small),
            edits=_some_edits(small, folder),
            out=pictures,
            seeds=range(SEEDS),
            choices=sample.Choices(allowed=places_of(small)),
            show_progress=show_progress,
        ),
    }
    if last is small:
        del parts["resume"]
    return parts


def _resume(recipe: Recipe, show_progress: bool) -> None:
    """Go on from the first run's checkpoint; starting anew would be a mistake that this finds.

    Raises:
        ValueError: that checkpoint isn't there, or another number of steps was done.
    """
    from piflow.commands import distill
    from piflow.runs import folder as run_folder

    if STEPS not in run_folder.checkpoints(recipe.run_dir):
        raise ValueError(f"expected a checkpoint of step {STEPS} in {recipe.run_dir}, found none")

    done = distill.main(recipe, show_progress=show_progress)
    if done != STEPS + 1:
        raise ValueError(f"expected the run to be resumed to step {STEPS + 1}, it is at {done}")


def _some_prompts(recipe: Recipe) -> list[str]:
    from piflow.data.online import open_store

    index = open_store(recipe).index()
    return [str(prompt) for prompt in index["prompt"].to_pylist()[:2]]


def _some_edits(recipe: Recipe, folder: Path) -> list[Edit]:
    """A picture to be edited, of a recipe that has some."""
    from piflow.commands import sample

    return sample.named_edits([_edited(folder)] if recipe.condition_sizes is not None else [])


def _edited(folder: Path) -> str:
    return str(folder / f"picture-{NUM_PROMPTS}.png")


def _load(recipe: Recipe, base: Path, adapter: str) -> None:
    """Load the adapter as its users do, and draw one picture with it."""
    from piflow.inference.settings import load_student, places_of
    from piflow.storage.picture import MAX_PICTURE_BYTES, open_picture
    from piflow.testing.family import small_pictures

    pipeline = find_family(recipe.model.family).pipeline
    if pipeline is None or not (base / "model_index.json").exists():  # parts of no pipeline
        load_student(adapter, allowed=places_of(recipe))
        return
    pipe = resolve(pipeline).from_pretrained(base, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    prompt = _some_prompts(recipe)[0]
    arguments = pipe.call_arguments(prompt, recipe.embed.height, recipe.embed.width)
    if recipe.condition_sizes is not None:
        content = storage.read_bytes(_edited(base.parent), max_bytes=MAX_PICTURE_BYTES)
        arguments["image"] = open_picture(content).resize((SIDE, SIDE))
        if "_auto_resize" in signature(type(pipe).__call__).parameters:
            arguments["_auto_resize"] = False
    with small_pictures(find_family(recipe.model.family), ConditionSizes(((SIDE, SIDE),))):
        pipe(**arguments)


def _quiet() -> None:
    """Tiny files are loaded too fast for the libraries' own bars to be of use."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def _working_folder(keep: Path | None) -> Iterator[Path]:
    """`keep`, made if it isn't there; or a folder that is gone afterwards."""
    if keep is None:
        with scratch("smoke") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ValueError(f"expected --keep to name a new or empty folder, {keep} holds something")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.absolute()


def _timed(name: str, part: Callable[[], object], results: list[PartResult]) -> PartResult:
    """The part's result; a failure is noted in `results` and goes on."""
    began = time.perf_counter()
    try:
        part()
    except BaseException:
        results.append(PartResult(name, time.perf_counter() - began, ok=False))
        raise
    return PartResult(name, time.perf_counter() - began, ok=True)


def _print_table(recipe: Recipe, names: list[str], results: list[PartResult]) -> None:
    from rich.table import Table

    from piflow.progress import PlainConsole

    runtime = recipe.runtime
    where = f"{runtime.num_workers} {'GPU' if runtime.use_gpu else 'CPU'} worker(s)"
    table = Table()
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("")
    for result in results:
        table.add_row(result.name, f"{result.seconds:.1f}", "ok" if result.ok else "FAILED")
    for name in names[len(results) :]:
        table.add_row(name, "", "not run")
    console = PlainConsole()
    console.print(f"\n{recipe.name}, made small, on {where}")
    console.print(table)
