"""A whole family put to the test: its record, its tiny model, and diffusers' own pipeline.

The pipeline is what shows that sign, time, packing and positions are the model's own: an adapter
that is wrong in them is wrong in itself and consistent.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from piflow import storage
from piflow.backbones import Backbone, Conditioning, build_codec
from piflow.backbones.encoders import build_encoder
from piflow.backbones.flops import sample_flops
from piflow.backbones.load import family_class, with_frames
from piflow.backbones.transformer import TransformerBackbone
from piflow.config import (
    ConditionSizes,
    DXPolicyConfig,
    EncoderConfig,
    Family,
    GMFlowPolicyConfig,
    LoRAConfig,
    ModelConfig,
    find_family,
)
from piflow.config.family import resolve
from piflow.roles import lora
from piflow.roles.adapter import load_adapter, save_adapter
from piflow.roles.heads import PolicyClock
from piflow.roles.trio import Trio
from piflow.sharding.weights import fill
from piflow.storage.foreign import parse_object
from piflow.testing.conformance import CHECKS, require, require_close
from piflow.testing.models import save_model

_SIZE = 16  # pixels of the pictures' sides
_MAX_TOKENS = 16
_GUIDANCE = 3.5  # of models that take it as an input
_PROMPTS = ("a red heart", "cat", "3 dogs")
_CLASSES = ("3", "7", "0")
_STEPS = 2
_PICTURE_TOLERANCE = 1e-3  # of values from 0 to 1


class Skipped(Exception):
    """What a check would compare isn't there; says why."""


@dataclass(frozen=True)
class TinyFamily:
    """A family and a tiny random model of it, in a folder as a user has the real one.

    Attributes:
        name: as a recipe's `model.family`.
        embedded_guidance: what the model takes as an input, if it does.
    """

    name: str
    record: Family
    folder: Path
    model: ModelConfig
    encoder: EncoderConfig
    embedded_guidance: float | None

    @classmethod
    def made(cls, name: str, folder: Path) -> TinyFamily:
        """With the first kind of encoder that the record names.

        Raises:
            ValueError: there is no such family, or it brings no tiny model.
        """
        record = find_family(name)
        kind = record.encoders[0]
        tokens = _MAX_TOKENS if not kind.reads_pictures else 4 * _MAX_TOKENS
        settings = {"path": str(folder), "max_tokens": tokens}
        known = {key: value for key, value in settings.items() if key in kind.model_fields}
        encoder = kind.model_validate(known)
        place = str(folder / "transformer")
        frames = {} if record.video is None else {"frames": 1 + record.video.step}
        model = ModelConfig.model_validate(
            {"family": name, "path": place, "codec": "vae", **frames}
        )
        save_model(folder, model, encoder, size=_SIZE, guidance_embeds=True)
        return cls(name, record, folder, model, encoder, _guidance(model))

    def backbone(self, dtype: torch.dtype = torch.float32) -> Backbone:
        """Loaded afresh."""
        backbone = family_class(self.name).load(
            self.model.path, dtype=dtype, embedded_guidance=self.embedded_guidance
        )
        return with_frames(backbone, self.model)

    def empty(self, dtype: torch.dtype) -> Backbone:
        """Loaded without weights, which are then filled in, as sharded workers do."""
        backbone, sources = family_class(self.name).load_empty(
            self.model.path, dtype=dtype, embedded_guidance=self.embedded_guidance
        )
        with_frames(backbone, self.model)
        output = backbone.output_layer().parameters()
        require(
            not any(parameter.is_meta for parameter in output),
            "heads are made from the output layer, which is empty: name it in stored_output_names",
        )
        missing = {
            name: sources[parameter]
            for name, parameter in backbone.module.named_parameters()
            if parameter.is_meta
        }
        fill(backbone.module, missing, device="cpu")
        return backbone

    def conditioning(self, prompts: tuple[str, ...] | None = None) -> Conditioning:
        """Of prompts that differ, by the family's own encoder."""
        prompts = prompts or (_PROMPTS if self.takes_prompts else _CLASSES)
        encoder = build_encoder(self.encoder)
        pictures = None
        if self.encoder.reads_pictures:
            pictures = [partial(_edited_one, number) for number in range(len(prompts))]
        encoded = encoder.encode(prompts, pictures=pictures)
        length = encoder.identity.max_tokens  # what has no mask sees all of the padding
        if self.record.masks_text:
            length = max(len(prompt.tokens) for prompt in encoded)
        tokens = torch.zeros(len(prompts), length, encoder.identity.hidden_size)
        for row, prompt in zip(tokens, encoded, strict=True):
            row[: len(prompt.tokens)] = prompt.tokens
        pooled = [prompt.pooled for prompt in encoded if prompt.pooled is not None]
        return Conditioning(
            tokens,
            torch.tensor([len(prompt.tokens) for prompt in encoded]),
            torch.stack(pooled) if pooled else None,
            condition=self._condition(len(prompts)),
        )

    def _condition(self, count: int) -> Tensor | None:
        """Latents of as many pictures to be edited, if the family edits; of another size."""
        if self.record.edits is None:
            return None
        codec = build_codec(self.model)
        return torch.cat([codec.encode(_edited(number)) for number in range(count)])

    @property
    def takes_prompts(self) -> bool:
        """Whether it draws prompts, and not numbers of classes."""
        return "path" in type(self.encoder).model_fields

    def case(self) -> tuple[Backbone, Conditioning, tuple[int, int]]:
        """What the checks of an adapter take."""
        shape = build_codec(self.model).latent_shape(_SIZE, _SIZE)
        return self.backbone(), self.conditioning(), (shape[1], shape[2])

    def inputs(self) -> tuple[Tensor, Tensor, Conditioning]:
        """Latents, noise levels and prompts of three samples."""
        shape = build_codec(self.model).latent_shape(_SIZE, _SIZE)
        x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        return x, torch.tensor([1.0, 0.6, 0.2]), self.conditioning()


