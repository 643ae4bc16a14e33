"""A family of models: one record that says where its parts are, and how a recipe's name finds it.

The record is light, and so must the module be that holds it: recipes are read without torch. Its
heavy parts are named "module:attribute" and imported when they are used. A family is one folder
and one entry of `BUILT_IN`, or a package of somebody else's:

    model.family: flux                  ours
    model.family: bria                  an entry point of the group `piflow.families`
    model.family: bria_family           a module with a record called FAMILY
    model.family: models.bria           the same of a module in a package, or a record in a module
    model.family: models:BRIA           a record of any name, in a module

The workers of a run find it in the same way, so the package must be importable there too.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationInfo
from pydantic_core import PydanticKnownError

from piflow.config.conditions import ConditionSizes
from piflow.config.encoder import EncoderConfig
from piflow.config.video import Video

BUILT_IN = {  # name -> the module that holds its FAMILY
    "flux": "piflow.backbones.flux",
    "flux_kontext": "piflow.backbones.flux_kontext",
    "flux2": "piflow.backbones.flux2",
    "flux2_klein": "piflow.backbones.flux2_klein",
    "qwen_image": "piflow.backbones.qwen_image",
    "qwen_image_edit": "piflow.backbones.qwen_image_edit",
    "sd3": "piflow.backbones.sd3",
    "z_image": "piflow.backbones.z_image",
    "wan": "piflow.backbones.wan",
    "dit": "piflow.backbones.dit",
}
GROUP = "piflow.families"
_RECORD = "FAMILY"
_BERT = "bert"  # of families that take it, where a recipe's encoder has no type


@dataclass(frozen=True)
class Published:
    """A family's best known model, to plan with where a recipe's own isn't at hand.

    Attributes:
        name: as people call it.
        config: constructor arguments of its diffusers class that differ from the class's defaults.
        repository: its diffusers pipeline on the hub, ``owner/name``; None: there is none.
        size: pixels of a picture's sides.
        embedded_guidance: that its students are trained with; None: it takes none.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    repository: str | None = None
    size: int = 1024
    embedded_guidance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """What piflow knows of one family of models.

    Attributes:
        backbone: "module:class" of its `piflow.backbones.Backbone`.
        encoders: the kinds of prompt encoder that it takes, its own first.
        vaes: classes of the VAEs whose latents it takes; `piflow.backbones.codec` knows
            AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage and AutoencoderKLWan.
        packs_latents: whether config.json's `in_channels` counts the features of a packed 2×2
            patch, or the latents' channels.
        patch_size: side of the patch that a token is, in latent pixels; its backbone's.
        masks_text: whether its model keeps the text's padding out of attention, so that a batch may
            come without what none of its prompts fills.
        splits_tokens: whether its diffusers class has a plan for context parallelism, which is
            tried with it; not of a family that edits, or whose model is rebuilt.
        edits: how the picture is scaled that its model edits, and that every prompt brings; None:
            its model makes pictures of prompts alone.
        video: how long the videos are that its model makes; None: it makes pictures.
        unguided_scale: the `guidance_scale` at which its diffusers pipeline guides nothing: 1, or 0
            where the scale is that of what is added, one less than a recipe's `guidance.scale`.
        tiny: dotted name of a module that is a `piflow.backbones.tiny.TinyModel`, for
            `piflow smoke`; None: it can't be tried so.
        pipeline: "module:class" of its `piflow.inference.base.FewStepPipeline`; None: its students
            are sampled by `piflow sample` alone.
        lora_files: "module:class" of the diffusers mixin whose `lora_state_dict` knows how other
            trainers name the family's LoRA; None: only diffusers' own layout is read.
        published: its best known model, for `piflow plan` without the recipe's folder, and for
            adapters that don't say what they were made from.
        others: further known models of it, of other sizes, which such adapters are compared with.
        defaults: recipe keys, nested as in a recipe, for what a recipe of this family leaves out.
    """

    backbone: str
    encoders: tuple[type[EncoderConfig], ...]
    vaes: tuple[str, ...] = ("AutoencoderKL",)
    packs_latents: bool = True
    patch_size: int = 2
    masks_text: bool = False
    splits_tokens: bool = False
    edits: ConditionSizes | None = None
    video: Video | None = None
    unguided_scale: float = 1.0
    tiny: str | None = None
    pipeline: str | None = None
    lora_files: str | None = None
    published: Published | None = None
    others: tuple[Published, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def encoder_types(self) -> tuple[str, ...]:
        """What `encoder.type` may be."""
        return tuple(kind.model_fields["type"].default for kind in self.encoders)


@functools.cache
def find_family(name: str) -> Family:
    """The record that a recipe's `model.family` names.

    Raises:
        ValueError: there is none of this name, its module doesn't import, or it is something else.
    """
    reference = BUILT_IN.get(name) or _plug_ins().get(name, name)
    module_name, _, attribute = reference.partition(":")
    try:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            package, _, last = module_name.rpartition(".")
            if error.name != module_name or attribute or not package:
                raise
            module_name, attribute, module = package, last, importlib.import_module(package)
    except (ImportError, TypeError, ValueError) as error:  # the latter two: no name of a module
        raise ValueError(_unknown(name, f"importing it: {error}")) from error
    record = getattr(module, attribute or _RECORD, None)
    if not isinstance(record, Family):
        found = f"{module_name} has no piflow.config.Family called {attribute or _RECORD}"
        raise ValueError(_unknown(name, found))
    return record


def require_known(name: str, where: str) -> None:
    """Let a file name a family only if that imports nothing that nobody here asked for.

    A recipe is the user's own word, and may name any module. A file of somebody else's, such as an
    adapter, is data: it may name a family of ours, one that an installed package has registered, or
    one that this process has imported already.

    Raises:
        ValueError: the family is none of these; names `where` it stands, and what to do.
    """
    if name in BUILT_IN or name in _plug_ins():
        return
    module_name = name.partition(":")[0]
    package, _, last = module_name.rpartition(".")
    record = getattr(sys.modules.get(package), last, None)
    if module_name in sys.modules or isinstance(record, Family):
        return
    raise ValueError(
        f"{where} is of the family {name!r}, which no installed package has registered: a file of "
        "somebody else's must not have modules imported. If you know and trust that module, say "
        f"so with --family {name}, or register it as an entry point of the group {GROUP}"
    )


def resolve(reference: str) -> Any:
    """What "module" or "module:attribute" names.

    Raises:
        ValueError: there is no such thing.
    """
    module_name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
        return getattr(module, attribute) if attribute else module
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"a family's record names {reference}, which can't be imported: {error}; correct the "
            "record, or install what it needs"
        ) from error


