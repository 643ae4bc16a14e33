"""Adapters of Bria that are wrong in one way each, which the checks of a family must find."""

from __future__ import annotations

from typing import Any

import torch
from bria_family import FAMILY
from bria_family.backbone import BriaBackbone
from torch import Tensor

from piflow.backbones import Conditioning
from piflow.backbones.base import pack
from piflow.backbones.flux.backbone import image_ids
from piflow.config import Family


class OtherSign(BriaBackbone):
    """Predicts x0 - noise."""

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return -super().output_tokens(x, sigma, cond)


class OtherTime(BriaBackbone):
    """Takes sigma where the model was trained with 1000 sigma."""

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return super().output_tokens(x, sigma / 1000, cond)


class OtherPatches(BriaBackbone):
    """Packs position by position, consistently."""

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        tokens: Tensor = self.module(
            hidden_states=pack(x).unflatten(2, (-1, 4)).mT.flatten(2),
            timestep=sigma * 1000,
            encoder_hidden_states=cond.tokens,
            img_ids=image_ids(x.shape[2], x.shape[3], x.device),
            txt_ids=torch.zeros(cond.tokens.shape[1], 3),
            return_dict=False,
        )[0]
        return tokens.unflatten(2, (4, -1)).mT.flatten(2)


class OtherDtype(BriaBackbone):
    """Takes its dtype from a parameter that stays in float32."""

    def __init__(self, module: Any, **options: Any) -> None:
        super().__init__(module, **options)
        first = next(self.module.parameters())
        first.data = first.data.float()
        self.dtype = first.dtype


class OtherStoredNames(BriaBackbone):
    """Doesn't say where the files have its output layer's projection."""

    stored_output_names = ("norm_out",)


class OtherFields(BriaBackbone):
    """Leaves out a field that readers of an adapter need."""

    adapter_fields = tuple(field for field in BriaBackbone.adapter_fields if field != "in_channels")


class DropsText(BriaBackbone):
    """Ignores the prompt."""

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        blank = Conditioning(torch.zeros_like(cond.tokens), cond.num_tokens)
        return super().output_tokens(x, sigma, blank)


def _record(backbone: type[BriaBackbone]) -> Family:
    own = vars(FAMILY)
    return Family(**{**own, "backbone": f"wrong_families:{backbone.__name__}"})


SIGN, TIME, PATCHES = _record(OtherSign), _record(OtherTime), _record(OtherPatches)
DTYPE, STORED, FIELDS = _record(OtherDtype), _record(OtherStoredNames), _record(OtherFields)
TEXT = _record(DropsText)