FamilyCheck = Callable[[TinyFamily], None]


def checks(family: TinyFamily) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check by name, those of the adapter first."""
    for check in CHECKS:
        yield check.__name__, partial(check, family.case)
    for of_family in FAMILY_CHECKS:
        yield of_family.__name__, partial(of_family, family)


def loaded_dtype(family: TinyFamily) -> None:
    """`dtype` is what was asked for, whatever diffusers keeps in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        for how, backbone in (
            ("load", family.backbone(dtype)),
            ("load_empty", family.empty(dtype)),
        ):
            require(backbone.dtype == dtype, f"{how} in {dtype}: dtype says {backbone.dtype}")
            x, sigma, cond = family.inputs()
            velocity = backbone.teacher_velocity(x, sigma, cond)
            require(velocity.dtype == torch.float32 and velocity.isfinite().all(), f"in {dtype}")


def empty_and_filled(family: TinyFamily) -> None:
    """A model that is loaded empty and filled is the loaded one, bit by bit."""
    for dtype in (torch.float32, torch.bfloat16):
        whole, filled = family.backbone(dtype), family.empty(dtype)
        expected, found = whole.module.state_dict(), filled.module.state_dict()
        require(expected.keys() == found.keys(), "other names")
        different = [
            name
            for name, value in expected.items()
            if value.dtype != found[name].dtype or not torch.equal(value, found[name])
        ]
        require(not different, f"{dtype}: {different[:3]} differ (stored_output_names?)")
        x, sigma, cond = family.inputs()
        same = torch.equal(
            filled.teacher_velocity(x, sigma, cond), whole.teacher_velocity(x, sigma, cond)
        )
        require(same, f"{dtype}: another velocity")


def declared_patch(family: TinyFamily) -> None:
    """The record, by which picture sizes are refused, and the backbone name one patch."""
    named, own = family.record.patch_size, family.backbone().patch_size
    require(named == own, f"the record's patch_size is {named}, the backbone's {own}")


def declared_sign(family: TinyFamily) -> None:
    """`velocity_sign` alone says which sign the model has; the output layer follows it."""
    kind: Any = family_class(family.name)
    if not issubclass(kind, TransformerBackbone):
        raise Skipped(f"{kind.__name__} declares no sign: no TransformerBackbone")
    require(kind.velocity_sign in (1, -1), f"velocity_sign is {kind.velocity_sign}, not 1 or -1")
    turned: Any = type(kind.__name__, (kind,), {"velocity_sign": -kind.velocity_sign})
    other = turned.load(family.model.path, embedded_guidance=family.embedded_guidance)
    with_frames(other, family.model)
    x, sigma, cond = family.inputs()
    expected = -family.backbone().teacher_velocity(x, sigma, cond)
    velocity = other.teacher_velocity(x, sigma, cond)
    require(torch.equal(velocity, expected), "the other sign doesn't give minus the velocity")
    other.install_output(other.output_layer())
    velocity = other.teacher_velocity(x, sigma, cond)
    require(torch.equal(velocity, expected), "the output layer's tokens have the model's sign")


