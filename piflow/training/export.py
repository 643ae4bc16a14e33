"""Students and teachers from checkpoints, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from piflow import storage
from piflow.backbones import load_empty_backbone
from piflow.backbones.flux.fresh import fresh_module
from piflow.config import Recipe
from piflow.config.model import TeacherLoRAConfig
from piflow.inference.places import is_name, portable
from piflow.inference.settings import (
    BASE_KEY,
    SECTIONS,
    SETTINGS_KEY,
    TEACHER_LORA_KEY,
    SamplingSettings,
    Weights,
)
from piflow.roles.adapter import save_adapter
from piflow.roles.heads import PolicyClock
from piflow.roles.teacher_lora import MAX_BYTES as MAX_LORA_BYTES
from piflow.roles.trio import Trio
from piflow.runs import folder as run_folder
from piflow.storage.fingerprint import weights_fingerprint
from piflow.training.build import build_trio
from piflow.training.checkpoint import (
    RunState,
    StoredSection,
    load_state,
    load_tensors,
    require_same_run,
)


def export_teacher(recipe: Recipe) -> Path:
    """Write the newest checkpoint's EMA as a diffusers folder in float16: RUN_DIR/teacher.

    Raises:
        ValueError: no finished checkpoint, or a run directory that isn't local.
    """
    if storage.scheme(recipe.run_dir) != "file":
        raise ValueError(f"expected a local run_dir to export to, got {recipe.run_dir}")
    checkpoint = storage.local_folder(run_folder.newest_checkpoint(recipe.run_dir))
    module = fresh_module(recipe.model, recipe.seed)
    module.load_state_dict(load_tensors(checkpoint, "ema"))
    folder = Path(storage.absolute(recipe.run_dir)) / "teacher"
    module.half().save_pretrained(str(folder))
    return folder


def student_of_checkpoint(
    recipe: Recipe,
    checkpoint: str,
    weights: Weights,
    manifest_hash: str | None = None,
    base_commit: str | None = None,
) -> tuple[Trio, RunState]:
    """Teacher and student with a checkpoint's weights, on the CPU, ready to sample.

    Args:
        manifest_hash: of the store that it was trained on; None: whatever it was.
        base_commit: of a base on a hub; None: what the recipe's revision names now.

    Raises:
        ValueError: no finished checkpoint there, one of another recipe or store, or a recipe that
            distils nothing.
    """
    recipe.distillation()
    stored, state = stored_in_checkpoint(recipe, checkpoint, weights, manifest_hash)
    trio = build_trio(with_base(recipe, base_commit))
    trio.load_student(stored.read(stored.empty))
    return trio.train(False), state


def stored_in_checkpoint(
    recipe: Recipe, checkpoint: str, weights: Weights, manifest_hash: str | None
) -> tuple[StoredSection, RunState]:
    """A checkpoint's trained tensors, if it is of this run."""
    folder = storage.local_folder(checkpoint)
    state = load_state(folder)
    require_same_run(state, recipe, manifest_hash, checkpoint)
    return StoredSection(folder, SECTIONS[weights]), state


def with_base(recipe: Recipe, commit: str | None) -> Recipe:
    """The recipe with its base on a hub at a commit; None: as it is."""
    if commit is None:
        return recipe
    path = storage.at_commit(recipe.model.path, commit)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": path})})


def base_of(recipe: Recipe) -> dict[str, str]:
    """What tells base and teacher's LoRA from others, for an adapter's metadata, where known."""
    found = weights_fingerprint(storage.for_ranges(recipe.model.path))
    base = {} if found is None else {BASE_KEY: found}
    lora = recipe.model.lora
    return base if lora is None else {**base, TEACHER_LORA_KEY: storage.sha256(lora.path)}


def _take_along(lora: TeacherLoRAConfig, folder: str) -> None:
    """Copies a teacher's LoRA of this machine beside the adapter, where sampling looks for it."""
    name = portable(lora.path)
    if is_name(name):
        content = storage.read_bytes(lora.path, max_bytes=MAX_LORA_BYTES)
        storage.write_bytes(storage.join(folder, name), content)


def export_adapter(
    recipe: Recipe,
    checkpoint: str,
    folder: str,
    *,
    weights: Weights,
    dtype: Literal["float32", "float16", "bfloat16"],
    lineage: dict[str, str],
    manifest_hash: str | None = None,
    base_commit: str | None = None,
) -> None:
    """Write a checkpoint as an adapter folder in the published format.

    Of the base its config, headers and output layer are read, not its weights. Host memory holds
    the adapter's bytes and one trained tensor at a time. The same checkpoint gives the same bytes.
    A teacher's LoRA is noted by its place and hash; one of this machine is copied beside it.

    Args:
        lineage: strings for the metadata: run, hashes, step.
        manifest_hash: of the store that the run trains on; None: whatever it was.
        base_commit: of a base on a hub, which the adapter then names; None: what the recipe's
            revision names now.

    Raises:
        ValueError: the recipe distils nothing, or the checkpoint doesn't fit it.
    """
    written, recipe = recipe, with_base(recipe, base_commit)
    settings = SamplingSettings.of(recipe)
    if recipe.model.lora is not None:
        _take_along(recipe.model.lora, folder)
    stored, _ = stored_in_checkpoint(written, checkpoint, weights, manifest_hash)
    backbone, _ = load_empty_backbone(recipe.model, embedded_guidance=recipe.guidance.embedded)
    save_adapter(
        folder,
        backbone,
        stored.empty,
        recipe.policy,
        PolicyClock.of(settings.few_step),
        base_model=settings.model.path,
        metadata={SETTINGS_KEY: settings.model_dump_json(), **base_of(recipe), **lineage},
        dtype=dtype,
        read=stored.read,
    )
