"""FLUX.1-Kontext: FLUX.1's architecture, which is shown a picture and edits it."""

from __future__ import annotations

from piflow.backbones.flux import FluxEncoderConfig
from piflow.config import BertEncoderConfig, ConditionSizes, Family, Published

SIZES = (  # (height, width) that the published model was trained on, as its pipeline has them
    (1568, 672),
    (1504, 688),
    (1456, 720),
    (1392, 752),
    (1328, 800),
    (1248, 832),
    (1184, 880),
    (1104, 944),
    (1024, 1024),
    (944, 1104),
    (880, 1184),
    (832, 1248),
    (800, 1328),
    (752, 1392),
    (720, 1456),
    (688, 1504),
    (672, 1568),
)

FAMILY = Family(
    backbone="piflow.backbones.flux_kontext.backbone:FluxKontextBackbone",
    encoders=(FluxEncoderConfig, BertEncoderConfig),
    edits=ConditionSizes(SIZES),
    tiny="piflow.backbones.flux_kontext.tiny",
    pipeline="piflow.inference.flux_kontext:PiFluxKontextPipeline",
    lora_files="diffusers.loaders.lora_pipeline:FluxLoraLoaderMixin",
    published=Published(
        "FLUX.1-Kontext-dev",
        {"guidance_embeds": True},
        repository="black-forest-labs/FLUX.1-Kontext-dev",
        embedded_guidance=2.5,
    ),
)
