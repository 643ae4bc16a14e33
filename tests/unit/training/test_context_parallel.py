"""Context parallelism: families, what is refused, and what diffusers can't do yet.

Trainings under every strategy are in `test_sharding.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from diffusers.models.attention_dispatch import _native_attention_forward_op

from piflow.backbones import FluxBackbone, PixelCodec
from piflow.config import RecipeError, parse_recipe
from piflow.planning.memory import Placement, memory_of
from piflow.planning.model import Model, Unit, Weight
from piflow.planning.passes import Passes
from piflow.training.context_parallel import check_pictures, split_tokens
from tests.unit.sharding import split_families
from tests.unit.sharding.training import CPU, NO_DROPOUT, TINY_FLUX, TOGETHER, Run, recipe_of


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("split")
    run_ranks(Path(split_families.__file__), folder)
    results: dict[str, dict[str, torch.Tensor]] = torch.load(
        folder / "results.pt", weights_only=True
    )
    return results


@pytest.mark.parametrize("family", split_families.FAMILIES)
def test_two_workers_parts_are_one_workers_gradient(
    family: str, two: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Qwen-Image with prompts of different lengths, whose masks are split, too."""
    expected, got = split_families.gradients(family), two[family]
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def changed(**sections: Any) -> dict[str, Any]:
    tree = recipe_of(Run(NO_DROPOUT, "fsdp", (TOGETHER,))).model_dump(mode="json")
    for section, values in sections.items():
        tree[section] |= values
    return tree


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"runtime": {"num_workers": 3}}, r"\(2\) must divide num_workers \(3\)"),
        ({"runtime": {"num_workers": [2, 4]}}, "divide the number of workers, .* may become any"),
        ({"lora": {"dropout": 0.05}}, "lora.dropout = 0.05 draws for whole samples"),
        ({"encoder": {"max_tokens": 33}}, r"max_tokens \(33\) must be a multiple of .* \(2\)"),
        (
            {"model": {"family": "sd3"}, "encoder": {"type": "bert"}},
            r"model.family = sd3 has none \(flux, flux2, flux2_klein, qwen_image do\)",
        ),
        ({"runtime": {"num_workers": 10}}, "use at most 8 workers"),
    ],
)
def test_what_can_not_be_split_is_refused(sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        parse_recipe(changed(**sections))


def test_more_workers_than_micro_batches() -> None:
    """What it is for: a worker without a micro-batch of its own still has work."""
    assert parse_recipe(changed(runtime={"num_workers": 8})).runtime.max_workers == 8


def test_every_pictures_tokens_must_divide() -> None:
    check_pictures(PixelCodec(), [(16, 16), (8, 12)], 2)
    check_pictures(PixelCodec(), [(12, 12)], 1)
    with pytest.raises(ValueError, match="= 2 deals .* one of 12x12 pixels has 9; use other sizes"):
        check_pictures(PixelCodec(), [(16, 16), (12, 12)], 2)


def test_heads_must_divide() -> None:
    backbone = FluxBackbone(FluxTransformer2DModel(**TINY_FLUX))
    with pytest.raises(ValueError, match="= 3 deals out attention heads evenly, .* has 2"):
        split_tokens(backbone, [backbone.module], 3, CPU)


def test_a_worker_keeps_its_tokens_activations() -> None:
    units = (Unit("rest", (Weight((10, 10), 4, "base"), Weight((7,), 4, "student"))),)
    model = Model("made up", 100, units, units, units, True, 8, 0, 4, 16, 3)
    passes = Passes({}, kept=1000, policy=20, working=30, peak_phase="backward")
    ours = parse_recipe(changed())
    alone = parse_recipe(changed(runtime={"context_parallel": 1}))
    both = [memory_of(r, model, passes, Placement("ddp", 2, 1)) for r in (ours, alone)]
    assert [memory.activations for memory in both] == [500, 1000]


# If one of these fails, diffusers has learnt it: `split_tokens` may call `enable_parallelism`, and
# ring attention may become an option


@pytest.mark.skipif(torch.accelerator.device_count() > 0, reason="about machines without any")
def test_diffusers_can_not_enable_it_on_a_cpu(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        with pytest.raises(ZeroDivisionError):
            FluxTransformer2DModel(**TINY_FLUX).enable_parallelism(
                config=ContextParallelConfig(ulysses_degree=2)
            )
    finally:
        dist.destroy_process_group()


def test_ring_attention_needs_what_torchs_own_attention_does_not_return() -> None:
    states = torch.zeros(1, 2, 2, 8)
    with pytest.raises(ValueError, match="does not support return_lse"):
        _native_attention_forward_op(None, states, states, states, return_lse=True)
