"""Wan 2.1's videos in a few steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from piflow.backbones.wan import FAMILY
from piflow.backbones.wan.backbone import WanBackbone
from piflow.inference.base import FewStepPipeline, few_step_call, refuse_guidance
from piflow.inference.in_place import FramesApart


class PiWanPipeline(FewStepPipeline, WanPipeline):
    """`WanPipeline` with a few-step student: the same call, by default in the trained steps.

    `guidance_scale` above 1 is refused: the student has its teacher's guidance learnt. Videos have
    by default as many frames as the student was trained for.

    Args:
        adapter: folder or URI of the student's adapter. All others are `WanPipeline`'s; a scheduler
            that isn't a `FlowMapScheduler` is replaced by the student's.

    Raises:
        ValueError: no adapter, one that doesn't fit the transformer, or the parts of Wan 2.2.
    """

    backbone_class = WanBackbone
    takes_float32 = True
    vae_scale_factor_temporal: int

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: Any,
        transformer: WanTransformer3DModel,
        adapter: str | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        if transformer_2 is not None or boundary_ratio is not None or expand_timesteps:
            raise ValueError(
                "expected the parts of Wan 2.1, got a second transformer, boundary_ratio or "
                "expand_timesteps, which are Wan 2.2's: leave them out"
            )
        super().__init__(tokenizer, text_encoder, vae, scheduler, transformer)
        self._add_student(adapter, transformer)

    __call__ = few_step_call(
        WanPipeline, num_inference_steps=None, guidance_scale=1.0, num_frames=None
    )

    def call_arguments(self, prompt: str, height: int, width: int) -> dict[str, Any]:
        """What a call takes for a prompt as recipes have it, and a frame's size in pixels."""
        return {"prompt": prompt, "height": height, "width": width, "num_frames": self._frames}

    @property
    def _frames(self) -> int:
        """Frames of a video where a call names none: the trained number, or the family's."""
        usual = FAMILY.video.frames if FAMILY.video is not None else 1
        return self._student.training.frames or usual

    def _reader(self, arguments: dict[str, Any]) -> FramesApart:
        refuse_guidance(arguments, "guidance_scale", ())
        if arguments["attention_kwargs"] is not None:
            raise ValueError(
                "attention_kwargs: the student's transformer takes prompts alone, as in its "
                "training; leave it out"
            )
        if arguments["num_frames"] is None:
            arguments["num_frames"] = self._frames
        step = self.vae_scale_factor_temporal
        frames = (arguments["num_frames"] - 1) // step + 1
        if arguments["latents"] is not None:
            frames = arguments["latents"].shape[2]
        elif (arguments["num_frames"] - 1) % step or frames < 1:
            raise ValueError(
                f"num_frames: a video has 1 frame and a multiple of {step} more, got "
                f"{arguments['num_frames']}"
            )
        return FramesApart(self._student.head, frames)

    def _sampling_transformer(self) -> WanStudentTransformer:
        return WanStudentTransformer(self._student.module, self.transformer)


class WanStudentTransformer:
    """What `WanPipeline`'s loop asks of its transformer, for a student's module.

    Args:
        module: (latents (B, C, F, h, w), 1000·σ (B,), text states) -> tokens (B, Fhw/4, F').
        base: whose config and dtype it has.
    """

    def __init__(self, module: nn.Module, base: Any) -> None:
        self._module = module
        self.dtype: torch.dtype = base.dtype
        self.config = base.config

    def cache_context(self, name: str, **options: Any) -> AbstractContextManager[None]:
        """Nothing is kept from one step for the next: a few steps differ by much."""
        return nullcontext()

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_kwargs: None,
        return_dict: bool,
    ) -> tuple[Tensor]:
        """`WanTransformer3DModel`'s call; what it returns are the tokens."""
        latents = hidden_states.to(self.dtype)
        tokens: Tensor = self._module(latents, timestep, encoder_hidden_states.to(self.dtype))
        return (tokens,)