def both_heads(family: TinyFamily) -> None:
    """GM and DX students begin as the teacher, learn, and come back from an adapter's files."""
    x, sigma, cond = family.inputs()
    clock = PolicyClock(1.0, 1.0)
    gm, dx = GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=4), DXPolicyConfig(num_points=2)
    for policy, its_clock in ((gm, None), (dx, clock)):
        trio = Trio.from_backbone(
            family.backbone(), LoRAConfig(rank=2), policy, its_clock,
            generator=torch.Generator().manual_seed(0), bias_noise=0.0,
        ).train(False)  # fmt: skip
        kind = policy.type
        first = trio.student(x, sigma, cond).velocity(x, sigma)
        teacher = trio.teacher_velocity(x, sigma, cond)
        require_close(first.detach(), teacher, 1e-4, f"{kind}: the student at its start")
        first.square().sum().backward()
        parameters = trio.trainable_parameters()
        unreached = [name for name, p in parameters.items() if p.grad is None]
        require(not unreached, f"{kind}: no gradient reaches {unreached[:3]}")
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        expected = trio.student(x, sigma, cond).velocity(x, sigma).detach()
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(
                folder, trio.backbone, parameters, policy, its_clock,
                base_model=family.name, dtype="float32",
            )  # fmt: skip
            again = Trio.from_adapter(family.backbone(), load_adapter(folder))
        with torch.no_grad():
            found = again.student(x, sigma, cond).velocity(x, sigma)
        require_close(found, expected, 1e-5, f"{kind}: the student of the adapter's files")


def published_size(family: TinyFamily) -> None:
    """The family's best known model has all LoRA targets, and operations that can be counted."""
    published = family.record.published
    if published is None:
        raise Skipped("the record names no published model")
    kind = family_class(family.name)
    if not issubclass(kind, TransformerBackbone):
        raise Skipped(f"{kind.__name__} can't be made without weights: no TransformerBackbone")
    backbone = kind.on_meta(published.config, embedded_guidance=published.embedded_guidance)
    names = lora.resolve_targets(
        backbone.module, backbone.default_lora_targets, skip=backbone.output_names
    )
    require(names, "no LoRA targets")
    side = 64 if family.takes_prompts else backbone.config["sample_size"]
    with torch.device("meta"):
        cond = backbone.blank_conditioning(32).editing(backbone.blank_condition(side, side))
    require(sample_flops(backbone, side, side, cond) > 0, "no operations")


def same_picture_as_the_pipeline(family: TinyFamily) -> None:
    """Two Euler steps of the teacher give the picture that the family's own pipeline draws."""
    pipe = _pipeline(family)
    if not hasattr(pipe.scheduler, "sigmas"):
        raise Skipped(f"a {type(pipe.scheduler).__name__} isn't flow matching's")
    prompt = (_PROMPTS if family.takes_prompts else _CLASSES)[0]
    with _first_input(pipe.transformer) as packed:
        expected = _drawn(pipe, family, prompt)
    backbone, codec = family.backbone(), build_codec(family.model)
    cond = family.conditioning((prompt,))
    shape = codec.latent_shape(_SIZE, _SIZE)
    x = _unpacked(backbone, cond, packed[0], shape)
    sigmas = pipe.scheduler.sigmas.double()
    for start, stop in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        velocity = backbone.teacher_velocity(x, torch.full((1,), start), cond)
        x = x + (stop - start) * velocity
    picture = (codec.decode(x) / 2 + 0.5).clamp(0, 1)
    inside = ((expected > 0.02) & (expected < 0.98)).float().mean()
    require(inside > 0.2 and expected.std() > 0.01, "the pipeline's picture says too little")
    require_close(picture, expected, _PICTURE_TOLERANCE, "the pipeline's picture")


def own_reference(family: TinyFamily) -> None:
    """The velocity is `reference(backbone, x, sigma, cond)` of the tiny model's module, if any."""
    reference = getattr(resolve(str(family.record.tiny)), "reference", None)
    if reference is None:
        raise Skipped("the tiny model's module has no function `reference`")
    x, sigma, cond = family.inputs()
    backbone = family.backbone()
    with torch.no_grad():
        expected = reference(backbone, x, sigma, cond)
    require_close(backbone.teacher_velocity(x, sigma, cond), expected, 1e-5, "the reference")


FAMILY_CHECKS: tuple[FamilyCheck, ...] = (
    loaded_dtype,
    empty_and_filled,
    declared_patch,
    declared_sign,
    both_heads,
    published_size,
    same_picture_as_the_pipeline,
    own_reference,
)


def _guidance(model: ModelConfig) -> float | None:
    """For a model that takes one by its config.json."""
    path = storage.join(model.path, "config.json")
    config = parse_object(storage.read_bytes(path), where=path)
    return _GUIDANCE if config.get("guidance_embeds") else None


