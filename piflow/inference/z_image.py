"""Z-Image in a few steps."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel

from piflow.backbones.z_image.backbone import ZImageBackbone
from piflow.inference.base import FewStepPipeline, few_step_call, refuse_sigmas
from piflow.inference.in_place import PlainLatents


class PiZImagePipeline(FewStepPipeline, ZImagePipeline):
    """`ZImagePipeline` with a few-step student: the same call, by default in the trained steps.

    `guidance_scale` above 0, where the family's guidance begins, is refused: the student has its
    teacher's guidance learnt.

    Args:
        adapter: folder or URI of the student's adapter. All others are `ZImagePipeline`'s; a
            scheduler that isn't a `FlowMapScheduler` is replaced by the student's.

    Raises:
        ValueError: no adapter, or one that doesn't fit the transformer.
    """

    backbone_class = ZImageBackbone
    takes_float32 = True

    def __init__(
        self,
        scheduler: Any,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: AutoTokenizer,
        transformer: ZImageTransformer2DModel,
        adapter: str | None = None,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self._add_student(adapter, transformer)

    __call__ = few_step_call(ZImagePipeline, num_inference_steps=None, guidance_scale=0.0)

    def _reader(self, arguments: dict[str, Any]) -> PlainLatents:
        refuse_sigmas(arguments)
        if arguments["guidance_scale"] > 0:
            raise ValueError(
                f"guidance_scale = {arguments['guidance_scale']:g}: the student has learnt its "
                "teacher's guidance and can't be guided again; leave guidance_scale out"
            )
        if arguments["joint_attention_kwargs"] is not None:
            raise ValueError(
                "joint_attention_kwargs: the student's transformer takes prompts alone, as in its "
                "training; leave it out"
            )
        if isinstance(arguments["prompt"], list):  # which the family's call would write into
            arguments["prompt"] = list(arguments["prompt"])
        return PlainLatents(self._student.head)

    def _sampling_transformer(self) -> ZImageStudentTransformer:
        return ZImageStudentTransformer(self._student.module, self.transformer)


class ZImageStudentTransformer:
    """What `ZImagePipeline`'s loop asks of its transformer, for a student's module.

    Args:
        module: (latents, time (B,), text states, their numbers) -> tokens (B, HW/4, F).
        base: whose config and dtype it has.
    """

    def __init__(self, module: nn.Module, base: Any) -> None:
        self._module = module
        self.dtype: torch.dtype = base.dtype
        self.config = base.config
        self.in_channels: int = base.in_channels

    def __call__(
        self,
        x: list[Tensor],
        t: Tensor,
        cap_feats: list[Tensor],
        joint_attention_kwargs: None,
        return_dict: bool,
    ) -> tuple[list[Tensor]]:
        """`ZImageTransformer2DModel`'s call; what it returns are the tokens.

        They are negative, since the loop, whose own model predicts x0 - noise, takes minus them.
        """
        latents = torch.stack(x).squeeze(2).to(self.dtype)
        text = pad_sequence(cap_feats, batch_first=True).to(self.dtype)
        counts = torch.tensor([len(states) for states in cap_feats], device=text.device)
        tokens: Tensor = self._module(latents, t, text, counts)
        return (list(-tokens),)
