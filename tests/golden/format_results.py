"""What is measured of the files in `formats`: by the version that wrote them, then by later ones.

`make_formats.py` calls these functions to write down what is expected, and
`tests/integration/test_formats.py` calls them to compare. Relative paths are those of the recipes:
the working directory is a copy of the golden run's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from piflow import storage
from piflow.backbones import Conditioning, build_codec
from piflow.config import Recipe
from piflow.data.batch import conditioning
from piflow.data.blocks import LocalReader
from piflow.data.reader import EmbeddingStore
from piflow.data.stream import TrainStream
from piflow.inference.settings import SamplingSettings, encode_prompts, load_student
from piflow.sampling import sample_few_step
from piflow.sharding.single import SingleStrategy
from piflow.training.build import assemble
from piflow.training.checkpoint_writer import restore_newest

ROOT = "/runs"  # where the golden runs were made: absolute paths in their files begin with it
STOPPED_AT = 2  # the step of the golden checkpoint
PROMPTS = ["a red heart", "blue fish"]  # which are drawn, by the adapter's own encoder
GENTLE = ["training.optimizer.lr=1.0e-6"]
"""For a run from step 0: Adam's first steps are as long for gradients that are rounding errors."""
SIGMA = 0.75  # where a policy's velocity is looked at, beside 1


@dataclass(frozen=True)
class Trained:
    """What some optimiser steps did.

    Attributes:
        start: steps done before, by the checkpoint that was found; 0 without one.
        losses: of each step.
        prompt_ids: of each step, in the order of its micro-batches.
        weights: `trainable.<name>` and `ema.<name>` after the last step.
    """

    start: int
    losses: list[float]
    prompt_ids: list[list[str]]
    weights: dict[str, Tensor]


def train(recipe: Recipe) -> Trained:
    """Go on from the newest checkpoint in the recipe's run folder to its last step, without Ray.

    Nothing is written.
    """
    device = torch.device("cpu")
    losses, prompt_ids = [], []
    with _one_thread():
        store = EmbeddingStore.open(recipe.embed.store)
        trainer = assemble(recipe, store, SingleStrategy(device), device).trainer
        state = restore_newest(
            recipe.run_dir,
            trainer,
            lambda uri: nullcontext(storage.local_folder(uri)),
            lambda text: None,
        )
        start = 0 if state is None else state.step
        stream = TrainStream(
            store,
            seed=recipe.seed,
            batch_size=recipe.training.batch_size,
            micro_batch_size=recipe.training.micro_batch_size,
            rank=0,
            world_size=1,
            start_sample=0 if state is None else state.samples,
            reader=LocalReader(),
            with_latents=recipe.objective.pictures == "store",
        )
        batches = iter(stream.batches())
        for step in range(start, recipe.training.steps):
            batch = next(batches)
            losses.append(trainer.step(step, batch.micro_batches).loss)
            prompt_ids.append([name for part in batch.micro_batches for name in part.prompt_ids])
    weights = {
        f"{section}.{name}": tensor.detach().clone()
        for section, tensors in (
            ("trainable", trainer.parameters),
            ("ema", trainer.ema_parameters),
        )
        for name, tensor in tensors.items()
    }
    return Trained(start, losses, prompt_ids, weights)


def decoded(store: str) -> dict[str, Tensor]:
    """Everything in a store as training reads it: its rows by number, then the empty prompt."""
    opened = EmbeddingStore.open(store)
    batch, empty = opened.read(range(opened.manifest.num_rows)), opened.empty_prompt()
    found = {"tokens": batch.tokens, "num_tokens": batch.num_tokens, "empty": empty.tokens}
    if batch.pooled is not None:
        found["pooled"] = batch.pooled
    for row, latent in enumerate(batch.latents or ()):
        found[f"latent.{row}"] = latent
    return found


ANYWHERE = ("/", "package://")  # what the stored adapters name


def noise_of(settings: SamplingSettings, count: int) -> Tensor:
    """Noise latents in the shape of an adapter's pictures."""
    shape = build_codec(settings.model).latent_shape(settings.height, settings.width)
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(0))


def student_settings(adapter: str, base: str, encoder: str) -> SamplingSettings:
    """An adapter's settings with a base and an encoder that lie elsewhere by now."""
    _, settings = load_student(adapter, base, allowed=ANYWHERE)
    moved = settings.encoder.model_copy(update={"path": encoder})
    return settings.model_copy(update={"encoder": moved})


def text_conditioning(settings: SamplingSettings) -> Conditioning:
    """What the adapter's own encoder makes of `PROMPTS`."""
    with _one_thread(), torch.no_grad():
        return encode_prompts(settings, PROMPTS)


def draw(adapter: str, base: str, store: str, noise: Tensor) -> dict[str, Tensor]:
    """A student's velocities, latents and pictures for the store's first prompts, from the noise.

    `velocity.1` and `velocity.later` are its policy's after one network evaluation at sigma = 1:
    there, and at `SIGMA`.
    """
    with _one_thread(), torch.no_grad():
        trio, settings = load_student(adapter, base, allowed=ANYWHERE)
        batch = EmbeddingStore.open(store).first_by_hash(len(noise))
        cond = conditioning(batch, torch.device("cpu"))
        begin = torch.ones(len(noise))
        policy = trio.student(noise, begin, cond)
        later = torch.full((len(noise),), SIGMA)
        latents = sample_few_step(
            lambda x, sigma: trio.student(x, sigma, cond),
            noise,
            settings.few_step,
        )
        return {
            "velocity.1": policy.velocity(noise, begin),
            "velocity.later": policy.velocity(0.9 * noise, later),
            "latents": latents,
            "pictures": build_codec(settings.model).decode(latents),
        }


def draw_by_pipeline(adapter: str, base: str, noise: Tensor) -> Tensor:
    """FLUX's diffusers pipeline with the adapter: pictures (B, H, W, 3) in [0, 1]."""
    from piflow.backbones.base import pack
    from piflow.inference import PiFluxPipeline

    with _one_thread():
        pipe = PiFluxPipeline.from_pretrained(base, adapter=adapter)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            prompt=PROMPTS, height=16, width=16, latents=pack(noise), output_type="np"
        ).images
    return torch.from_numpy(images)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As a Ray worker of one CPU computes: sums of floats come in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
