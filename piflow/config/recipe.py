"""The whole recipe, and what makes two recipes the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from piflow.config import identity, plain_yaml
from piflow.config.conditions import ConditionSizes
from piflow.config.data import EmbedConfig
from piflow.config.evaluation import EvaluationConfig
from piflow.config.family import BUILT_IN, FamilyEncoder, find_family, require_known
from piflow.config.metrics import metric_of
from piflow.config.model import LoRAConfig, ModelConfig
from piflow.config.objective import (
    DXPolicyConfig,
    FlowMatchingConfig,
    GMFlowPolicyConfig,
    GuidanceConfig,
    PiIDConfig,
)
from piflow.config.registry import RegistryConfig
from piflow.config.runtime import RuntimeConfig
from piflow.config.section import Operational, RecipeError, Section, Seed, Uri, Variant
from piflow.config.tracking import TrackingConfig
from piflow.config.training import TrainingConfig


def _by_type(default: str) -> Discriminator:
    """Chooses a union's variant by its `type` key; without one it is `default`."""

    def tag(value: Any) -> Any:
        if isinstance(value, dict):
            return value.get("type", default)
        return value.type if isinstance(value, Variant) else default

    return Discriminator(tag)


_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)  # of a stored identity


class Recipe(Section):
    """One run, whole."""

    schema_version: Operational[Literal[3]] = 3
    """Version of the keys and defaults: a recipe of an older one is read as it was meant."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=200)]
    """The name of the run and, unless tracking says otherwise, of the registered model."""

    seed: Seed = 0
    """The seed of weights, noise and the order of prompts."""

    run_dir: Operational[Uri]
    """URI of the run's folder: checkpoints, samples, state."""

    model: ModelConfig
    encoder: FamilyEncoder
    embed: EmbedConfig
    policy: Annotated[
        Annotated[GMFlowPolicyConfig, Tag("gmflow")] | Annotated[DXPolicyConfig, Tag("dx")],
        _by_type("gmflow"),
    ] = GMFlowPolicyConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    objective: Annotated[
        Annotated[PiIDConfig, Tag("pi_id")] | Annotated[FlowMatchingConfig, Tag("flow_matching")],
        _by_type("pi_id"),
    ] = PiIDConfig()
    lora: LoRAConfig | None = LoRAConfig()
    """null: all of the student's weights are trained, not an adapter."""

    training: TrainingConfig = TrainingConfig()
    runtime: Operational[RuntimeConfig] = RuntimeConfig()
    tracking: Operational[TrackingConfig] = TrackingConfig()
    evaluation: Operational[EvaluationConfig] = EvaluationConfig()
    registry: Operational[RegistryConfig] = RegistryConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        micro_batches = self.training.batch_size // self.training.micro_batch_size
        most = micro_batches * self.runtime.context_parallel
        if most < self.runtime.max_workers:
            raise ValueError(
                f"training.batch_size / training.micro_batch_size = {micro_batches} micro-batches "
                f"a step are too few for runtime.num_workers = {self.runtime.num_workers}: every "
                f"worker needs one; use at most {most} workers"
            )
        taken = find_family(self.model.family).encoder_types
        if self.encoder.type not in taken:
            raise ValueError(
                f"model.family = {self.model.family} doesn't go with encoder.type = "
                f"{self.encoder.type}; it takes {' or '.join(taken)}"
            )
        if self.embed.mode == "online" and self.training.damaged_rows == "replace":
            raise ValueError(
                "training.damaged_rows = replace is about a store's files, and embed.mode = online "
                "has none; leave one of them out"
            )
        if self.embed.mode == "online" and self.embed.image_column is not None:
            raise ValueError(
                "embed.mode = online encodes texts only, embed.image_column asks for pictures too; "
                "use embed.mode = store, or leave image_column empty"
            )
        if self.objective.pictures == "store" and self.embed.image_column is None:
            raise ValueError(
                "objective.pictures = store trains on pictures' latents in the embedding store, "
                "which has none without embed.image_column; name the column of the prompts file "
                "that holds the pictures"
            )
        if self.objective.pictures == "emoji" and self.embed.has_several_sizes:
            raise ValueError(
                "objective.pictures = emoji draws square pictures of one size; leave out "
                "embed.buckets, embed.height_column and embed.width_column"
            )
        if self.objective.pictures == "emoji" and self.embed.height != self.embed.width:
            raise ValueError(
                f"objective.pictures = emoji draws square pictures, embed is "
                f"{self.embed.height}x{self.embed.width}; set embed.height = embed.width"
            )
        if self.runtime.uses_deepspeed and self.training.optimizer.type != "adamw":
            raise ValueError(
                f"training.optimizer.type = {self.training.optimizer.type} needs each parameter's "
                "shape, and runtime.strategy = deepspeed lays them end to end and cuts anywhere; "
                "use adamw, or runtime.strategy fsdp or ddp"
            )
        replicated = self.runtime.max_workers == 1 or self.runtime.strategy == "ddp"
        if self.training.optimizer.type == "muon" and not replicated:
            raise ValueError(
                "training.optimizer.type = muon needs whole matrices, which strategy = "
                f"{self.runtime.strategy} may split over runtime.num_workers = "
                f"{self.runtime.num_workers}; use runtime.strategy ddp, adamw or one worker"
            )
        return self

    @model_validator(mode="after")
    def _latents_have_a_posterior(self) -> Recipe:
        if self.embed.latent_values == "sample" and self.model.codec == "pixels":
            raise ValueError(
                "embed.latent_values = sample draws from a VAE's posterior, and model.codec = "
                "pixels has none; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _tokens_have_a_norm(self) -> Recipe:
        patch = find_family(self.model.family).patch_size
        if self.guidance.keep_norm and patch != 2:
            raise ValueError(
                "guidance.keep_norm is about tokens of 2x2 patches, and those of model.family = "
                f"{self.model.family} have {patch}x{patch}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _edits_what_it_has(self) -> Recipe:
        family, column = self.model.family, self.embed.condition_column
        if find_family(family).edits is None:
            if column is not None:
                able = ", ".join(name for name in BUILT_IN if find_family(name).edits is not None)
                raise ValueError(
                    f"embed.condition_column = {column!r} names pictures to be edited, and "
                    f"model.family = {family} makes pictures of prompts alone; leave it out, or "
                    f"use a family that edits ({able})"
                )
            return self
        if column is None:
            raise ValueError(
                f"model.family = {family} edits pictures, and embed.condition_column names none; "
                "give the column of the prompts file that holds the pictures to be edited"
            )
        if self.embed.mode == "online":
            raise ValueError(
                f"embed.mode = online encodes texts only, and model.family = {family} edits "
                "pictures; use embed.mode = store"
            )
        for key in ("prompt_set", "others"):
            if getattr(self.evaluation, key):
                raise ValueError(
                    f"evaluation.{key} is about prompts alone, and model.family = {family} edits "
                    "pictures; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _videos_come_of_prompts_alone(self) -> Recipe:
        family = self.model.family
        if find_family(family).video is None:
            return self
        if self.embed.image_column is not None or self.objective.pictures is not None:
            raise ValueError(
                f"model.family = {family} makes videos, and videos in the store aren't supported: "
                "use a data-free recipe, with objective.data = free and neither "
                "embed.image_column nor objective.pictures"
            )
        for key in ("retrieval", "metrics", "others"):
            if getattr(self.evaluation, key):
                raise ValueError(
                    f"evaluation.{key} is about pictures, and model.family = {family} makes "
                    f"videos; {'set it to false' if key == 'retrieval' else 'leave it out'}"
                )
        return self

    @property
    def condition_sizes(self) -> ConditionSizes | None:
        """How condition pictures are scaled; None: the model edits none."""
        own = find_family(self.model.family).edits
        return None if own is None else own.instead(self.embed.condition_sizes)

    @model_validator(mode="after")
    def _distils_what_it_names(self) -> Recipe:
        named = {
            "model.base_weights is about a distillation's frozen base": self.model.base_weights,
            "model.fp8_teacher is about a distillation's teacher": self.model.fp8_teacher,
            "model.lora is about a distillation's teacher": self.model.lora,
            "training.init_from is about a distillation's student": self.training.init_from,
        }
        wrong = [what for what, value in named.items() if value is not None]
        if wrong and self.objective.type != "pi_id":
            raise ValueError(
                f"{wrong[0]} and objective.type = {self.objective.type} has none; leave it out"
            )
        if self.model.fp8_teacher is not None and self.runtime.compile:
            raise ValueError(
                "runtime.compile can't trace how model.fp8_teacher quantises a weight; leave out "
                "one of them"
            )
        fp8, runtime = self.model.fp8_teacher, self.runtime
        if fp8 is None or not fp8.keep_weights:
            return self
        shards = runtime.max_workers > 1 and runtime.strategy in ("auto", "fsdp")
        if shards and runtime.activation_checkpointing == "selective":
            raise ValueError(
                "model.fp8_teacher.keep_weights has FSDP gather weights within blocks, and "
                "runtime.activation_checkpointing = selective, which computes part of a block "
                "again, would find other operations there; use full, strategy ddp, or leave it out"
            )
        if shards and runtime.reshard_after_forward is False:
            raise ValueError(
                "model.fp8_teacher.keep_weights gathers 8-bit weights for the teacher, and with "
                "runtime.reshard_after_forward = false the weights that it has are whole already; "
                "leave out one of them"
            )
        if runtime.deepspeed is not None and runtime.deepspeed.stage == 3:
            raise ValueError(
                "model.fp8_teacher.keep_weights needs weights that are whole or FSDP's shards, and "
                "DeepSpeed's stage 3 gathers them layer by layer in model.dtype whoever asks; use "
                "runtime.strategy fsdp, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _base_can_be_in_codes(self) -> Recipe:
        kind, runtime = self.model.base_weights, self.runtime
        if kind is None:
            return self
        if self.lora is None:
            raise ValueError(
                f"model.base_weights = {kind} is about a base that stays frozen, and lora = null "
                "trains a copy of all its weights; leave one of them out"
            )
        if self.model.fp8_teacher is not None:
            raise ValueError(
                f"model.fp8_teacher quantises the base's own weights, and model.base_weights = "
                f"{kind} keeps none of them; leave out one of them"
            )
        if runtime.compile:
            raise ValueError(
                f"runtime.compile can't trace how weights in {kind} are made whole; leave it or "
                "model.base_weights out"
            )
        splits = runtime.shard_size is not None or runtime.offload != "none"
        splits = splits or runtime.reshard_after_forward is False
        if runtime.strategy in ("fsdp", "deepspeed") or splits:
            raise ValueError(
                f"model.base_weights = {kind} has every worker hold the whole base, as codes that "
                "FSDP and DeepSpeed don't split; use runtime.strategy ddp, single or auto without "
                "options of sharding, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _attention_takes_the_model(self) -> Recipe:
        attention, family = self.runtime.attention, self.model.family
        if attention in ("auto", "native"):
            return self
        if attention in ("flash", "native_flash") and find_family(family).masks_text:
            raise ValueError(
                f"runtime.attention = {attention} takes no mask, and model.family = {family} masks "
                "prompts of different lengths; use auto, native or native_cudnn"
            )
        in_float32 = self.model.dtype == "float32" or self.lora is None
        if attention != "native_efficient" and in_float32:
            raise ValueError(
                f"runtime.attention = {attention} computes in bfloat16, and this recipe's "
                f"{'base' if self.lora is not None else 'student (full training)'} is float32; "
                "use auto, native or native_efficient"
            )
        return self

    @model_validator(mode="after")
    def _tokens_can_be_split(self) -> Recipe:
        size = self.runtime.context_parallel
        if size == 1:
            return self
        if not find_family(self.model.family).splits_tokens:
            able = [name for name in BUILT_IN if find_family(name).splits_tokens]
            raise ValueError(
                f"runtime.context_parallel = {size} follows diffusers' plan of where a model's "
                f"tokens are split, and model.family = {self.model.family} has none "
                f"({', '.join(able)} do); leave it out"
            )
        if self.objective.type == "pi_id" and self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout = {self.lora.dropout} draws for whole samples, and "
                f"runtime.context_parallel = {size} workers have parts of one; use lora.dropout 0, "
                "or leave context_parallel out"
            )
        tokens = self.encoder.text_tokens
        if tokens % size:
            raise ValueError(
                f"encoder.max_tokens ({tokens}) must be a multiple of runtime.context_parallel "
                f"({size}), which deals them out evenly; use another number"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_has_a_reference(self) -> Recipe:
        if isinstance(self.objective, PiIDConfig):
            steps, nfe = self.evaluation.teacher_steps, self.objective.nfe
            if steps <= nfe:
                raise ValueError(
                    f"evaluation.teacher_steps = {steps}, the reference, must exceed the student's "
                    f"objective.nfe = {nfe}; use more teacher steps"
                )
            self._require_runnable(self.evaluation.nfe, nfe)
        return self

    def _require_runnable(self, asked: Sequence[int], trained: int) -> None:
        steps = self.evaluation.teacher_steps
        if max(asked, default=0) >= steps:
            raise ValueError(
                f"evaluation.nfe has {max(asked)}, and evaluation.teacher_steps, the reference, is "
                f"{steps}, which must exceed it; use more teacher steps"
            )
        if self.policy.type == "dx" and min(asked, default=trained) < trained:
            raise ValueError(
                f"evaluation.nfe has {min(asked)}, and a DX student runs at no fewer network "
                f"evaluations than it was trained for, objective.nfe = {trained}; leave it out"
            )

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Recipe:
        for gate in self.registry.parsed():
            metric = metric_of(gate.figure)
            if metric not in self.evaluation.measured:
                without = (
                    "evaluation.retrieval = false doesn't measure"
                    if metric == "retrieval_at_1"
                    else "isn't measured without evaluation.metrics"
                )
                raise ValueError(
                    f"registry.gates asks for {gate.text!r}, which {without}; leave one of them out"
                )
        return self

    def distillation(self) -> PiIDConfig:
        """The objective of a recipe that distils.

        Raises:
            ValueError: it is another; the message says what to use.
        """
        if not isinstance(self.objective, PiIDConfig):
            raise ValueError(
                f"{self.name}: expected objective.type pi_id, got {self.objective.type}: only a "
                "distillation has teacher and student; use `piflow pretrain` for it"
            )
        return self.objective

    def deciding(self) -> dict[str, Any]:
        """What decides a run's results, with its value, defaults as well."""
        return self._as_it_counts(identity.deciding_values(self))

    def identity(self) -> dict[str, Any]:
        """What decides a run's results and isn't as the schema's defaults have it."""
        tree = self._as_it_counts(identity.changed_values(self))
        return {identity.VERSION_KEY: identity.SCHEMA, **tree}

    def _as_it_counts(self, tree: dict[str, Any]) -> dict[str, Any]:
        """What decides results, by its fields, less and more what other keys make of it."""
        if not self.embed.stores_pictures:  # how pictures are stored then decides nothing
            tree["embed"].pop("latent_dtype", None)
        if self.embed.image_column is None:
            tree["embed"].pop("latent_values", None)
        for key in ("image_column", "condition_column"):
            if getattr(self.embed, key) is None:
                tree["embed"].pop(key, None)
        if self.training.optimizer.decay_fraction:  # the learning rate then depends on the length
            tree["training"]["steps"] = self.training.steps
        return tree

    @property
    def evaluation_workers(self) -> int:
        """Workers that draw for an evaluation; 0: the command does."""
        if self.evaluation.workers is not None:
            return self.evaluation.workers
        return self.runtime.worker_range[0] if self.runtime.use_gpu else 0

    def hash(self) -> str:
        """sha256 (16 hex digits) of `identity()`."""
        return identity.hash_of(self.identity())

    def is_run_of(self, recipe_hash: str, stored: Mapping[str, Any] | None = None) -> bool:
        """Whether a run's hash and identity, of this version or an earlier one, are this recipe's.

        Args:
            recipe_hash: as the run's record or a checkpoint has it.
            stored: the identity beside it; None: version 0.1.0's checkpoints have a hash alone.
        """
        if recipe_hash == self.hash():
            return True
        if stored is not None:
            return self._identity_of(stored) == self.identity()
        old = identity.as_in_schema_0(self.deciding(), self.identity())
        return recipe_hash == identity.hash_of(old)

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Dotted keys in which a stored identity differs from this recipe, with both values.

        Raises:
            RecipeError: it has a newer schema version than this piflow knows.
        """
        try:
            return identity.differences(self.deciding(), self._of_identity(stored).deciding())
        except RecipeError:
            raise
        except _UNREADABLE:  # no recipe of today says the same; schema 0 stored defaults too
            ours = self.identity() if identity.VERSION_KEY in stored else self.deciding()
            return identity.differences(ours, dict(stored))

    def _of_identity(self, stored: Mapping[str, Any]) -> Recipe:
        """The recipe of a stored identity, in which nothing that isn't part of it counts."""
        tree = {key: value for key, value in stored.items() if key != identity.VERSION_KEY}
        tree = identity.migrate(tree, stored.get(identity.VERSION_KEY, 0))
        family = tree["model"].get("family", self.model.family)
        if family != self.model.family:
            require_known(family, "the stored recipe")
        embed = {**tree["embed"], "store": self.embed.store}
        return Recipe.model_validate({**tree, "run_dir": self.run_dir, "embed": embed})

    def _identity_of(self, stored: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            return self._of_identity(stored).identity()
        except _UNREADABLE:  # no recipe of today says the same
            return None

    def to_yaml(self) -> str:
        """The resolved recipe, every default filled in."""
        return plain_yaml.dump(self.model_dump(mode="json"))
