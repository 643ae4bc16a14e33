"""Peak memory of a data-free iteration of the emoji model, by number of segments.

    python benchmarks/memory.py [--device cpu|cuda] [--batch 8] [--segments 1 2 4 8]

Data-free π-ID back-propagates each segment as soon as it has run, so an iteration needs the memory
of one segment, however many there are. The table sets it against the same iteration with one
backward pass at its end, both with every activation kept and with gradient checkpointing. Bytes are
what the allocator handed out above the level at the iteration's start (weights, gradients and
inputs are there already): on a CPU from torch's profiler, on a GPU from the caching allocator.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import peak_mebibytes
from torch import Tensor

from piflow.backbones import Conditioning, build_codec
from piflow.config import load_recipe
from piflow.roles.trio import Trio
from piflow.training.build import build_trio
from piflow.training.objective import PiIDObjective
from piflow.training.step import micro_batch_generator

RECIPE = Path(__file__).parent.parent / "pipelines" / "recipes" / "emoji-flux.yaml"
TOKENS = 12  # of a prompt, the recipe's encoder.max_tokens


@dataclass(frozen=True)
class Batch:
    """A micro-batch with made-up embeddings."""

    tokens: Tensor
    num_tokens: Tensor
    pooled: Tensor
    prompts: tuple[str, ...]
    height: int
    width: int
    index: int = 0
    latents: Tensor | None = None

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        return self.prompts


def make_batch(trio: Trio, size: int, length: int, side: int) -> Batch:
    """`size` prompts of `length` tokens, pictures of `side` pixels."""
    generator = torch.Generator().manual_seed(0)
    config = trio.backbone.config
    width, pooled = int(str(config["joint_attention_dim"])), config["pooled_projection_dim"]
    return Batch(
        torch.randn(size, length, width, generator=generator),
        torch.full((size,), length),
        torch.randn(size, int(str(pooled)), generator=generator),
        tuple(str(number) for number in range(size)),
        side,
        side,
    )


def iteration(
    segments: int, batch_size: int, device: torch.device, checkpointing: bool
) -> Callable[[bool], None]:
    """A data-free iteration of so many segments; its argument: each back-propagated at once."""
    recipe = load_recipe(RECIPE, [f"objective.nfe={segments}"])
    trio = build_trio(recipe, device=device)
    for module in trio.modules:
        module.to(device)
    if checkpointing:
        trio.enable_gradient_checkpointing()
    batch = make_batch(trio, batch_size, TOKENS, recipe.embed.height)
    negative = Conditioning(
        batch.tokens[:1].to(device), batch.num_tokens[:1].to(device), batch.pooled[:1].to(device)
    )
    objective = PiIDObjective(trio, build_codec(recipe.model), negative, recipe, device)

    def run(at_once: bool) -> None:
        parts: list[Tensor] = []
        for loss, last in objective.losses(batch, 0, micro_batch_generator(0, 0, 0)):
            parts.append(loss)
            del loss
            if at_once or last:
                torch.stack(parts).sum().backward()
                parts.clear()

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="peak memory of a data-free iteration")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--batch", type=int, default=8, help="samples of the micro-batch")
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 2, 4, 8], help="NFE, N")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {arguments.threads} threads, torch {torch.__version__}, ", end="")
    print(f"batch {arguments.batch}\n")
    print("| segments | gradient checkpointing | each at once, MiB | all at the end, MiB |")
    print("|---|---|---|---|")
    for checkpointing in (False, True):
        for count in arguments.segments:
            run = iteration(count, arguments.batch, device, checkpointing)
            run(True)  # gradients exist from here on
            at_once, late = (peak_mebibytes(partial(run, mode), device) for mode in (True, False))
            cells = [str(count), "yes" if checkpointing else "no", f"{at_once:.0f}", f"{late:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
