from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from piflow.config.model import ComputeDtype
from piflow.roles import lora

RANKS = {"blocks.0.ff.proj": 2, "blocks.1.proj": 3}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.proj(self.ff["proj"](x))
        return hidden


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.proj(x)
        return output


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def inject(
    model: Model,
    adapter: str = "student",
    seed: int = 0,
    compute_dtype: ComputeDtype = "base",
) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    lora.inject(
        model, adapter, RANKS, dropout=0.0, generator=generator, compute_dtype=compute_dtype
    )
    return lora.parameters(model, adapter)


def test_initial_values(model: Model) -> None:
    """gaussian is N(0, 1/rank²), PEFT's own of that name; kaiming has variance 1 / (3 inputs)."""
    for init, expected in (("gaussian", lambda rank, inputs: 1 / rank),
                           ("kaiming", lambda rank, inputs: (3 * inputs) ** -0.5)):  # fmt: skip
        wide = nn.ModuleDict({"proj": nn.Linear(400, 300)})
        generator = torch.Generator().manual_seed(0)
        lora.inject(wide, init, {"proj": 100}, dropout=0.0, generator=generator, init=init)  # type: ignore[arg-type]
        found = lora.parameters(wide, init)
        spread = float(found["proj.lora_A.weight"].std())
        assert spread == pytest.approx(expected(100, 400), rel=0.02)
        assert not found["proj.lora_B.weight"].any()


def test_suffixes_are_whole_components_and_the_output_is_skipped(model: Model) -> None:
    names = lora.resolve_targets(model, ["proj"], skip=("proj",))
    assert names == ["blocks.0.ff.proj", "blocks.0.proj", "blocks.1.ff.proj", "blocks.1.proj"]
    assert lora.resolve_targets(model, ["ff.proj"], skip=()) == [names[0], names[2]]
    assert lora.resolve_targets(model, ["blocks.1.proj"], skip=()) == ["blocks.1.proj"]
    with pytest.raises(ValueError, match="'roj' matches no linear layer.*close to it: proj"):
        lora.resolve_targets(model, ["proj", "roj"], skip=())


def test_targets_that_a_small_model_lacks_are_left_out(model: Model) -> None:
    assert lora.present_targets(model, ["proj", "attn.to_q"], skip=()) == ["proj"]


def test_an_adapter_adds_the_product_of_its_two_matrices(model: Model) -> None:
    """alpha = rank, whatever the rank: y = W x + b + B A x."""
    expected = copy.deepcopy(model)
    parameters = inject(model)
    x = torch.randn(5, 4)
    assert torch.equal(model(x), expected(x)), "B starts at zero"
    for name, rank in RANKS.items():
        down, up = parameters[f"{name}.lora_A.weight"], parameters[f"{name}.lora_B.weight"]
        assert down.shape == (rank, 4) and up.shape == (4, rank)
        nn.init.normal_(up)
        with torch.no_grad():
            expected.get_parameter(f"{name}.weight").add_(up @ down)
    torch.testing.assert_close(model(x), expected(x))


def test_values_come_from_the_generator_alone(model: Model) -> None:
    first, other = inject(copy.deepcopy(model)), inject(copy.deepcopy(model), seed=1)
    torch.manual_seed(9)
    same = inject(model)
    assert all(torch.equal(same[name], tensor) for name, tensor in first.items())
    assert not torch.equal(
        first["blocks.1.proj.lora_A.weight"], other["blocks.1.proj.lora_A.weight"]
    )


def test_switching_adapters_touches_no_requires_grad(model: Model) -> None:
    for adapter in ("student", "ema"):
        for name, parameter in inject(model, adapter).items():
            parameter.requires_grad_(adapter == "student")
            if name.endswith("lora_B.weight"):
                nn.init.constant_(parameter, 1.0 if adapter == "student" else 2.0)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    x = torch.randn(5, 4)
    outputs = []
    for adapter in ("student", "ema", None):
        lora.activate(lora.layers(model), *([] if adapter is None else [adapter]))
        outputs.append(model(x))
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_ranks_are_read_from_published_tensors(model: Model) -> None:
    tensors = {name: tensor.detach() for name, tensor in inject(model).items()}
    assert lora.ranks_of({**tensors, "proj_out.weight": torch.zeros(2, 2)}) == RANKS
    wrong = {**tensors, "blocks.1.proj.lora_B.weight": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match="LoRA of blocks.1.proj: A has rank 3 but B 5"):
        lora.ranks_of(wrong)
    del tensors["blocks.1.proj.lora_A.weight"]
    with pytest.raises(ValueError, match="blocks.1.proj.lora_B.weight has no partner"):
        lora.ranks_of(tensors)


def run(
    model: Model, dtype: torch.dtype, compute_dtype: ComputeDtype, *, autocast: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a model of that dtype, its LoRA no longer zero."""
    model = copy.deepcopy(model).to(dtype).requires_grad_(False)
    parameters = inject(model, compute_dtype=compute_dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        with torch.no_grad():
            parameter += torch.randn(parameter.shape, generator=generator)
    lora.activate(lora.layers(model), "student")
    x = torch.randn(3, 4, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x.to(dtype))
        output.float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    return output, {name: grad for name, grad in gradients.items() if grad is not None}


def test_on_a_bfloat16_base_lora_computes_as_under_autocast(model: Model) -> None:
    """To the last bit; weights and gradients stay float32."""
    ours, gradients = run(model, torch.bfloat16, "base")
    theirs, expected = run(model, torch.bfloat16, "float32", autocast=True)
    assert torch.equal(ours, theirs)
    assert len(gradients) == 2 * len(RANKS)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[name]), name


def test_on_a_float32_base_both_compute_dtypes_are_the_same(model: Model) -> None:
    ours, gradients = run(model, torch.float32, "base")
    theirs, expected = run(model, torch.float32, "float32")
    assert torch.equal(ours, theirs)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_float32_on_a_bfloat16_base_rounds_once(model: Model) -> None:
    """The bfloat16 one is as near to it as its digits allow, and not equal."""
    exact, _ = run(model, torch.bfloat16, "float32")
    rounded, _ = run(model, torch.bfloat16, "base")
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.03, atol=0.03)
