"""Class-conditional DiT in a few steps."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from torch import Tensor, nn

from piflow.backbones.dit.backbone import DiTBackbone
from piflow.inference.base import FewStepPipeline, few_step_call, refuse_guidance
from piflow.inference.in_place import PlainLatents


class PiDiTPipeline(FewStepPipeline, DiTPipeline):
    """`DiTPipeline` with a few-step student: the same call, by default in the trained steps.

    `guidance_scale` above 1 is refused: the student has its teacher's guidance learnt. The student
    is a copy of the transformer, which is left as it is.

    Args:
        adapter: folder or URI of the student's adapter. All others are `DiTPipeline`'s; a
            scheduler that isn't a `FlowMapScheduler` is replaced by the student's.

    Raises:
        ValueError: no adapter, or one that doesn't fit the transformer.
    """

    backbone_class = DiTBackbone
    takes_float32 = True

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: Any,
        id2label: dict[int, str] | None = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__(transformer, vae, scheduler, id2label)
        self._add_student(adapter, transformer, copied=copy.deepcopy(transformer))

    __call__ = few_step_call(DiTPipeline, num_inference_steps=None, guidance_scale=1.0)

    def call_arguments(self, prompt: str, height: int, width: int) -> dict[str, Any]:
        """The class that the prompt names; the size is the model's own."""
        return {"class_labels": [int(prompt)]}

    def _reader(self, arguments: dict[str, Any]) -> PlainLatents:
        refuse_guidance(arguments, "guidance_scale", ())
        return PlainLatents(self._student.head)

    def _sampling_transformer(self) -> DiTStudentTransformer:
        return DiTStudentTransformer(self._student.module, self.transformer)


class DiTStudentTransformer:
    """What `DiTPipeline`'s loop asks of its transformer, for a student's module.

    Args:
        module: (latents, 1000 sigma (B,), class numbers (B,)) -> tokens (B, HW/4, F).
        base: whose config and dtype it has.
    """

    def __init__(self, module: nn.Module, base: Any) -> None:
        self._module = module
        self.dtype: torch.dtype = base.dtype
        channels = base.config.in_channels
        self.config = SimpleNamespace(
            sample_size=base.config.sample_size, in_channels=channels, out_channels=channels
        )

    def __call__(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
    ) -> Transformer2DModelOutput:
        """`DiTTransformer2DModel`'s call; `sample` is the tokens."""
        tokens = self._module(hidden_states.to(self.dtype), timestep, class_labels)
        return Transformer2DModelOutput(sample=tokens)
