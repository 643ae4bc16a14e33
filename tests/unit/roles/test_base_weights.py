"""A frozen base in codes: everything is as with a model that holds what the codes stand for."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from piflow.backbones import FluxBackbone
from piflow.config import GMFlowPolicyConfig, LoRAConfig, Recipe, RecipeError, load_recipe
from piflow.config.model import BaseWeights
from piflow.roles import trio as roles
from piflow.roles.base_weights import CodedLinear, can_be_coded, code_base, coded_bytes
from piflow.roles.trio import Trio
from piflow.sharding.single import SingleStrategy
from piflow.training.build import build_trio, prepared_trio
from tests.unit.models import case
from tests.unit.sharding import training
from tests.unit.sharding.training import LORA, Run

CPU = torch.device("cpu")
KINDS = get_args(BaseWeights)
DEMO = Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_weights")
    training.save_model(folder)
    return folder


def in_codes(recipe: Recipe, kind: str | None) -> Recipe:
    model = recipe.model.model_copy(update={"base_weights": kind})
    return recipe.model_copy(update={"model": model})


def coded(module: nn.Module) -> dict[str, CodedLinear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, CodedLinear)}


def own(_: str, parameter: Tensor) -> Tensor:
    return parameter


def trio_of(family: str, dtype: torch.dtype) -> tuple[Trio, Any]:
    """A tiny trio whose LoRA adds something, and inputs."""
    backbone, inputs = case(family)
    backbone.module.to(dtype)
    backbone.dtype = dtype
    trio = Trio.from_backbone(
        backbone, LoRAConfig(rank=2, dropout=0.0), GMFlowPolicyConfig(num_gaussians=2), None,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trio.trainable_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trio, inputs


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_values_and_gradients_are_those_of_the_whole_weights(
    family: str, kind: BaseWeights, dtype: torch.dtype, again: bool
) -> None:
    ours, (x, sigma, cond) = trio_of(family, dtype)
    whole, _ = trio_of(family, dtype)
    exact = ours.teacher_velocity(x, sigma, cond)
    ours.code_base(kind)
    layers = coded(ours.backbone.module)
    assert len(layers) > 10 and any("base_layer" in name for name in layers)
    for name, layer in layers.items():
        plain = whole.backbone.module.get_submodule(name)
        assert type(plain) is nn.Linear and not hasattr(layer, "weight")
        with torch.no_grad():
            plain.get_parameter("weight").copy_(layer.whole(dtype))
    gradients = []
    for trio in (ours, whole):
        if again:
            trio.enable_gradient_checkpointing()
        policy = trio.student(x, sigma, cond)
        teacher = trio.teacher_velocity(x, sigma, cond)
        loss = (policy.velocity(x, 0.5 * sigma) - teacher).square().mean()
        loss.backward()
        found = {name: p.grad for name, p in trio.trainable_parameters().items()}
        gradients.append((loss.detach(), teacher, found))
    (loss, teacher, ours_found), (expected, its_teacher, expected_found) = gradients
    assert torch.equal(loss, expected) and torch.equal(teacher, its_teacher)
    assert not torch.equal(teacher, exact), "codes round"
    for name, gradient in expected_found.items():
        assert gradient is not None and torch.equal(ours_found[name], gradient), name
    assert any(".lora_A" in name and g.abs().max() > 0 for name, g in expected_found.items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_a_model_of_these_weights(
    kind: BaseWeights, folder: Path, tmp_path: Path
) -> None:
    """Five steps with EMA and clipping, streamed; nothing of the base changes."""
    recipe = training.recipe_of(Run(LORA, "single"), folder)
    model = FluxTransformer2DModel.from_pretrained(folder / "flux")
    backbone = FluxBackbone(model)
    code_base(model, backbone.block_classes, kind, own, device=CPU)
    values = {f"{name}.weight": layer.whole(torch.float32) for name, layer in coded(model).items()}
    other = FluxTransformer2DModel.from_pretrained(folder / "flux")
    assert not other.load_state_dict(values, strict=False).unexpected_keys
    other.save_pretrained(tmp_path / "flux")
    whole = training.recipe_of(Run(LORA, "single"), tmp_path)
    found = training.distil(in_codes(recipe, kind), SingleStrategy(CPU))
    expected = training.distil(whole, SingleStrategy(CPU))
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert found.base_unchanged  # what of it isn't in codes
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    close(found.trained, expected.trained)
    close(found.ema, expected.ema)
    plain = training.distil(recipe, SingleStrategy(CPU))
    assert plain.losses != pytest.approx(expected.losses, rel=1e-5), "codes round"


def test_no_two_weights_of_a_streamed_base_are_whole_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = in_codes(training.recipe_of(Run(LORA, "single"), folder), "int8")
    read, alive = roles.read_tensor, []

    def counted(stored: Any) -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        value = read(stored)
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(roles, "read_tensor", counted)
    streamed, whole = prepared_trio(recipe, SingleStrategy(CPU)), build_trio(recipe)
    layers = coded(whole.backbone.module)
    assert len(alive) == len(layers) > 10
    ours = dict(streamed.backbone.module.named_buffers())
    expected = dict(whole.backbone.module.named_buffers())
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert not any(p.is_meta for p in streamed.backbone.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 1e-4, 0.01), ("nf4", 0.01, 0.12)])
def test_sizes_and_errors(kind: BaseWeights, least: float, most: float, dtype: torch.dtype) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Linear(96, 128), nn.Linear(64, 3)
            self.odd = nn.Linear(5, 7)  # 35 values are no multiple of 64

    torch.manual_seed(0)
    block = Block().to(dtype)
    layers = {n: layer for n, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    expected = [
        coded_bytes(tuple(layer.weight.shape), dtype.itemsize, kind)
        for layer in layers.values()
        if can_be_coded(tuple(layer.weight.shape), kind)
    ]
    found = code_base(block, (Block,), kind, own, device=CPU)
    assert (found.layers, found.bytes) == (len(expected), sum(expected))
    assert isinstance(block.odd, CodedLinear) == (kind == "int8")
    assert least < found.error < most
    kept = {name for name, layer in layers.items() if hasattr(layer, "weight")}
    assert kept == (set() if kind == "int8" else {"odd"})


def test_zeros_stay_zeros() -> None:
    """Of whole layers, such as those that training begins with."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(128, 64)
            nn.init.zeros_(self.linear.weight)

    for kind in KINDS:
        block: Any = Block()
        assert code_base(block, (Block,), kind, own, device=CPU).error == 0
        assert not block.linear.whole(torch.float32).any()
        block = Block()
        nn.init.constant_(block.linear.weight, torch.inf)
        with pytest.raises(ValueError, match="aren't finite"):
            code_base(block, (Block,), kind, own, device=CPU)


