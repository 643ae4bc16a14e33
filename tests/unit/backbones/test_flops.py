"""Operations as PyTorch counts them on an empty copy of the model: equal to the closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from piflow.backbones.transformer import TransformerBackbone
from tests.unit.models import case


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen_image", "sd3", "dit"])
def test_the_count_is_the_closed_form(family: str) -> None:
    backbone, (x, _, _) = case(family)
    height, width = x.shape[2:]
    for text in (4, 7):
        counted = TransformerBackbone.flops(backbone, height, width, text)
        assert counted == backbone.flops(height, width, text) > 0


def test_an_embedded_guidance_is_counted() -> None:
    from diffusers import FluxTransformer2DModel

    from piflow.backbones import FluxBackbone
    from tests.unit.models import MODELS

    config: dict[str, Any] = {**MODELS["flux"][1], "guidance_embeds": True}
    backbone = FluxBackbone(FluxTransformer2DModel(**config), embedded_guidance=3.5)
    plain, _ = case("flux")
    counted = TransformerBackbone.flops(backbone, 4, 8, 4)
    assert counted == backbone.flops(4, 8, 4) > TransformerBackbone.flops(plain, 4, 8, 4)


def test_counting_leaves_the_model_and_its_generator_alone() -> None:
    backbone, (x, sigma, cond) = case("flux")
    before, state = backbone(x, sigma, cond), torch.random.get_rng_state()
    TransformerBackbone.flops(backbone, 4, 8, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(backbone(x, sigma, cond), before)
