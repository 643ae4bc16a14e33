"""A student draws pictures of embedded prompts, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piflow.backbones import Codec, Conditioning
from piflow.flow import draw_noise
from piflow.roles.trio import Trio
from piflow.sampling import sample_few_step
from piflow.schedule import FewStep


def choose_device(asked: str) -> torch.device:
    """The device to compute on.

    Args:
        asked: "cpu", "cuda", or "auto": a GPU if there is one.

    Raises:
        ValueError: a GPU is asked for and PyTorch finds none.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        built = torch.version.cuda
        reason = "this PyTorch is built without CUDA" if built is None else "it finds no GPU"
        raise ValueError(
            f"expected a CUDA GPU for device cuda, but there is none: {reason} (PyTorch "
            f"{torch.__version__}); use cpu or auto, or run on a machine with one"
        )
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and available) else "cpu")


def draw_pictures(
    trio: Trio,
    codec: Codec,
    few_step: FewStep,
    cond: Conditioning,
    seeds: Sequence[int],
    size: tuple[int, int],
) -> Tensor:
    """Pictures `(B, 3, H, W)` on the CPU, not clamped, of B prompts with a seed each.

    A picture depends on its prompt and seed alone (up to rounding), not on what else is drawn.

    Args:
        cond: on the trio's device.
        size: (height, width) in pixels.

    Raises:
        ValueError: a size that the codec or the model doesn't take.
    """
    shape = codec.latent_shape(*size)
    noise = torch.cat(
        [draw_noise((1, *shape), torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    latents = sample_few_step(
        lambda x, sigma: trio.student(x, sigma, cond), noise.to(cond.tokens.device), few_step
    )
    return codec.decode(latents).cpu()
