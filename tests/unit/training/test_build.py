"""A recipe put together on one process without Ray, and trained for a few steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from piflow.backbones import Conditioning, FluxBackbone
from piflow.config import Recipe, parse_recipe
from piflow.data.blocks import LocalReader
from piflow.data.online import SAMPLE_PROMPTS
from piflow.data.reader import EmbeddingStore
from piflow.data.stream import TrainStream
from piflow.sharding.single import SingleStrategy
from piflow.training.build import SAMPLE_SEEDS, Assembly, allow_tf32, assemble
from piflow.training.objective import PiIDObjective

NAMES = ["red heart", "pizza", "ghost", "sunflower", "airplane", "tent"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(make_flux_store: Callable[..., EmbeddingStore]) -> EmbeddingStore:
    return make_flux_store(NAMES, height=32, width=32)


def recipe(store: EmbeddingStore, flux_folder: Path, **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "run_dir": "unused",
            "model": {"path": str(flux_folder)},
            "encoder": {"path": "unused", "max_tokens": 4},
            "embed": {"prompts": "p.txt", "store": store.uri, "height": 32, "width": 32},
            "objective": {"type": "pi_id", "nfe": 2, "total_substeps": 16},
            "guidance": {"scale": 2.0},
            "policy": {"num_gaussians": 3, "logstd_inner_dim": 8},
            "lora": {"rank": 4},
            "training": {
                "batch_size": 4,
                "micro_batch_size": 2,
                "optimizer": {"lr": 1e-2, "warmup_steps": 0},
                "ema": {"start": 0},
            },
            **sections,
        }
    )


def stream_of(store: EmbeddingStore) -> TrainStream:
    """The only rank's."""
    return TrainStream(
        store.uri,
        seed=0,
        batch_size=4,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        reader=LocalReader(),
    )


def train(ours: Recipe, store: EmbeddingStore, steps: int) -> tuple[Assembly, list[float]]:
    assembly = assemble(ours, store, SingleStrategy(CPU), CPU)
    stream = stream_of(store)
    batches = stream.batches()
    losses = [
        assembly.trainer.step(batch.step, batch.micro_batches).loss
        for batch in islice(batches, steps)
    ]
    batches.close()
    return assembly, losses


