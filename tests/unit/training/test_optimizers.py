"""Optimisers: who moves what, groups by name, 8-bit moments against AdamW's trajectory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from piflow.config import OptimizerConfig
from piflow.training.optimizer_state import allocate_state, block_size, state_tensors
from piflow.training.optimizers import assign_groups, build_optimizers, set_learning_rate

NAMES = [
    "transformer_blocks.0.ff.net.2.lora_A.weight",
    "transformer_blocks.0.ff.net.2.lora_B.weight",
    "norm_out.linear.weight",
    "norm_out.linear.bias",
    "proj_out_means.weight",
    "proj_out_means.bias",
]


def config(**values: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate(values)


def matrices(names: list[str] = NAMES) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(3, 4)) for name in names}


def members(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> list[list[str]]:
    """Names by param group."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


# ---------------------------------------------------------------------------------- who moves what


def test_adamw_takes_all_parameters() -> None:
    parameters = {"blocks.0.weight": nn.Parameter(torch.zeros(2, 3))}
    (optimizer,) = build_optimizers(parameters, config(betas=(0.5, 0.6), weight_decay=0.7))
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.5, 0.6) and group["weight_decay"] == 0.7


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    shapes = {
        "transformer_blocks.0.attn.to_q.weight": (4, 4),
        "transformer_blocks.0.attn.to_q.bias": (4,),
        "single_transformer_blocks.1.proj_mlp.weight": (8, 4),
        "x_embedder.weight": (4, 6),
        "proj_out.weight": (6, 4),
        "transformer_blocks.0.attn.norm_q.weight": (4,),
    }
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    muon, adamw = build_optimizers(parameters, config(type="muon"))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    (mine,), (rest,) = members(muon, parameters), members(adamw, parameters)
    assert mine == [
        "transformer_blocks.0.attn.to_q.weight",
        "single_transformer_blocks.1.proj_mlp.weight",
    ]
    assert sorted(mine + rest) == sorted(shapes)


def test_muon_alone_needs_no_adamw() -> None:
    parameters = {"blocks.0.weight": nn.Parameter(torch.zeros(4, 4))}
    (optimizer,) = build_optimizers(parameters, config(type="muon"))
    assert isinstance(optimizer, torch.optim.Muon)


# ------------------------------------------------------------------------------------------ groups


def test_the_first_matching_group_wins() -> None:
    parameters = matrices()
    (optimizer,) = build_optimizers(
        parameters,
        config(
            weight_decay=0.3,
            groups=[
                {"match": "proj_out_*.weight", "lr_scale": 2.0},
                {"match": "*.lora_?.weight", "lr_scale": 0.5, "weight_decay": 0.1},
                {"match": "*.weight", "lr_scale": 0.0},
            ],
        ),
    )
    assert members(optimizer, parameters) == [
        ["norm_out.linear.bias", "proj_out_means.bias"],
        ["proj_out_means.weight"],
        NAMES[:2],
        ["norm_out.linear.weight"],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.1, 0.3]
    set_learning_rate([optimizer], 8.0)
    assert [group["lr"] for group in optimizer.param_groups] == [8.0, 16.0, 4.0, 0.0]
    set_learning_rate([optimizer], 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 4.0, 1.0, 0.0]


def test_groups_hold_for_every_optimiser_of_the_list() -> None:
    names = ["blocks.0.weight", "blocks.1.weight", "head.weight", "head.bias"]
    parameters = matrices(names)
    muon, adamw = build_optimizers(
        parameters, config(type="muon", groups=[{"match": "*[1d].weight", "lr_scale": 3.0}])
    )
    assert members(muon, parameters) == [["blocks.0.weight"], ["blocks.1.weight"]]
    assert members(adamw, parameters) == [["head.bias"], ["head.weight"]]
    set_learning_rate([muon, adamw], 1.0)
    assert [g["lr"] for o in (muon, adamw) for g in o.param_groups] == [1.0, 3.0, 1.0, 3.0]


def test_patterns_are_case_sensitive_and_cover_whole_names() -> None:
    groups = config(groups=[{"match": "*.lora_A.weight"}]).groups
    assert list(assign_groups(NAMES, groups)) == NAMES[:1]
    with pytest.raises(ValueError, match="matches none"):
        assign_groups(NAMES, config(groups=[{"match": "*.LORA_A.weight"}]).groups)
    with pytest.raises(ValueError, match="matches none"):
        assign_groups(NAMES, config(groups=[{"match": "proj_out_means"}]).groups)


def test_a_group_without_parameters_names_near_ones() -> None:
    with pytest.raises(ValueError) as caught:
        build_optimizers(matrices(), config(groups=[{"match": "proj_out_mean.*"}]))
    message = str(caught.value)
    assert "'proj_out_mean.*' matches none of 6 trainable parameters" in message
    assert "proj_out_means.bias" in message and "lora_A" not in message
    with pytest.raises(ValueError, match="near it: transformer_blocks.0.ff"):
        build_optimizers(matrices(), config(groups=[{"match": "qqq"}]))


