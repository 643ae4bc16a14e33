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
    """Declares that the model predicts x0 - noise."""

    velocity_sign = -1


class SignByHand(BriaBackbone):
    """Has the other sign in the model's tokens, its declared sign to match, but not in heads."""

    velocity_sign = -1

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self.model_tokens(x, self.time_of(sigma), cond)


class OtherTime(BriaBackbone):
    """Takes sigma where the model was trained with 1000 sigma."""

    @staticmethod
    def time_of(sigma: Tensor) -> Tensor:
        return sigma


class TimeByHand(BriaBackbone):
    """Gives the model its time past `time_of`."""

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self.model_tokens(x, 1000 * sigma, cond)


class OtherPatches(BriaBackbone):
    """Packs position by position, consistently."""

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        tokens: Tensor = self.module(
            hidden_states=pack(x).unflatten(2, (-1, 4)).mT.flatten(2),
            timestep=time,
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

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        blank = Conditioning(torch.zeros_like(cond.tokens), cond.num_tokens)
        return super().model_tokens(x, time, blank)


def _record(backbone: type[BriaBackbone]) -> Family:
    own = vars(FAMILY)
    return Family(**{**own, "backbone": f"wrong_families:{backbone.__name__}"})


SIGN, TIME, PATCHES = _record(OtherSign), _record(OtherTime), _record(OtherPatches)
DTYPE, STORED, FIELDS = _record(OtherDtype), _record(OtherStoredNames), _record(OtherFields)
TEXT, SIGN_BY_HAND, TIME_BY_HAND = _record(DropsText), _record(SignByHand), _record(TimeByHand)
