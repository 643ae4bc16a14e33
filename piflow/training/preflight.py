"""Every check of a recipe against what it names, once, before anything is started or rented.

`preflight` opens the store, the models' configurations and the run's folder, and hands on what it
opened: the driver, the workers and the evaluation open none of it again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from piflow import storage
from piflow.backbones import Backbone, family_class
from piflow.backbones.codec import absolute_paths, build_codec, check_channels
from piflow.backbones.encoders import encoder_identity
from piflow.backbones.transformer import TransformerBackbone, read_model_config
from piflow.config import PiIDConfig, Recipe
from piflow.data.layout import require_recipes_prompts
from piflow.data.online import open_store
from piflow.data.pictures import codec_identity, condition_inputs
from piflow.data.reader import EmbeddingStore, PromptStore
from piflow.data.select import evaluation_rows, listed_prompts
from piflow.demo.retrieval import EmojiRetrieval
from piflow.roles.teacher_lora import check_teacher_lora
from piflow.runs import folder as run_folder
from piflow.runs.folder import RunRecord
from piflow.storage.fingerprint import CodecIdentity, EncoderIdentity, weights_fingerprint
from piflow.storage.whole import known_hashes
from piflow.training.checkpoint import (
    DamagedCheckpointError,
    read_state,
    require_same_run,
    require_step,
)
from piflow.training.context_parallel import check_pictures
from piflow.training.warm_start import check_start, read_start


@dataclass(frozen=True)
class Run:
    """A recipe that passed every check, and what the checks opened.

    Attributes:
        recipe: as it was written; `absolute` is for processes with other working directories.
        absolute: the same, with local paths absolute, and a base on a hub at the commit that the
            run was started with, or that its revision names now.
        store: the embedding store under its absolute path, its manifest read; in online mode the
            planned one.
        encoder: what the recipe's text encoder is.
        codec: which VAE made the pictures' latents, where the run trains on those of the store.
        base_sha256: fingerprint of the base weights of a distillation; None: they lie on a hub.
        base_files: file -> sha256 of all bytes of those weights, where this machine knows them.
        record: of an earlier start of this run; None: it is new.
        checkpoints: step -> URI of every finished checkpoint, oldest first.
        retrieval: finds the emoji that pictures show, where an evaluation asks for it.
    """

    recipe: Recipe
    absolute: Recipe
    store: PromptStore
    encoder: EncoderIdentity
    codec: CodecIdentity | None
    base_sha256: str | None
    base_files: dict[str, str] | None
    record: RunRecord | None
    checkpoints: dict[int, str]
    retrieval: EmojiRetrieval | None

    @property
    def steps_done(self) -> int:
        """Optimiser steps that the newest finished checkpoint holds."""
        return max(self.checkpoints, default=0)


def preflight(recipe: Recipe, *, evaluation: bool = False) -> Run:
    """Check that recipe, run folder, models and store go with one another. Writes nothing.

    Args:
        evaluation: the store must hold the evaluation prompts, which must be emoji if retrieval
            is measured; else, in online mode, those of a run's pictures.

    Raises:
        ValueError: the run folder belongs to another recipe, store or base weights; no store, a
            damaged one, one of another encoder, for a new run one of other prompts, one with other
            pictures to be edited, or one without the recipe's negative prompt or, where it trains
            on them, latents of its VAE; a VAE of another family, or one that makes other latents
            than the model takes; a teacher's LoRA or an adapter to begin as that doesn't go onto
            the base; or weights that aren't safetensors.
        OSError: something that the recipe names can't be read.
    """
    record = run_folder.require_same_recipe(recipe)
    codec = build_codec(recipe.model)
    check_channels(recipe.model, codec)
    absolute = _absolute(recipe, None if record is None else record.base_commit)
    store = open_store(absolute, evaluation=evaluation)
    if record is None and isinstance(store, EmbeddingStore):
        require_recipes_prompts(absolute, store.uri, store.manifest.inputs)
    encoder = encoder_identity(recipe.encoder)
    store.require_encoder(encoder)
    store.require_negative_prompt(recipe.guidance.negative_prompt)
    latents = None
    if recipe.objective.pictures == "store":
        latents = codec_identity(recipe.model, recipe.embed)
        store.require_latents(latents)
    store.require_conditions(condition_inputs(recipe))
    sizes = [(bucket.height, bucket.width) for bucket in store.layout.buckets]
    sizes.append((recipe.embed.height, recipe.embed.width))  # of samples
    patch_size = family_class(recipe.model.family).patch_size
    check_pictures(codec, sizes, recipe.runtime.context_parallel, patch_size)
    run_folder.require_same_store(recipe, record, store.manifest_hash)
    base = base_fingerprint(recipe)
    files = known_hashes(recipe.model.path) if base is not None else None
    run_folder.require_same_base(recipe, record, base, files)
    if isinstance(recipe.objective, PiIDConfig):
        _check_additions(recipe)
    found = run_folder.checkpoints(recipe.run_dir)
    require_newest_of(recipe, store.manifest_hash, found)
    retrieval = _retrieval(recipe, store) if evaluation else None
    return Run(recipe, absolute, store, encoder, latents, base, files, record, found, retrieval)


def _retrieval(recipe: Recipe, store: PromptStore) -> EmojiRetrieval | None:
    """Nearest-emoji search among the emoji of the evaluation list; None: none is asked for.

    Raises:
        ValueError: the store lacks an evaluation prompt, or it isn't the name of an emoji.
    """
    index = store.index()
    texts = dict(zip(index["row"].to_pylist(), index["prompt"].to_pylist(), strict=True))
    prompts = [texts[row] for row in evaluation_rows(recipe, index)]
    if not recipe.evaluation.retrieval:
        return None
    listed = recipe.evaluation.prompt_list
    retrieval = EmojiRetrieval(None if listed is None else set(listed_prompts(listed)))
    retrieval.require(prompts)
    return retrieval


def base_fingerprint(recipe: Recipe) -> str | None:
    """What tells the teacher's weights in a distillation from others; None: none to read.

    They are the base's, and those of its LoRA if it has one.
    """
    if not isinstance(recipe.objective, PiIDConfig):  # which starts from fresh weights
        return None
    base = weights_fingerprint(recipe.model.path)
    if recipe.model.lora is None:
        return base
    both = f"{base} {storage.sha256(recipe.model.lora.path)}"
    return hashlib.sha256(both.encode()).hexdigest()


def _check_additions(recipe: Recipe) -> None:
    """Refuses a teacher's LoRA, or an adapter to begin as, that doesn't go onto the base.

    Of the base its config is read.
    """
    kind, path = family_class(recipe.model.family), recipe.model.path
    guidance = recipe.guidance.embedded

    def empty() -> Backbone:
        if not issubclass(kind, TransformerBackbone):
            return kind.load_empty(path, embedded_guidance=guidance)[0]
        config = read_model_config(storage.for_ranges(path), kind.class_name, path)
        return kind.on_meta(config, embedded_guidance=guidance)

    check_teacher_lora(recipe.model, empty)
    start = read_start(recipe)
    if start is not None:
        check_start(recipe, start, empty())


def require_newest_of(recipe: Recipe, manifest_hash: str, checkpoints: dict[int, str]) -> None:
    """Make sure that the newest checkpoint is of this recipe and store; the workers look again.

    Raises:
        ForeignCheckpointError: it isn't, or its folder is named after another step.
    """
    if not checkpoints:
        return
    step = max(checkpoints)
    uri = checkpoints[step]
    try:
        state = read_state(uri)
    except DamagedCheckpointError:
        return  # the workers go on from an earlier one, and say so
    require_step(state, step, uri)
    require_same_run(state, recipe, manifest_hash, uri)


def _absolute(recipe: Recipe, base_commit: str | None) -> Recipe:
    """The same recipe with local paths made absolute, and the base at a commit.

    Otherwise two machines, or two starts, might read two versions of a base on a hub.
    """
    model = absolute_paths(recipe.model)
    if isinstance(recipe.objective, PiIDConfig):
        path = storage.at_commit(model.path, base_commit)
        model = model.model_copy(update={"path": path})
    uris = {key: storage.absolute(getattr(recipe.embed, key)) for key in ("store", "prompts")}
    training, start = recipe.training, recipe.training.init_from
    if start is not None:
        training = training.model_copy(update={"init_from": storage.absolute(start)})
    return recipe.model_copy(
        update={
            "training": training,
            "run_dir": storage.absolute(recipe.run_dir),
            "embed": recipe.embed.model_copy(update=uris),
            "encoder": recipe.encoder.absolute(),
            "model": model,
        }
    )
