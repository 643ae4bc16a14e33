"""Optimisers as a recipe says: which parameters go to which one, their groups and their state.

A list of optimisers together moves all parameters. `torch.optim.AdamW` takes whatever the others
don't: Muon is for the blocks' weight matrices, 8-bit moments for tensors that split into blocks.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from piflow.config import OptimizerConfig, ParameterGroupConfig
from piflow.training.optimizer_state import MIN_BLOCK, block_size

LR_SCALE = "lr_scale"  # a parameter group's factor of the schedule's learning rate

MIN_QUANTISED_NUMEL = 4096  # smaller tensors keep float32 moments: nothing to gain

Kind = Literal["muon", "adamw8bit", "adamw"]


def build_optimizers(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """The optimisers that move `parameters`, each parameter in the group of its name.

    Args:
        parameters: trainable parameters by published name; sharded ones already are.
        config: type, rates, and `groups`: the first whose shell pattern matches a name counts.

    Raises:
        ValueError: a group without a parameter, or adamw8bit without torchao.
    """
    groups = assign_groups(list(parameters), config.groups)
    members: dict[Kind, list[str]] = {"muon": [], "adamw8bit": [], "adamw": []}
    for name, parameter in parameters.items():
        members[_kind(name, parameter, config)].append(name)
    return [
        _build(kind, _param_groups(names, parameters, groups, config), config)
        for kind, names in members.items()
        if names
    ]


def assign_groups(
    names: Sequence[str], groups: Sequence[ParameterGroupConfig]
) -> dict[str, ParameterGroupConfig]:
    """The exception that each name falls under, by name; names under none are left out.

    Raises:
        ValueError: a group that matches no name, or only names that earlier groups took.
    """
    assigned: dict[str, ParameterGroupConfig] = {}
    for group in groups:
        matching = [name for name in names if fnmatchcase(name, group.match)]
        if not matching:
            raise ValueError(
                f"training.optimizer.groups: {group.match!r} matches none of {len(names)} trainable"
                f" parameters; near it: {', '.join(_near(group.match, names))}"
            )
        free = [name for name in matching if name not in assigned]
        if not free:
            raise ValueError(
                f"training.optimizer.groups: all {len(matching)} parameters that {group.match!r} "
                "matches belong to earlier groups; put the narrower pattern first"
            )
        assigned.update(dict.fromkeys(free, group))
    return assigned


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """The schedule's rate times each group's own factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's compiled step reads it from a tensor
                group["lr"].fill_(lr * group[LR_SCALE])
            else:
                group["lr"] = lr * group[LR_SCALE]


def _kind(name: str, parameter: nn.Parameter, config: OptimizerConfig) -> Kind:
    if config.type == "muon" and parameter.ndim == 2 and "blocks" in name:
        return "muon"
    large = parameter.numel() >= MIN_QUANTISED_NUMEL and block_size(parameter) >= MIN_BLOCK
    return "adamw8bit" if config.type == "adamw8bit" and large else "adamw"


def _param_groups(
    names: Sequence[str],
    parameters: Mapping[str, nn.Parameter],
    assigned: Mapping[str, ParameterGroupConfig],
    config: OptimizerConfig,
) -> list[dict[str, Any]]:
    """`names` as torch's param groups, in the order of the recipe; the rest of them first."""
    default = ParameterGroupConfig(match="*")
    groups = []
    for group in (default, *config.groups):
        members = [parameters[name] for name in names if assigned.get(name, default) is group]
        if members:
            decay = config.weight_decay if group.weight_decay is None else group.weight_decay
            groups.append({"params": members, LR_SCALE: group.lr_scale, "weight_decay": decay})
    return groups


def _build(
    kind: Kind, groups: list[dict[str, Any]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    if kind == "muon":
        return torch.optim.Muon(
            groups,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",  # the same lr then suits both optimisers
        )
    if kind == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
    try:
        from piflow.training.adamw8bit import BlockwiseAdamW8bit
    except ImportError as error:
        raise ValueError(
            f"training.optimizer.type = adamw8bit needs torchao ({error}): run "
            "`pip install 'piflow[lowbit]'`, or use adamw"
        ) from error
    return BlockwiseAdamW8bit(
        groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three names that look like the pattern; the first three if none does."""
    return difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names[:3])