def _pipeline(family: TinyFamily) -> Any:
    """diffusers' own, of the tiny model's folder."""
    from diffusers import DiffusionPipeline

    own_parts = getattr(resolve(str(family.record.tiny)), "own_parts", None)
    parts = {} if own_parts is None else own_parts(family.folder)
    pipe = DiffusionPipeline.from_pretrained(
        str(family.folder), local_files_only=True, trust_remote_code=False, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _edited(number: int) -> Tensor:
    """A picture (1, 3, H, W) in [-1, 1], of the levels that files have and of an odd size."""
    generator = torch.Generator().manual_seed(100 + number)
    levels = torch.randint(0, 256, (1, 3, _SIZE // 2, _SIZE), generator=generator)
    return levels / 127.5 - 1


def _edited_one(number: int) -> Tensor:
    """The same (3, H, W)."""
    return _edited(number)[0]


def _drawn(pipe: Any, family: TinyFamily, prompt: str) -> Tensor:
    """One picture (1, 3, H, W) from 0 to 1, unguided but by an input of the model.

    Of a video all frames, one below the other.
    """
    known = signature(type(pipe).__call__).parameters
    scale = family.embedded_guidance
    wanted: dict[str, Any] = {
        "height": _SIZE,
        "width": _SIZE,
        "max_sequence_length": _MAX_TOKENS,
        "num_frames": family.model.num_frames,
        "true_cfg_scale": 1.0,
    }
    if scale is not None or "true_cfg_scale" not in known:
        wanted["guidance_scale"] = family.record.unguided_scale if scale is None else scale
    given = {name: value for name, value in wanted.items() if name in known}
    given |= {"prompt": prompt} if "prompt" in known else {"class_labels": [int(prompt)]}
    if family.record.edits is not None:  # of the size that it has already
        given |= {"image": _edited(0) / 2 + 0.5, "max_area": _SIZE**2, "_auto_resize": False}
        given = {name: value for name, value in given.items() if name in known}
    if family.encoder.reads_pictures:
        levels = (_edited_one(0) * 127.5 + 127.5).round().byte()
        given["image"] = Image.fromarray(levels.movedim(0, -1).numpy())
    generator = torch.Generator().manual_seed(5)
    with small_pictures(family.record, ConditionSizes(((_SIZE // 2, _SIZE),))):
        drawn = pipe(**given, num_inference_steps=_STEPS, generator=generator, output_type="np")
    if family.record.video is not None:
        return torch.from_numpy(drawn.frames).permute(0, 4, 1, 2, 3).flatten(2, 3)
    return torch.from_numpy(drawn.images).permute(0, 3, 1, 2)


def small_pictures(record: Family, sizes: ConditionSizes) -> AbstractContextManager[None]:
    """Has the family's pipeline scale pictures to be edited to these sizes, if it scales to others.

    By the function of this name in the tiny model's module, if it has one.
    """
    own = getattr(resolve(str(record.tiny)), "small_pictures", None)
    return nullcontext() if own is None else own(sizes)


@contextmanager
def _first_input(transformer: nn.Module) -> Iterator[list[Tensor]]:
    """What the transformer is given as latents first, in the family's own layout."""
    found: list[Tensor] = []

    def note(module: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if not found:
            found.append(_latents_of(positional, named)[:1].detach().clone())

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def _latents_of(positional: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    latents: Any = named["hidden_states"] if "hidden_states" in named else positional[0]
    if isinstance(latents, list):  # of samples, with an axis of frames
        latents = torch.stack(latents).squeeze(2)
    found: Tensor = latents
    return found


def _unpacked(
    backbone: Backbone, cond: Conditioning, packed: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """The latents (1, C, H, W) for which the adapter gives its model `packed`.

    They are found by giving it numbered latents, which shows where each goes. Of a picture to be
    edited, which the model is given besides, both must be given the same.
    """
    count = math.prod(shape)
    numbered = torch.arange(count, dtype=torch.float32).reshape(1, *shape)
    with _first_input(backbone.module) as places:
        backbone.teacher_velocity(numbered, torch.ones(1), cond)
    given = places[0]
    both = given.shape == packed.shape
    if cond.condition is not None and both:
        noisy = given.shape[1] * count // given[0].numel()
        require_close(given[:, noisy:], packed[:, noisy:], 1e-5, "the picture to be edited")
        given, packed = given[:, :noisy], packed[:, :noisy]
    order = given.flatten().long()
    every = torch.equal(order.sort().values, torch.arange(count))
    require(
        every and both,
        f"the model is given {tuple(places[0].shape)}, which aren't the latents in another order; "
        f"by the pipeline it is given {tuple(packed.shape)}",
    )
    x = torch.empty(count)
    x[order] = packed.flatten().float()
    return x.reshape(1, *shape)