def known_families() -> list[str]:
    """Names of ours, and of those that installed packages have registered."""
    return [*BUILT_IN, *sorted(_plug_ins().keys() - BUILT_IN.keys())]


def _plug_ins() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=GROUP)}


def _unknown(name: str, why: str) -> str:
    return (
        f"expected one of {', '.join(known_families())}, or a family of another package, named by "
        f"its module or module:attribute and importable here and on all workers; {name!r} is "
        f"neither ({why})"
    )


def encoder_kind(section: Mapping[str, Any], family: str | None) -> type[EncoderConfig]:
    """The class of an encoder's section, by its `type` and the family beside it.

    A kind of another family of ours is found too, so that it can be refused by its name.

    Args:
        family: None: not known, since it is wrong itself.

    Raises:
        PydanticKnownError: there is no such type.
    """
    own = () if family is None else find_family(family).encoders
    ours = (kind for name in BUILT_IN for kind in find_family(name).encoders)
    kinds: dict[Any, type[EncoderConfig]] = {}
    for kind in (*own, *ours):
        kinds.setdefault(kind.model_fields["type"].default, kind)
    takes_bert = not own or any(kind.model_fields["type"].default == _BERT for kind in own)
    tag = section.get("type", _BERT if takes_bert else next(iter(kinds)))
    if not isinstance(tag, str) or tag not in kinds:
        expected = ", ".join(repr(name) for name in kinds)
        context = {"discriminator": "type", "tag": str(tag), "expected_tags": expected}
        raise PydanticKnownError("union_tag_invalid", context)
    return kinds[tag]


def _of_kind(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        return value
    model = info.data.get("model")  # absent if it is wrong itself
    return encoder_kind(value, None if model is None else model.family).model_validate(value)


FamilyEncoder = Annotated[SerializeAsAny[EncoderConfig], BeforeValidator(_of_kind)]
"""The encoder section beside a `model` section, whose family says what kinds there are."""
