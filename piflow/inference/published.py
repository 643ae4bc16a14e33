"""What is taken of an adapter that doesn't say how it is sampled, such as the published ones.

Its class name and sizes tell the family and which of its known models is the base. A DX policy's
file holds its shift and the length of a segment; the number of evaluations otherwise stands in the
folder's name alone (``gmqwen_k8_piid_8step``), and is four where it doesn't.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from typing import Any

from piflow import storage
from piflow.backbones import Backbone
from piflow.backbones.transformer import TransformerBackbone
from piflow.config import Family, ModelConfig, Published, find_family
from piflow.config.encoder import EncoderConfig, TextEncoderConfig
from piflow.config.family import known_families, resolve
from piflow.roles.adapter import Adapter, AdapterConfig
from piflow.schedule import FewStep
from piflow.storage.foreign import shown

USUAL = FewStep(nfe=4, final_step_size_scale=0.5, shift=3.2, total_substeps=128)
MAX_NFE = 64  # as recipes have it
_OF_THE_HEAD = ("out_channels", "patch_size")  # in a student's config, where the base has its own
_STEPS = re.compile(r"(?<![a-z0-9])(\d{1,3})[-_ ]?steps?(?![a-z])", re.IGNORECASE)


def few_step_of(adapter: Adapter, where: str) -> FewStep:
    """The schedule that the adapter was trained on, by its policy and its folder's name.

    Args:
        where: path or URI of its folder.

    Raises:
        ValueError: fewer steps in the name than the policy's segments span, or a number that no
            student was trained for.
    """
    named = steps_in_name(storage.base_name(where))
    clock = adapter.config.clock()
    if clock is None:
        return USUAL if named is None else replace(USUAL, nfe=named)
    least = _fewest_steps(clock.segment_size)
    if named is not None and named < least:
        raise ValueError(
            f"{where}: its name says {named} steps, but its policy's segments of "
            f"{clock.segment_size:g} are those of {least}: give the folder its right name"
        )
    return replace(USUAL, nfe=named or least, shift=clock.shift)


def _fewest_steps(segment_size: float) -> int:
    """Evaluations whose segments, h = 1 / (N - 1 + f), a DX policy of this length spans."""
    steps = range(1, MAX_NFE + 1)
    fits = (nfe for nfe in steps if replace(USUAL, nfe=nfe).segment_size <= segment_size + 1e-6)
    return next(fits, MAX_NFE)


def steps_in_name(name: str) -> int | None:
    """The 8 of ``gmflux_k8_piid_8step``; None: the name says none.

    Raises:
        ValueError: several numbers, or one that no student was trained for.
    """
    found = {int(number) for number in _STEPS.findall(name)}
    if not found:
        return None
    if len(found) > 1 or not 1 <= min(found) <= MAX_NFE:
        raise ValueError(
            f"{shown(name)}: expected one number of steps in the name, 1 to {MAX_NFE}, got "
            f"{', '.join(map(str, sorted(found)))}: give the folder another name"
        )
    return found.pop()


def base_of(config: AdapterConfig, where: str) -> tuple[str, Published | None]:
    """The family of a student that notes none, and which of its known models it goes onto.

    Several families may share one class: then the sizes in the student's config tell them apart.
    Of one family alone, a student of another size is taken for its best known model's, to which
    the user may name another base.

    Raises:
        ValueError: no family of piflow's or of an installed package has students of this class, or
            several have and none of their known models, or models of several, has these sizes.
    """
    kinds = {name: resolve(find_family(name).backbone) for name in known_families()}
    kinds = {n: kind for n, kind in kinds.items() if config.class_name in kind.adapter_class_names}
    # published students make pictures of prompts: a family of the same class that edits isn't meant
    kinds = {n: kind for n, kind in kinds.items() if find_family(n).edits is None} or kinds
    if not kinds:
        raise ValueError(
            f"{where}: _class_name {shown(config.class_name)} is a student's of no family that is "
            f"known here ({', '.join(known_families())}): install the package that brings it"
        )
    models = [(name, model) for name in kinds for model in _models(find_family(name))]
    found = [(name, model) for name, model in models if _goes_onto(config, kinds[name], model)]
    if len({name for name, _ in found}) == 1:
        return found[0]
    if len(kinds) == 1:
        only = next(iter(kinds))
        return only, find_family(only).published
    known = ", ".join(f"{model.name} ({name})" for name, model in models)
    raise ValueError(
        f"{where} doesn't say what it was made from, and by its _class_name "
        f"{shown(config.class_name)} it may be of {' or '.join(kinds)}: its sizes are those of "
        f"{'several' if found else 'none'} of {known}. Export it with `piflow export`, which notes "
        "the family"
    )


def _models(family: Family) -> tuple[Published, ...]:
    return () if family.published is None else (family.published, *family.others)


def _goes_onto(config: AdapterConfig, kind: type[Backbone], model: Published) -> bool:
    """Whether a student's config repeats this model's."""
    base = {**_defaults_of(kind), **model.config}
    repeated = (name for name in kind.adapter_fields if name not in _OF_THE_HEAD)
    told = json.loads(json.dumps({name: base[name] for name in repeated if name in base}))
    return all(config.fields[name] == told[name] for name in told if name in config.fields)


def _defaults_of(kind: type[Backbone]) -> dict[str, Any]:
    """Constructor arguments of a family's diffusers class that have a default."""
    if not issubclass(kind, TransformerBackbone):
        return {}
    parameters = inspect.signature(kind.model_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def embedded_guidance_of(adapter: Adapter, published: Published | None) -> float | None:
    """That of the family's students, if the adapter's base takes one."""
    if published is None or not adapter.config.fields.get("guidance_embeds", True):
        return None
    return published.embedded_guidance


def model_of(name: str, published: Published | None, where: str, base: str | None) -> ModelConfig:
    """A known model with its VAE; its place is `base`'s to say otherwise.

    Raises:
        ValueError: it isn't on the hub, and no base is given.
    """
    repository = None if published is None else published.repository
    if repository is None and base is None:
        raise ValueError(
            f"{where} doesn't say which base it goes onto, and no model of the family {name} is on "
            "the hub: give the base's folder with --base"
        )
    path = base if repository is None else f"hf://{repository}/transformer"
    return ModelConfig(family=name, path=str(path), codec="vae", dtype="bfloat16")


def encoder_of(family: Family, published: Published | None, base: str | None) -> EncoderConfig:
    """The family's own text encoder, of the known model or the given base."""
    kind = family.encoders[0]
    if not issubclass(kind, TextEncoderConfig):
        return kind.model_validate({})
    repository = None if published is None else published.repository
    return kind.model_validate({"path": base if repository is None else f"hf://{repository}"})
