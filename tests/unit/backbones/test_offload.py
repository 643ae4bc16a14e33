"""Models whose weights come to the device a part at a time compute what they compute there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers.hooks
import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

from piflow.backbones import load_backbone
from piflow.backbones.dit import ClassLabelEncoderConfig
from piflow.backbones.flux import FluxEncoderConfig
from piflow.backbones.flux2 import Flux2EncoderConfig
from piflow.backbones.offload import fits, place, weight_bytes
from piflow.backbones.qwen_image import QwenImageEncoderConfig
from piflow.backbones.sd3 import SD3EncoderConfig
from piflow.config import EncoderConfig, GMFlowPolicyConfig, LoRAConfig, ModelConfig
from piflow.inference.settings import SamplingSettings, encode_prompts
from piflow.roles.trio import Trio
from piflow.testing.models import save_model

CPU = torch.device("cpu")
ENCODERS: dict[str, Callable[[str], EncoderConfig]] = {
    "flux": lambda path: FluxEncoderConfig(path=path, max_tokens=16),
    "flux2": lambda path: Flux2EncoderConfig(path=path, max_tokens=16),
    "qwen_image": lambda path: QwenImageEncoderConfig(path=path, max_tokens=16),
    "sd3": lambda path: SD3EncoderConfig(path=path, max_tokens=16),
    "dit": lambda path: ClassLabelEncoderConfig(),
}


@pytest.fixture
def onloaded(monkeypatch: pytest.MonkeyPatch) -> list[ModuleGroup]:
    """Weights that aren't at work are NaN (or, of integers, 0): who reads them computes nonsense.

    Returns:
        The parts whose weights came back, in that order.
    """
    calls: list[ModuleGroup] = []
    kept: dict[Tensor, Tensor] = {}

    def tensors(group: ModuleGroup) -> list[Tensor]:
        own = [(*module.parameters(), *module.buffers()) for module in group.modules]
        return [*chain.from_iterable(own), *group.parameters, *group.buffers]

    def onload(group: ModuleGroup) -> None:
        calls.append(group)
        for tensor in tensors(group):
            tensor.data = kept.get(tensor, tensor.data)

    def offload(group: ModuleGroup) -> None:
        for tensor in tensors(group):
            kept.setdefault(tensor, tensor.data)
            nothing = float("nan") if tensor.is_floating_point() else 0
            tensor.data = torch.full_like(tensor.data, nothing)

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    return calls


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_offloading_changes_no_bit(
    family: Any, tmp_path: Path, onloaded: list[ModuleGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text encoder, teacher and student with LoRA and head, of every family."""
    encoder = ENCODERS[family](str(tmp_path))
    model = ModelConfig(family=family, path=str(tmp_path / "transformer"), codec="vae")
    save_model(tmp_path, model, encoder, size=16)
    prompts = ["3", "4"] if family == "dit" else ["red heart", "cat"]

    settings = SamplingSettings(
        model=model, encoder=encoder, height=16, width=16, nfe=2, final_step_size_scale=1.0,
        shift=1.0, total_substeps=8, embedded_guidance=None,
    )  # fmt: skip
    cond = encode_prompts(settings, prompts)
    monkeypatch.setattr("piflow.backbones.text.place", partial(place, offload="always"))
    again = encode_prompts(settings, prompts)
    assert torch.equal(again.tokens, cond.tokens)
    assert bool(onloaded) == (family != "dit"), "class labels have no model"
    onloaded.clear()
    trio = _trio(model)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.4])

    def velocities() -> list[Tensor]:
        policy = trio.student(x, sigma, cond)
        return [policy.velocity(x, sigma), trio.teacher_velocity(x, sigma, cond)]

    expected = velocities()
    for module in trio.modules:
        place(module, CPU, "base", "always")
        assert any(parameter.isnan().any() for parameter in module.parameters())
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(velocities(), expected, strict=True))
    assert len(onloaded) >= 2 * 2 * 2, "two calls of two roles, of two blocks at least"


def _trio(model: ModelConfig) -> Trio:
    backbone = load_backbone(model)
    policy = GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=8)
    generator = torch.Generator().manual_seed(0)
    return Trio.from_backbone(
        backbone, LoRAConfig(rank=2), policy, None, generator=generator
    ).train(False)


def test_what_fits_is_placed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert weight_bytes(model) == 4 * (20 + 8 + 8) + 8
    monkeypatch.setattr(diffusers.hooks, "apply_group_offloading", None)
    assert place(model, CPU, "model") is model
    assert place(model, CPU, "model", "never") is model
    assert fits(75, 100) and not fits(76, 100) and fits(10**12, None)
