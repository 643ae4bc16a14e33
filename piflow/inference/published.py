"""What is taken of an adapter that doesn't say how it is sampled, such as the published ones.

Its class name tells the family, and the family's best known model is the base. A DX policy's file
holds its shift and the length of a segment; the number of evaluations otherwise stands in the
folder's name alone (``gmqwen_k8_piid_8step``), and is four where it doesn't.
"""

from __future__ import annotations

import re
from dataclasses import replace

from piflow import storage
from piflow.config import Family, ModelConfig, find_family
from piflow.config.encoder import EncoderConfig, TextEncoderConfig
from piflow.config.family import known_families, resolve
from piflow.roles.adapter import Adapter
from piflow.schedule import FewStep
from piflow.storage.foreign import shown

USUAL = FewStep(nfe=4, final_step_size_scale=0.5, shift=3.2, total_substeps=128)
MAX_NFE = 64  # as recipes have it
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


def family_of(class_name: str, where: str) -> str:
    """The family whose students have this `_class_name`.

    Raises:
        ValueError: no family of piflow's or of an installed package has.
    """
    for name in known_families():
        if class_name in resolve(find_family(name).backbone).adapter_class_names:
            return name
    raise ValueError(
        f"{where}: _class_name {shown(class_name)} is a student's of no family that is known here "
        f"({', '.join(known_families())}): install the package that brings it"
    )


def embedded_guidance_of(adapter: Adapter, family: Family) -> float | None:
    """That of the family's students, if the adapter's base takes one."""
    if family.published is None or not adapter.config.fields.get("guidance_embeds", True):
        return None
    return family.published.embedded_guidance


def model_of(name: str, family: Family, where: str, base: str | None) -> ModelConfig:
    """The family's best known model with its VAE; its place is `base`'s to say otherwise.

    Raises:
        ValueError: the family has no model on the hub, and no base is given.
    """
    repository = None if family.published is None else family.published.repository
    if repository is None and base is None:
        raise ValueError(
            f"{where} doesn't say which base it goes onto, and no model of the family {name} is on "
            "the hub: give the base's folder with --base"
        )
    path = base if repository is None else f"hf://{repository}/transformer"
    return ModelConfig(family=name, path=str(path), codec="vae", dtype="bfloat16")


def encoder_of(family: Family, base: str | None) -> EncoderConfig:
    """The family's own text encoder, of its best known model or the given base."""
    kind = family.encoders[0]
    if not issubclass(kind, TextEncoderConfig):
        return kind.model_validate({})
    repository = None if family.published is None else family.published.repository
    return kind.model_validate({"path": base if repository is None else f"hf://{repository}"})