KINDS: dict[str, dict[str, Any]] = {
    "data-free": {},
    "data-dependent": {"objective": {"nfe": 2, "data": "dependent", "pictures": "emoji"}},
    "dx": {"policy": {"type": "dx", "num_points": 3}},
    "full": {"lora": None, "policy": {"type": "dx", "mode": "polynomial", "num_points": 3}},
    "flow-matching": {"objective": {"type": "flow_matching"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_trains_and_repeats(kind: str, store: EmbeddingStore, flux_folder: Path) -> None:
    ours = recipe(store, flux_folder, **KINDS[kind])
    assembly, losses = train(ours, store, 3)
    again, same = train(ours, store, 3)
    assert losses == same and len(set(losses)) == 3
    for name, parameter in assembly.trainer.parameters.items():
        assert torch.equal(parameter, again.trainer.parameters[name]), name
        average = assembly.trainer.ema_parameters[name]
        assert average.shape == parameter.shape and not average.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_training_are_those_of_its_calls(
    kind: str, store: EmbeddingStore, flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sample that goes through the backbone, with its backward pass if it has one."""
    calls: list[tuple[int, bool]] = []
    call = FluxBackbone.output_tokens

    def count(backbone: Any, x: Any, sigma: Any, cond: Any) -> Any:
        calls.append((len(x), torch.is_grad_enabled()))
        return call(backbone, x, sigma, cond)

    monkeypatch.setattr(FluxBackbone, "output_tokens", count)
    ours = recipe(store, flux_folder, **KINDS[kind])
    assembly, _ = train(ours, store, 1)
    stream = stream_of(store)
    batch = next(iter(stream.batches())).micro_batches[0]
    forward = FluxBackbone.load(flux_folder).flops(16, 16, batch.tokens.shape[1])
    weights = 1 if ours.lora and kind != "flow-matching" else 2
    passes = sum(size * (1 + weights * gradient) for size, gradient in calls)
    assert 4 * assembly.flops(batch) == passes * forward


def test_a_backward_pass_costs_two_forward_passes(flux_folder: Path) -> None:
    """One for the activations' gradients, one for the weights'; the first layers need one only."""
    backbone = FluxBackbone.load(flux_folder)
    height, width, text = 16, 16, 4
    x, generator = torch.randn(1, 12, height, width), torch.Generator().manual_seed(0)
    tokens = torch.randn(1, text, 6, generator=generator)
    cond = Conditioning(tokens, torch.tensor([text]), torch.randn(1, 5, generator=generator))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        backbone(x, torch.tensor([0.5]), cond).sum().backward()
    forward = backbone.flops(height, width, text)
    assert 2.9 * forward < counter.get_total_flops() <= 3 * forward


def test_an_fp8_teacher_is_measured_on_a_batch(store: EmbeddingStore, flux_folder: Path) -> None:
    """Some per cent in a tiny model; nothing is to be measured without."""
    model = {"path": str(flux_folder), "fp8_teacher": {}}
    plain, _ = train(recipe(store, flux_folder), store, 1)
    assert plain.teacher_error is None
    assembly, losses = train(recipe(store, flux_folder, model=model), store, 1)
    assert assembly.teacher_error is not None
    stream = stream_of(store)
    batch = next(stream.batches()).micro_batches[0]
    error = assembly.teacher_error(batch, 0)
    assert 1e-4 < error < 0.1 and error == assembly.teacher_error(batch, 0)
    assert error != assembly.teacher_error(batch, 1), "other noise"
    objective = assembly.trainer.objective
    assert isinstance(objective, PiIDObjective)
    with objective.trio.exact_teacher():
        assert assembly.teacher_error(batch, 0) == 0


def test_full_training_moves_every_weight(store: EmbeddingStore, flux_folder: Path) -> None:
    ours = recipe(store, flux_folder, **KINDS["full"])
    before = dict(assemble(ours, store, SingleStrategy(CPU), CPU).trainer.parameters)
    after = train(ours, store, 1)[0].trainer.parameters
    assert "x_embedder.weight" in after and not any(".lora_" in name for name in after)
    assert [name for name, tensor in before.items() if torch.equal(tensor, after[name])] == []


def test_guidance_is_against_the_recipes_negative_prompt(
    make_flux_store: Callable[..., EmbeddingStore], flux_folder: Path
) -> None:
    store = make_flux_store(NAMES, height=32, width=32, negatives=["blurry"])
    ours = recipe(store, flux_folder, guidance={"scale": 2.0, "negative_prompt": "blurry"})
    losses = train(ours, store, 1)[1]
    assert losses != train(recipe(store, flux_folder), store, 1)[1]
    objective = assemble(ours, store, SingleStrategy(CPU), CPU).trainer.objective
    assert isinstance(objective, PiIDObjective)
    assert torch.equal(objective.negative.tokens, store.negative_prompt("blurry").tokens)
    missing = recipe(store, flux_folder, guidance={"scale": 2.0, "negative_prompt": "ugly"})
    with pytest.raises(ValueError, match="lacks the recipe's guidance.negative_prompt 'ugly'"):
        assemble(missing, store, SingleStrategy(CPU), CPU)


def test_distillation_trains_the_students_weights_alone(
    store: EmbeddingStore, flux_folder: Path
) -> None:
    names = set(train(recipe(store, flux_folder), store, 1)[0].trainer.parameters)
    assert "proj_out_means.weight" in names
    assert all(".lora_" in name or not name.startswith(("transf", "single")) for name in names)


def test_pretraining_learns(store: EmbeddingStore, flux_folder: Path) -> None:
    """From the zero prediction, whose loss is mean |ε - x0|^2."""
    ours = recipe(
        store,
        flux_folder,
        objective=KINDS["flow-matching"]["objective"],
        training={
            "batch_size": 4,
            "micro_batch_size": 2,
            "optimizer": {"lr": 2e-2, "warmup_steps": 0, "type": "muon"},
        },
    )
    _, losses = train(ours, store, 40)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_draw_is_the_average_and_samples_are_the_same_all_along(
    store: EmbeddingStore, flux_folder: Path
) -> None:
    assembly, _ = train(recipe(store, flux_folder), store, 1)
    first, again = assembly.draw_samples(), assembly.draw_samples()
    assert first.prompts == again.prompts and set(first.prompts) < set(NAMES)
    assert first.pictures.shape == (SAMPLE_PROMPTS, SAMPLE_SEEDS, 3, 32, 32)
    assert torch.equal(first.pictures, again.pictures)
    with torch.no_grad():
        for parameter in assembly.trainer.parameters.values():
            parameter += 1
    assert torch.equal(assembly.draw_samples().pictures, first.pictures)
    with torch.no_grad():
        for tensor in assembly.trainer.ema_parameters.values():
            tensor += 0.1
    assert not torch.equal(assembly.draw_samples().pictures, first.pictures)


def test_a_store_of_fewer_prompts_than_a_sample_has_rows(
    make_flux_store: Callable[..., EmbeddingStore], flux_folder: Path
) -> None:
    small = make_flux_store(NAMES[:2], height=32, width=32)
    ours = recipe(small, flux_folder)
    assert assemble(ours, small, SingleStrategy(CPU), CPU).draw_samples().pictures.shape[0] == 2


def test_float32_products_run_in_tf32_on_a_gpu_alone() -> None:
    """The switches are the process's and can be set without a GPU."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        allow_tf32(CPU)
        assert not any(switch.allow_tf32 for switch in switches)
        allow_tf32(torch.device("cuda"))
        assert all(switch.allow_tf32 for switch in switches)
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
