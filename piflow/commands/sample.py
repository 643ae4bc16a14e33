"""adapter + prompts -> pictures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from piflow.config import find_family

if TYPE_CHECKING:
    from torch import Tensor


def main(
    adapter: str,
    prompts: list[str],
    *,
    out: Path,
    count: int = 4,
    seed: int = 0,
    nfe: int | None = None,
    base: str | None = None,
    family: str | None = None,
) -> list[Path]:
    """Write `count` PNG pictures a prompt, with seeds from `seed` on, and a grid of them all.

    A picture depends on its prompt and seed alone, not on what else is drawn.

    Returns:
        The files written, the grid last.

    Raises:
        ValueError: an empty prompt, numbers of steps that the student doesn't run at, or an adapter
            that doesn't load.
    """
    if family is not None:
        find_family(family)  # the user's own word: adapters can't have modules imported
    if blank := [prompt for prompt in prompts if not prompt.strip()]:
        raise ValueError(f"expected a prompt that says something, got {blank[0]!r}")
    import torch
    from transformers.utils import logging as transformers_logging

    from piflow.backbones import build_codec
    from piflow.flow import draw_noise
    from piflow.inference.settings import encode_prompts, load_student
    from piflow.roles.heads import GMHead
    from piflow.sampling import check_nfe, sample_few_step

    transformers_logging.disable_progress_bar()
    trio, settings = load_student(adapter, base)
    few_step = settings.few_step if nfe is None else replace(settings.few_step, nfe=nfe)
    check_nfe(few_step.nfe, settings.few_step.nfe, elastic=isinstance(trio.head, GMHead))
    cond = encode_prompts(settings, prompts)
    codec = build_codec(settings.model)
    shape = codec.latent_shape(settings.height, settings.width)
    columns = []
    seeds = range(seed, seed + count)
    for number in seeds:
        noise = draw_noise((1, *shape), torch.Generator().manual_seed(number))
        latents = sample_few_step(
            lambda x, sigma: trio.student(x, sigma, cond),
            noise.expand(len(prompts), *shape),
            few_step,
        )
        columns.append(codec.decode(latents))
    return _write(torch.stack(columns, dim=1), prompts, seeds, out)


def _write(pictures: Tensor, prompts: list[str], seeds: range, out: Path) -> list[Path]:
    """One file a picture of (prompts, seeds, 3, H, W), and the grid."""
    from piflow.evaluation.sheet import grid, to_image

    out.mkdir(parents=True, exist_ok=True)
    files = []
    for prompt, row in zip(prompts, pictures, strict=True):
        for number, picture in zip(seeds, row, strict=True):
            files.append(out / f"{_slug(prompt)}-{number}.png")
            to_image(picture, upscale=4).save(files[-1])
    files.append(out / "grid.png")
    grid(list(pictures), prompts, [f"seed {number}" for number in seeds]).save(files[-1])
    print(f"{len(files) - 1} pictures and grid.png written to {out}")
    return files


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "prompt"
