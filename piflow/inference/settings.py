"""Students as files: from a checkpoint, to and from an exported adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from piflow import storage
from piflow.backbones import DTYPES, Backbone, Conditioning, load_backbone, load_empty_backbone
from piflow.backbones.encoders import build_encoder
from piflow.backbones.load import with_frames
from piflow.backbones.text import TextEncoder
from piflow.config import (
    ConditionSizes,
    FamilyEncoder,
    ModelConfig,
    Recipe,
    find_family,
    identity,
    require_known,
)
from piflow.config.encoder import EncoderConfig, TextEncoderConfig
from piflow.inference.places import (
    adapter_files,
    adapter_place,
    is_name,
    parts_of_base,
    portable,
    resolve_places,
)
from piflow.inference.published import (
    MAX_NFE,
    base_of,
    embedded_guidance_of,
    encoder_of,
    few_step_of,
    model_of,
)
from piflow.roles.adapter import SETTINGS_KEY, Adapter
from piflow.roles.merged import empty_student, read_student, student_backbone
from piflow.roles.teacher_lora import TeacherLora, merge, read_teacher_lora
from piflow.roles.trio import Trio
from piflow.schedule import FewStep
from piflow.storage.fingerprint import weights_fingerprint
from piflow.storage.foreign import ForeignDataError, parse_object, shown

BASE_KEY = "piflow_base_sha256"  # `weights_fingerprint` of the base
TEACHER_LORA_KEY = "piflow_teacher_lora_sha256"  # of the file of `model.lora`

Weights = Literal["ema", "student"]

_TEACHER_LORA = "teacher's LoRA"  # in messages
_ROUNDING = "nearest"

MAX_SIDE = 16384  # pixels
MAX_SUBSTEPS = 16384
MAX_TEXT_TOKENS = 65536

_Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]  # pixels

SECTIONS = {"ema": "ema", "student": "trainable"}


class SamplingSettings(BaseModel):
    """What sampling needs beside the weights; kept in the safetensors metadata as JSON.

    There the schedule's numbers are keys beside the others, and the schema version tells how
    `model` and `encoder` are meant; version 0.1.0 wrote none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelConfig  # the base and its codec; local folders by their names alone
    encoder: FamilyEncoder  # likewise
    height: _Side
    width: _Side
    few_step: FewStep
    embedded_guidance: float | None  # FLUX.1-dev's guidance input
    condition_sizes: Annotated[list[tuple[_Side, _Side]], Field(max_length=1000)] = []
    """(height, width) that pictures to be edited are scaled to; []: those of the family."""

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, data: Any) -> Any:
        """Gathers the schedule's keys, and brings the recipe's to today's schema."""
        if not isinstance(data, dict):
            return data
        if "few_step" in data:
            check_schedule(data["few_step"])
            return data
        names = {field.name for field in fields(FewStep)}
        few_step = {name: value for name, value in data.items() if name in names}
        check_schedule(few_step)
        others = {name: value for name, value in data.items() if name not in names}
        parts = {name: others[name] for name in ("model", "encoder") if name in others}
        migrated = identity.migrate(parts, others.pop(identity.VERSION_KEY, 0))
        return {**others, **{name: migrated[name] for name in parts}, "few_step": few_step}

    @model_serializer(mode="wrap")
    def _flatten(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The inverse of `_nest`."""
        tree: dict[str, Any] = serialise(self)
        few_step = tree.pop("few_step")
        if not self.condition_sizes:  # likewise
            del tree["condition_sizes"]
        if self.few_step.substep_rounding == _ROUNDING:  # which earlier piflows know without a key
            del few_step["substep_rounding"]
        return {identity.VERSION_KEY: identity.SCHEMA, **tree, **few_step}

    @classmethod
    def of(cls, recipe: Recipe) -> SamplingSettings:
        """The recipe's, as an adapter carries them: without paths of this machine.

        Raises:
            ValueError: the recipe distils nothing.
        """
        model, vae = recipe.model, recipe.model.vae
        places: dict[str, Any] = {
            "path": portable(model.path),
            "vae": None if vae is None else portable(vae),
        }
        if find_family(model.family).video is not None:  # as trained, whatever is usual later
            places["frames"] = model.num_frames
        if model.lora is not None:
            path = portable(model.lora.path)
            places["lora"] = model.lora.model_copy(update={"path": path})
        return cls(
            model=model.model_copy(update=places),
            encoder=_portable_encoder(recipe.encoder),
            height=recipe.embed.height,
            width=recipe.embed.width,
            few_step=FewStep.of(recipe.distillation()),
            embedded_guidance=recipe.guidance.embedded,
            condition_sizes=[(size[0], size[1]) for size in recipe.embed.condition_sizes],
        )

    @property
    def edits(self) -> ConditionSizes | None:
        """How pictures to be edited are scaled; None: the student edits none."""
        own = find_family(self.model.family).edits
        return None if own is None else own.instead(self.condition_sizes)


def check_schedule(few_step: Any) -> None:
    """Refuses a schedule that takes for ever, before anything is made of it.

    Args:
        few_step: a mapping of a schedule's numbers, of which some may be absent.

    Raises:
        ValueError: too many evaluations or substeps.
    """
    for name, limit in (("nfe", MAX_NFE), ("total_substeps", MAX_SUBSTEPS)):
        value = few_step.get(name) if isinstance(few_step, dict) else None
        number = float(value) if isinstance(value, str) else value
        if isinstance(number, int | float) and number > limit:
            raise ValueError(f"{name} is {value}, at most {limit} can be run")


def settings_of(adapter: Adapter, where: str, base: str | None = None) -> SamplingSettings:
    """The sampling settings in an adapter's metadata, or those of the published students.

    Args:
        base: the base that the user names, for adapters that don't know theirs.

    Raises:
        ValueError: the notes are another version's; or the file has none, and its class is of no
            family that is known here.
    """
    text = adapter.metadata.get(SETTINGS_KEY)
    if text is None:
        return _published_settings(adapter, where, base)
    try:
        tree = parse_object(text, where=SETTINGS_KEY)
        model = tree.get("model")
        if isinstance(model, dict) and isinstance(model.get("family"), str):
            require_known(model["family"], where)  # reading the settings looks the family up
    except ForeignDataError as error:
        raise _not_settings(where, str(error)) from error
    try:
        settings = SamplingSettings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(shown(part) for part in first["loc"])
        told = shown(first["msg"], 1000)
        raise _not_settings(where, f"{place}: {told}" if place else told) from error
    if settings.encoder.text_tokens > MAX_TEXT_TOKENS:
        raise _not_settings(
            where, f"encoder: {settings.encoder.text_tokens} tokens, at most {MAX_TEXT_TOKENS}"
        )
    return settings


def _published_settings(adapter: Adapter, where: str, base: str | None) -> SamplingSettings:
    """Those of an adapter that notes nothing."""
    name, published = base_of(adapter.config, where)
    size = 1024 if published is None else published.size
    return SamplingSettings(
        model=model_of(name, published, where, base),
        encoder=encoder_of(find_family(name), published, base),
        height=size,
        width=size,
        few_step=few_step_of(adapter, where),
        embedded_guidance=embedded_guidance_of(adapter, published),
    )


def _not_settings(where: str, why: str) -> ValueError:
    return ValueError(
        f"{where}: {SETTINGS_KEY} are not those of this piflow ({why}): export it again"
    )


def load_student(
    folder: str,
    base: str | None = None,
    *,
    encoder: str | None = None,
    allowed: Sequence[str] = (),
) -> tuple[Trio, SamplingSettings]:
    """Teacher and student from an adapter folder, on the CPU, ready to sample.

    Args:
        folder: path, URI or, on the hub, ``owner/name`` of the adapter's folder.
        base: folder, URI or hub name of the base: its transformer, or a pipeline that holds VAE
            and text encoders as well; default: the one that the student was made from.
        encoder: URI of the text encoder; default: the one that the adapter names.
        allowed: URIs that the adapter may name besides its own folder and bucket and the hub,
            with all that lies below them.

    Returns:
        The trio, and the settings with base, VAE and encoder as they are to be loaded.

    Raises:
        ValueError: not an adapter folder, one of another base, or one that names places that
            nobody allowed.
    """
    adapter, settings = read_adapter(folder, base, encoder=encoder, allowed=allowed)
    return student_of(adapter, settings), settings


def read_adapter(
    folder: str,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    *,
    encoder: str | None = None,
    allowed: Sequence[str] = (),
) -> tuple[Adapter, SamplingSettings]:
    """An adapter folder, and the settings to sample with; no model is loaded.

    Args:
        folder: as of `load_student`.
        base: as of `load_student`.
        dtype: what the base computes in; default: as in training, or as the published students.
        encoder, allowed: as of `load_student`.

    Raises:
        ValueError: not an adapter folder, or one that names places that nobody allowed.
    """
    place = adapter_place(folder)
    adapter = read_student(adapter_files(place))
    noted = settings_of(adapter, place, base)
    settings = _placed(noted, place, base, encoder, allowed, body=adapter.body)
    if dtype is not None:
        model = settings.model.model_copy(update={"dtype": dtype})
        settings = settings.model_copy(update={"model": model})
    return adapter, settings


def student_of(adapter: Adapter, settings: SamplingSettings, *, with_teacher: bool = False) -> Trio:
    """Teacher and student of an adapter on the CPU, the base read from where the settings say.

    Args:
        with_teacher: whether a merged student, which needs no base, gets the base beside it.

    Raises:
        ValueError: a base that isn't the family's model, or another one than the adapter's, by
            its weights where the adapter notes them.
    """
    if adapter.body is not None and not with_teacher:
        return Trio.from_adapter(_merged(adapter, settings), adapter)
    noted, path = adapter.metadata.get(BASE_KEY), settings.model.path
    found = None if noted is None else weights_fingerprint(storage.for_ranges(path))
    if found is not None and found != noted:
        raise ValueError(
            f"the adapter was made from base weights {shown(noted, 16)}, those in {path} are "
            f"{found[:16]}: pictures would differ from the student's. Give the base that it was "
            "made from with --base"
        )
    teacher_lora = teacher_lora_of(adapter, settings)
    backbone = load_backbone(settings.model, embedded_guidance=settings.embedded_guidance)
    if adapter.body is None:
        trio = Trio.from_adapter(backbone, adapter, teacher_lora)
        if settings.model.base_weights is not None:
            trio.code_base(settings.model.base_weights)
        return trio
    if teacher_lora is not None:
        merge(backbone, teacher_lora)
    return Trio.from_adapter(_merged(adapter, settings), adapter, teacher=backbone)


def _merged(adapter: Adapter, settings: SamplingSettings) -> Backbone:
    model = settings.model
    dtype, guidance = DTYPES[model.dtype], settings.embedded_guidance
    return with_frames(student_backbone(adapter, model.family, dtype, guidance), model)


def empty_model(adapter: Adapter, settings: SamplingSettings) -> Backbone:
    """What an adapter goes onto, or a merged student's own transformer, less its values.

    Raises:
        ValueError: as of `student_of`.
    """
    model, guidance = settings.model, settings.embedded_guidance
    if adapter.body is None:
        return load_empty_backbone(model, embedded_guidance=guidance)[0]
    empty = empty_student(adapter, model.family, DTYPES[model.dtype], guidance)[0]
    return with_frames(empty, model)


def teacher_lora_of(adapter: Adapter, settings: SamplingSettings) -> TeacherLora | None:
    """The LoRA of the teacher that an adapter was made from, read from where the settings say.

    Raises:
        ValueError: it isn't a LoRA, or another one than the adapter's.
    """
    if settings.model.lora is None:
        return None
    noted, path = adapter.metadata.get(TEACHER_LORA_KEY), settings.model.lora.path
    if noted is not None and storage.sha256(path) != noted:
        raise ValueError(
            f"{path} isn't the teacher's LoRA that the adapter was made with (its sha256 begins "
            f"with {shown(noted, 16)}): pictures would differ from the student's. Put that file "
            "into the adapter's folder under this name, or allow its folder with --allow"
        )
    return read_teacher_lora(settings.model)


def places_of(recipe: Recipe) -> tuple[str, ...]:
    """What an adapter of this recipe names: allowed by whoever has the recipe.

    Raises:
        ValueError: the recipe distils nothing.
    """
    recipe.distillation()
    named = {**_places_of_model(recipe.model), **_encoder_places(recipe.encoder)}
    return tuple(storage.absolute(place) for place in named.values())


def _placed(
    settings: SamplingSettings,
    adapter: str,
    base: str | None,
    encoder: str | None,
    allowed: Sequence[str],
    body: str | None,
) -> SamplingSettings:
    """The settings with the user's places, and those of the adapter's own that it may name.

    A merged student's own transformer, `body`, stands for the base.
    """
    named = _named(settings)
    given = {} if base is None else parts_of_base(base)
    if body is not None:
        given = {**(given or parts_of_base(adapter)), "base": body}
    if encoder is not None:
        given["encoder"] = encoder
    if "encoder" in given and not _takes(settings.encoder, encoder is not None):
        del given["encoder"]
    open_to_it = {what: place for what, place in named.items() if what not in given}
    found = resolve_places(open_to_it, adapter, allowed)
    _require_there(open_to_it, found, adapter)
    found |= given
    vae = found["VAE"] if "VAE" in named else settings.model.vae
    lora = settings.model.lora
    if lora is not None:
        lora = lora.model_copy(update={"path": found[_TEACHER_LORA]})
    model = settings.model.model_copy(update={"path": found["base"], "vae": vae, "lora": lora})
    texts = settings.encoder
    if isinstance(texts, TextEncoderConfig):
        texts = texts.model_copy(update={"path": found["encoder"]})
    return settings.model_copy(update={"model": model, "encoder": texts})


def with_lora_placed(settings: SamplingSettings, adapter: str) -> SamplingSettings:
    """The settings with the place of the teacher's LoRA, if they name one that an adapter may.

    Raises:
        ValueError: they name another.
    """
    lora = settings.model.lora
    if lora is None:
        return settings
    named = {_TEACHER_LORA: lora.path}
    found = resolve_places(named, adapter)
    _require_there(named, found, adapter)
    placed = lora.model_copy(update={"path": found[_TEACHER_LORA]})
    return settings.model_copy(update={"model": settings.model.model_copy(update={"lora": placed})})


def _takes(encoder: EncoderConfig, is_asked: bool) -> bool:
    """Whether a place is for this encoder: one that the user names, or a pipeline's folder."""
    return isinstance(encoder, TextEncoderConfig) and (is_asked or encoder.in_pipeline)


def _require_there(named: Mapping[str, str], found: Mapping[str, str], adapter: str) -> None:
    """Refuses names of folders that nobody finds here.

    Raises:
        ForeignDataError: says what the adapter calls them.
    """
    absent = {
        what: place
        for what, place in named.items()
        if what in ("base", "VAE", "encoder", _TEACHER_LORA)
        and is_name(place)
        and not storage.exists(found[what])
    }
    if absent:
        told = ", ".join(f"{what} {shown(repr(place))}" for what, place in absent.items())
        raise ForeignDataError(
            f"the adapter {adapter} was made with {told}, a place of another machine: "
            "say where it is with --base (a pipeline's or transformer's folder, s3://… or a name "
            "on the hub) and --encoder, or allow the folder that holds it with --allow (in Python: "
            "base=, encoder=, allowed=)"
        )


def _named(settings: SamplingSettings) -> dict[str, str]:
    """What is loaded -> the place that the settings name for it."""
    named = _places_of_model(settings.model)
    if isinstance(settings.encoder, TextEncoderConfig):
        return named | {"encoder": settings.encoder.path}
    others = _encoder_places(settings.encoder)
    return named | {f"encoder.{key}": place for key, place in others.items()}


def _places_of_model(model: ModelConfig) -> dict[str, str]:
    """The same of base and VAE."""
    vae = {} if model.vae is None else {"VAE": model.vae}
    lora = {} if model.lora is None else {_TEACHER_LORA: model.lora.path}
    return {"base": model.path, **vae, **lora}


def encode_prompts(
    settings: SamplingSettings,
    prompts: list[str],
    device: str = "cpu",
    encoder: TextEncoder | None = None,
    pictures: Sequence[Callable[[], torch.Tensor]] | None = None,
) -> Conditioning:
    """Conditioning of free prompts by the student's own text encoder, on the CPU.

    Args:
        device: where the encoder runs.
        encoder: the settings' one, if it is loaded already.
        pictures: each prompt's, as for `TextEncoder.encode_by_length`, of an encoder that reads
            them.

    Raises:
        ValueError: the encoder doesn't load, or can't take a prompt.
    """
    encoder = encoder or build_encoder(settings.encoder, device)
    encoded = encoder.encode(prompts, pictures=pictures)
    identity = encoder.identity
    tokens = torch.zeros(len(prompts), identity.max_tokens, identity.hidden_size)
    for row, prompt in zip(tokens, encoded, strict=True):
        row[: len(prompt.tokens)] = prompt.tokens
    pooled = [prompt.pooled for prompt in encoded if prompt.pooled is not None]
    return Conditioning(
        tokens,
        torch.tensor([len(prompt.tokens) for prompt in encoded]),
        torch.stack(pooled) if pooled else None,
    )


def _portable_encoder(encoder: EncoderConfig) -> EncoderConfig:
    """The same without paths of this machine; another package's kind is its own business."""
    if isinstance(encoder, TextEncoderConfig):
        return encoder.model_copy(update={"path": portable(encoder.path)})
    return encoder.absolute()


def _encoder_places(encoder: EncoderConfig) -> dict[str, str]:
    """Its keys that name places; in another package's encoder, what looks like one."""
    if isinstance(encoder, TextEncoderConfig):
        return {"path": encoder.path}
    dumped = encoder.model_dump(mode="json")
    return {key: value for key, value in dumped.items() if isinstance(value, str) and "/" in value}
