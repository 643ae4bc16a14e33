"""How far a teacher's velocity is off with its weights in codes (`model.base_weights`).

    python benchmarks/base_weights.py RECIPE [--prompts 10] [--device cpu|cuda] [--set KEY=VALUE]

As an fp8 teacher is measured in a run: the relative L2 error of the guided velocity, along the
exact teacher's Euler steps from noise, one a segment, on the first of the recipe's prompts. It
takes the base twice, as it is and in codes, so it is for a machine that holds both.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from piflow.backbones import Backbone, build_codec, load_backbone
from piflow.config import Recipe, load_recipe
from piflow.config.model import BaseWeights
from piflow.data.layout import recipe_prompts
from piflow.flow import draw_noise
from piflow.inference.settings import SamplingSettings, encode_prompts
from piflow.roles.base_weights import Coded, code_base
from piflow.roles.fp8 import velocity_error
from piflow.roles.guided import GuidedTeacher
from piflow.schedule import FewStep

Velocity = Callable[[Tensor, Tensor], Tensor]


def coded_copy(backbone: Any, kind: BaseWeights, device: torch.device) -> tuple[Backbone, Coded]:
    """The same model with its blocks' linear layers in codes."""
    made = copy.deepcopy(backbone)
    whole = dict(backbone.module.named_parameters())
    coded = code_base(
        made.module, made.block_classes, kind, lambda name, _: whole[name].detach(), device=device
    )
    return made, coded


@torch.no_grad()
def main() -> None:
    """Measure, and print a line for each kind of codes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], dest="keys")
    wanted = parser.parse_args()
    recipe, device = load_recipe(wanted.recipe, wanted.keys), torch.device(wanted.device)
    backbone = load_backbone(
        recipe.model, device=device, embedded_guidance=recipe.guidance.embedded
    )
    guided, noise, sigmas = _inputs(recipe, wanted.prompts, device)
    exact = guided(backbone)
    for kind in get_args(BaseWeights):
        made, coded = coded_copy(backbone, kind, device)
        off, length = velocity_error(guided(made), exact, noise, sigmas).tolist()
        print(
            f"{kind}: velocity off by {math.sqrt(off / length):.4f}, weights of {coded.layers} "
            f"layers by {coded.error:.4f}, in {coded.bytes / coded.before:.3f} of their bytes"
        )


def _inputs(
    recipe: Recipe, count: int, device: torch.device
) -> tuple[Callable[[Backbone], Velocity], Tensor, list[float]]:
    """A model's guided velocity on the prompts, the noise, and the noise levels."""
    settings = SamplingSettings.of(recipe).model_copy(update={"encoder": recipe.encoder})
    texts = [prompt.text for prompt in recipe_prompts(recipe).prompts[:count]]
    encoded = partial(encode_prompts, settings, device=device.type)
    cond = encoded(texts).to(device)
    negative = encoded([recipe.guidance.negative_prompt]).to(device)
    shape = build_codec(recipe.model).latent_shape(recipe.embed.height, recipe.embed.width)
    noise = draw_noise((len(texts), *shape), torch.Generator().manual_seed(recipe.seed), device)
    few_step = FewStep.of(recipe.distillation())
    sigmas = [few_step.schedule.sigma(segment.tau_src) for segment in few_step.segments]

    def guided(backbone: Any) -> Velocity:
        return GuidedTeacher(backbone, cond, negative, recipe.guidance)

    return guided, noise, [*sigmas, 0.0]


if __name__ == "__main__":
    main()
