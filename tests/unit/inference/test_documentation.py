"""The examples of docs/inference.md run as they stand, on tiny models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from piflow.backbones import (
    DiTBackbone,
    Flux2Backbone,
    FluxBackbone,
    FluxKontextBackbone,
    QwenImageBackbone,
    QwenImageEditBackbone,
    SD3Backbone,
    WanBackbone,
    ZImageBackbone,
)
from piflow.backbones.qwen_image_edit.tiny import small_pictures
from piflow.config import ConditionSizes, GMFlowPolicyConfig

PAGE = Path(__file__).parents[3] / "docs" / "inference.md"
SMALLER = {"1024": "16", "480": "16", "832": "32", "81": "5", '"cuda"': '"cpu"'}


def test_the_examples_run(
    flux_base: Path,
    kontext_base: Path,
    flux2_base: Path,
    qwen_base: Path,
    qwen_edit_base: Path,
    sd3_base: Path,
    z_image_base: Path,
    wan_base: Path,
    dit_base: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=4)
    bases = {
        "flux": (FluxBackbone, flux_base, "FLUX.1-dev"),
        "kontext": (FluxKontextBackbone, kontext_base, "FLUX.1-Kontext-dev"),
        "flux2": (Flux2Backbone, flux2_base, "FLUX.2-dev"),
        "qwen": (QwenImageBackbone, qwen_base, "Qwen-Image"),
        "qwen-edit": (QwenImageEditBackbone, qwen_edit_base, "Qwen-Image-Edit"),
        "sd3": (SD3Backbone, sd3_base, "stable-diffusion-3.5-large"),
        "z-image": (ZImageBackbone, z_image_base, "Z-Image"),
        "wan": (WanBackbone, wan_base, "Wan2.1-T2V-1.3B-Diffusers"),
        "dit": (DiTBackbone, dit_base, "DiT"),
    }
    for name, (backbone, base, published) in bases.items():
        (tmp_path / published).symlink_to(base)
        (tmp_path / f"{name}-student").symlink_to(make_adapter(backbone, base, policy))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 12
    Image.new("RGB", (40, 30), (200, 10, 10)).save("a.jpg")
    module = "diffusers.pipelines.flux.pipeline_flux_kontext"
    monkeypatch.setattr(f"{module}.PREFERRED_KONTEXT_RESOLUTIONS", [(16, 12), (16, 16)])
    values: dict[str, Any] = {}
    for block in blocks:
        for published, small in SMALLER.items():
            block = block.replace(published, small)
        with small_pictures(ConditionSizes(((12, 16),))):
            exec(block, values)
    with Image.open("heart.webp") as animation:
        assert animation.n_frames == len(values["frames"]) == 5
    assert values["image"].size == (16, 16) and len(values["images"]) == 2
    assert values["same"].scheduler.config.h == 0.5
    assert values["student"].transformer is values["teacher"].transformer