def test_a_group_that_comes_too_late_is_refused() -> None:
    groups = [{"match": "*.weight"}, {"match": "proj_out_*.weight"}]
    with pytest.raises(ValueError, match="all 1 .*'proj_out_.*earlier groups; put the narrower"):
        build_optimizers(matrices(), config(groups=groups))


# ------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_allocated_state_is_the_state_that_a_step_makes(kind: str) -> None:
    parameters = {"blocks.0.weight": nn.Parameter(torch.randn(4, 3))}
    (stepped,) = build_optimizers(parameters, config(type=kind))
    weight = parameters["blocks.0.weight"]
    assert not state_tensors(stepped, weight)
    weight.grad = torch.ones_like(weight)
    stepped.step()
    made = state_tensors(stepped, weight)
    (fresh,) = build_optimizers(parameters, config(type=kind))
    allocate_state(fresh, weight, [*made, "unknown"])
    zeros = state_tensors(fresh, weight)
    assert {k: (v.shape, v.dtype) for k, v in zeros.items()} == {
        k: (v.shape, v.dtype) for k, v in made.items()
    }
    assert all(not value.any() for value in zeros.values())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 512), 256), ((3, 256), 256), ((7, 64), 64), ((7, 4, 24), 32), ((7, 5), 1), ((512,), 1)],
)
def test_blocks_divide_rows(shape: tuple[int, ...], expected: int) -> None:
    assert block_size(torch.zeros(shape)) == expected


# ------------------------------------------------------------------------------------------- 8 bit


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))


def fit(kind: str, steps: int = 50) -> tuple[list[float], Tensor, list[torch.optim.Optimizer]]:
    """Losses, the flattened weights' way, and the optimisers."""
    net = network()
    start = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    settings = config(type=kind, weight_decay=0.01)
    optimizers = build_optimizers(dict(net.named_parameters()), settings)
    losses = []
    for step in range(steps):
        rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        net.zero_grad()
        loss = (net(rows) - rows.sin()).square().mean()
        loss.backward()
        set_learning_rate(optimizers, 3e-3 * min(1.0, (step + 1) / 5))
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    end = torch.cat([p.detach().flatten() for p in net.parameters()])
    return losses, end - start, optimizers


def test_eight_bit_moments_follow_adamws_trajectory() -> None:
    """Losses within 0.5 % over 50 steps, the way gone within 5 % of its length."""
    pytest.importorskip("torchao")
    exact, exact_way, _ = fit("adamw")
    found, way, (eight_bit, adamw) = fit("adamw8bit")
    assert exact[-1] < 0.4 * exact[0]
    assert found == pytest.approx(exact, rel=5e-3) and found != exact
    assert (way - exact_way).norm() < 0.05 * exact_way.norm()
    assert type(eight_bit).__name__ == "BlockwiseAdamW8bit"
    assert isinstance(adamw, torch.optim.AdamW)
    assert [len(group["params"]) for group in eight_bit.param_groups] == [2]  # biases are not


def test_eight_bit_moments_are_a_quarter_of_adamws() -> None:
    pytest.importorskip("torchao")

    def size(optimizer: torch.optim.Optimizer) -> int:
        (group,) = optimizer.param_groups
        return sum(
            value.nbytes for p in group["params"] for value in state_tensors(optimizer, p).values()
        )

    parameters = {"a": nn.Parameter(torch.zeros(256, 1024)), "b": nn.Parameter(torch.zeros(64, 64))}
    (eight_bit,) = build_optimizers(parameters, config(type="adamw8bit"))
    (adamw,) = build_optimizers(parameters, config())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    assert size(eight_bit) == pytest.approx(size(adamw) / 4, rel=0.03)


def test_groups_hold_for_eight_bit_moments() -> None:
    pytest.importorskip("torchao")
    parameters = {name: nn.Parameter(torch.ones(64, 64)) for name in ("a", "b")}
    groups = [{"match": "b", "lr_scale": 0.1, "weight_decay": 0.5}]
    (optimizer,) = build_optimizers(
        parameters, config(type="adamw8bit", betas=(0.0, 0.0), groups=groups)
    )
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate([optimizer], 0.1)
    optimizer.step()
    torch.testing.assert_close(parameters["a"].detach(), torch.full((64, 64), 0.9))
    torch.testing.assert_close(parameters["b"].detach(), torch.full((64, 64), 0.985))


def test_without_torchao_the_message_says_how_to_get_it() -> None:
    """In a process of its own, where the import fails."""
    script = (
        "import sys; sys.modules['torchao'] = None\n"
        "import torch\n"
        "from piflow.config import OptimizerConfig\n"
        "from piflow.training.optimizers import build_optimizers\n"
        "big = torch.nn.Parameter(torch.zeros(64, 64))\n"
        "build_optimizers({'a': big}, OptimizerConfig())\n"
        "try:\n"
        "    build_optimizers({'a': big}, OptimizerConfig(type='adamw8bit'))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "adamw8bit needs torchao" in result.stdout, result.stderr
    assert "pip install 'piflow[lowbit]'" in result.stdout and "or use adamw" in result.stdout