def test_a_model_without_a_fitting_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="base_weights = nf4: no linear layer .* of 64 values"):
        code_base(nn.Linear(64, 64), (nn.Conv2d,), "nf4", own, device=CPU)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["objective.type=flow_matching", "objective.pictures=emoji"], "has none; leave it out"),
        (["lora=null"], "about a base that stays frozen, and lora = null trains"),
        (["model.fp8_teacher={}"], "keeps none of them; leave out one"),
        (["runtime.compile=true"], "can't trace how weights in nf4"),
        (["runtime.num_workers=2", "runtime.strategy=fsdp"], "FSDP and DeepSpeed don't split"),
        (["runtime.num_workers=2", "runtime.strategy=deepspeed"], "use runtime.strategy ddp"),
        (["runtime.offload=cpu"], "without options of sharding"),
    ],
)
def test_what_has_no_base_in_codes_refuses_it(changes: list[str], reason: str) -> None:
    recipe = DEMO.with_name("emoji-teacher.yaml") if "objective" in changes[0] else DEMO
    with pytest.raises(RecipeError, match=reason):
        load_recipe(recipe, ["model.base_weights=nf4", *changes])


def test_what_the_base_is_kept_in_is_part_of_a_runs_identity() -> None:
    kinds = ("null", "int8", "nf4")
    ways = [["runtime.strategy=ddp", f"model.base_weights={kind}"] for kind in kinds]
    hashes = [load_recipe(DEMO, way).hash() for way in ways]
    assert len(set(hashes)) == 3 and hashes[0] == load_recipe(DEMO).hash()
