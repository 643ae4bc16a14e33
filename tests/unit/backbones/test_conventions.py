"""Conventions that a family declares: the sign, the time, and how large a token's patch is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from piflow.backbones import Conditioning, FluxBackbone
from piflow.backbones.base import pack, unpack
from piflow.config import DXPolicyConfig, GMFlowPolicyConfig, LoRAConfig, PolicyConfig
from piflow.roles.adapter import load_adapter, save_adapter
from piflow.roles.heads import PolicyClock
from piflow.roles.trio import Trio
from tests.conformance.conftest import OnePixelFlux
from tests.unit.models import case

GM = GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=8)
CLOCK = PolicyClock(segment_size=0.4, shift=3.2)


class OtherWay(FluxBackbone):
    """A FLUX that was trained to predict x0 - noise, with the time running from noise to data."""

    velocity_sign = -1

    @staticmethod
    def time_of(sigma: Tensor) -> Tensor:
        return 1 - sigma


def test_the_declared_time_and_sign_are_followed() -> None:
    plain, (x, sigma, cond) = case("flux")
    other = OtherWay(case("flux")[0].module)
    expected = -plain.teacher_velocity(x, 1 - sigma, cond)
    assert torch.equal(other.teacher_velocity(x, sigma, cond), expected)
    assert torch.equal(other.output_layer().projection.weight, -plain.module.proj_out.weight)
    assert torch.equal(other.module.proj_out.weight, plain.module.proj_out.weight), "as in files"


@pytest.mark.parametrize("policy", [GM, DXPolicyConfig(num_points=3, mode="grid")])
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2, dropout=0.0), None])
def test_students_of_the_other_sign_begin_as_their_teacher(
    policy: PolicyConfig, lora: LoRAConfig | None
) -> None:
    backbone, (x, sigma, cond) = OtherWay(case("flux")[0].module), case("flux")[1]
    expected = backbone.teacher_velocity(x, sigma, cond)
    trio = Trio.from_backbone(
        backbone, lora, policy, CLOCK, generator=torch.Generator(), bias_noise=0.0
    ).train(False)
    assert torch.equal(trio.teacher_velocity(x, sigma, cond), expected)
    found = trio.student(x, sigma, cond).velocity(x, sigma)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def single_pixels() -> tuple[FluxBackbone, OnePixelFlux, Tensor, Tensor, Conditioning]:
    """One module as both, latents of single pixels, and what goes with them."""
    plain, (x, sigma, cond) = case("flux")
    single = OnePixelFlux(case("flux")[0].module)
    return plain, single, unpack(pack(x), 2, 4, 1), sigma, cond


def test_patches_of_a_pixel_are_the_same_tokens() -> None:
    plain, single, x, sigma, cond = single_pixels()
    assert (single.latent_channels, plain.latent_channels) == (16, 4)
    velocity = single.teacher_velocity(x, sigma, cond)
    expected = plain.teacher_velocity(unpack(pack(x, 1), 4, 8), sigma, cond)
    assert torch.equal(pack(velocity, 1), pack(expected))
    with pytest.raises(ValueError, match="must be multiples of 3, got 4×8"):
        pack(torch.zeros(1, 4, 4, 8), 3)


@pytest.mark.parametrize("policy", [GM, DXPolicyConfig(num_points=3, mode="grid")])
def test_students_of_single_pixels(policy: PolicyConfig, tmp_path: Path) -> None:
    _, single, x, sigma, cond = single_pixels()
    expected = single.teacher_velocity(x, sigma, cond)
    clock = CLOCK if isinstance(policy, DXPolicyConfig) else None
    trio = Trio.from_backbone(
        single, LoRAConfig(rank=2, dropout=0.0), policy, clock,
        generator=torch.Generator(), bias_noise=0.0,
    ).train(False)  # fmt: skip
    made = trio.student(x, sigma, cond)
    torch.testing.assert_close(made.velocity(x, sigma), expected, atol=2e-5, rtol=0)
    parameters = trio.trainable_parameters()
    save_adapter(str(tmp_path), single, parameters, policy, clock, base_model="x", dtype="float32")
    adapter = load_adapter(str(tmp_path))
    again = Trio.from_adapter(OnePixelFlux(case("flux")[0].module), adapter)
    found = again.student(x, sigma, cond)
    assert torch.equal(found.velocity(x, sigma), made.velocity(x, sigma))
    if isinstance(policy, GMFlowPolicyConfig):
        assert adapter.config.fields["logweights_channels"] == 1
        other = replace(adapter.config, fields={**adapter.config.fields, "logweights_channels": 4})
        with pytest.raises(ValueError, match=r"logweights_channels 4 \(base: 1\)"):
            replace(adapter, config=other).check_fits(OnePixelFlux(case("flux")[0].module))
