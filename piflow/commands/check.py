"""recipe -> what its checks found, as a table; nothing is started, nor written but to the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.table import Table

from piflow import storage
from piflow.config import Recipe
from piflow.data.reader import EmbeddingStore
from piflow.planning.memory import GIB, base_bytes
from piflow.progress import PlainConsole
from piflow.runs import folder as run_folder
from piflow.storage.whole import whole_hashes
from piflow.training.placement import replica_and_shard
from piflow.training.preflight import Run, preflight


def main(recipe: Recipe, *, whole_base: bool = False) -> Run:
    """Check a recipe, its store, its models and its run's folder, and print what was found.

    Args:
        whole_base: read all bytes of the base's weights.

    Raises:
        ValueError: as `preflight`; a folder that isn't the family's model; or weights of which some
            bytes aren't the run's or the hub's.
        OSError: something that the recipe names can't be read.
    """
    run = preflight(recipe)
    if whole_base:
        recipe.distillation()
        files = whole_hashes(run.absolute.model.path)
        run_folder.require_same_base(recipe, run.record, run.base_sha256, files)
        run = replace(run, base_files=files)
    table = Table(title=f"{recipe.name}: every check passed", show_header=False)
    for row in (*_about_data(run), *_about_model(run), *_about_base(run), *_about_run(run)):
        table.add_row(*row)
    PlainConsole().print(table)
    return run


def _about_data(run: Run) -> Iterator[tuple[str, str]]:
    store, layout = run.store, run.store.layout
    sizes = ", ".join(f"{b.height}x{b.width} ({b.rows:,})" for b in layout.buckets)
    yield "prompts", f"{layout.num_rows:,} in sizes {sizes}"
    if isinstance(store, EmbeddingStore):
        files = store.manifest.files
        megabytes = sum(entry.bytes for entry in files) / 1e6
        yield "store", f"{store.uri}, {len(files)} files, {megabytes:,.1f} MB"
    else:
        yield "store", f"none: prompts are encoded while training runs; pictures' in {store.uri}"
    yield "embeddings", store.manifest_hash[:16]
    encoder = layout.inputs.encoder
    yield "encoder", f"{encoder.name}, weights {encoder.weights_sha256[:16]}"
    if run.codec is not None:
        yield "latents", f"of {run.codec.name}, weights {run.codec.weights_sha256[:16]}"


def _about_model(run: Run) -> Iterator[tuple[str, str]]:
    recipe = run.recipe
    workers = recipe.runtime.max_workers
    model, whole, part = replica_and_shard(run.absolute, workers)
    yield "model", f"{recipe.model.family}, {recipe.model.path}, codec {recipe.model.codec}"
    kind = recipe.model.base_weights
    frozen = f"{base_bytes(recipe, model) / GIB:.2f} GiB{'' if kind is None else f' in {kind}'}"
    yield "weights", f"frozen {frozen}, trained {model.trained:,} parameters"
    yield "a replica takes", str(whole)
    if workers > 1 and kind is None:
        yield f"a shard of {workers} takes", str(part)


def _about_base(run: Run) -> Iterator[tuple[str, str]]:
    if commit := storage.commit_of(run.absolute.model.path):
        yield "base", f"commit {commit}"
    for name, content in (run.base_files or {}).items():
        yield "base, whole", f"{name}, sha256 {content[:16]}"


def _about_run(run: Run) -> Iterator[tuple[str, str]]:
    recipe, steps = run.recipe, run.recipe.training.steps
    yield "recipe hash", recipe.hash()
    if run.record is None:
        state = "new"
    elif run.steps_done >= steps:
        state = f"all {steps} steps are done"
    else:
        state = f"goes on after step {run.steps_done} of {steps}"
    yield "run", f"{recipe.run_dir}: {state}"
    fewest, most = recipe.runtime.worker_range
    workers = str(most) if fewest == most else f"{fewest} to {most}"
    device = "GPU" if recipe.runtime.use_gpu else "CPU"
    yield "workers", f"{workers}, a {device} each, strategy {recipe.runtime.strategy}"
