"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Literal

from piflow.config import BertEncoderConfig, Family, Published, TextEncoderConfig
from piflow.config.section import Positive


class SD3EncoderConfig(TextEncoderConfig):
    """Stable Diffusion 3's encoders: two CLIP models' states, then T5's; CLIP's pooled vectors."""

    module = "piflow.backbones.sd3.text"
    tiny = "piflow.backbones.sd3.tiny"

    type: Literal["sd3"] = "sd3"
    path: str
    """URI of a folder with text_encoder(_2, _3), tokenizer(_2, _3)."""

    max_tokens: Positive = 256
    """T5 tokens a prompt is padded or truncated to."""

    padding: Literal["keep", "drop"] = "keep"
    """keep: all states, as StableDiffusion3Pipeline feeds; drop: of T5 only the prompt's, zeros
    elsewhere (a smaller store, another conditioning than the pipeline's).
    """

    @property
    def keeps_padding(self) -> bool:
        """Whether `padding` says so."""
        return self.padding == "keep"


FAMILY = Family(
    backbone="piflow.backbones.sd3.backbone:SD3Backbone",
    encoders=(SD3EncoderConfig, BertEncoderConfig),
    packs_latents=False,  # the model cuts its patches itself
    tiny="piflow.backbones.sd3.tiny",
    pipeline="piflow.inference.sd3:PiSD3Pipeline",
    lora_files="diffusers.loaders.lora_pipeline:SD3LoraLoaderMixin",
    published=Published(
        "Stable Diffusion 3.5 large",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        repository="stabilityai/stable-diffusion-3.5-large",
    ),
)
