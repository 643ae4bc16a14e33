"""Padding that a model masks is cut off before the model is called, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from piflow.backbones import Conditioning, PixelCodec
from piflow.config import BUILT_IN, Recipe, find_family, parse_recipe
from piflow.data.batch import conditioning, cut_for
from piflow.training.build import build_trio
from piflow.training.objective import PiIDObjective
from piflow.training.step import micro_batch_generator
from tests.unit.models import case

CPU = torch.device("cpu")
MAX_TOKENS = 96


@dataclass(frozen=True)
class Prompts:
    tokens: Tensor
    num_tokens: Tensor
    pooled: None = None
    index: int = 0
    height: int = 16
    width: int = 8
    prompts: tuple[str, ...] = ("a", "b")
    prompt_ids: tuple[str, ...] = ("1", "2")
    latents: None = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen")
    QwenImageTransformer2DModel(
        in_channels=48,
        out_channels=12,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        axes_dims_rope=(2, 2, 4),
    ).save_pretrained(path)
    return path


def recipe(folder: Path, **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "run_dir": "unused",
            "model": {"path": str(folder), "family": "qwen_image"},
            "encoder": {"type": "bert", "path": "unused"},
            "embed": {"prompts": "p.txt", "store": "s", "height": 16, "width": 8},
            "objective": {"type": "pi_id", "nfe": 2, "total_substeps": 16,
                          "num_intermediate_states": 2},
            "policy": {"num_gaussians": 3, "logstd_inner_dim": 8},
            "lora": {"rank": 4, "dropout": 0.0},
            "guidance": {"scale": 4.0},
            **sections,
        }
    )  # fmt: skip


def prompts(*counts: int) -> Prompts:
    """Zeros beyond each prompt's count, as the stream hands them out."""
    states = torch.randn(len(counts), MAX_TOKENS, 6, generator=torch.Generator().manual_seed(7))
    num_tokens = torch.tensor(counts)
    valid = torch.arange(MAX_TOKENS) < num_tokens[:, None]
    return Prompts(states * valid[..., None], num_tokens)


@pytest.mark.parametrize(
    ("counts", "parts", "length", "full"),
    [
        ((5, 3), 1, 32, False),
        ((33, 3), 1, 64, False),
        ((32, 3), 1, 32, False),
        ((96, 3), 1, 96, False),
        ((40, 40), 1, 40, True),  # no mask at all
        ((96, 96), 1, 96, True),
        ((40, 40), 3, 96, False),  # three workers can't share 40, and multiples of 32 are 96
        ((39, 39), 3, 39, True),
        ((5, 3), 4, 32, False),
    ],
)
def test_length(counts: tuple[int, ...], parts: int, length: int, full: bool) -> None:
    batch = prompts(*counts)
    cond = Conditioning(batch.tokens, batch.num_tokens).cut(parts)
    assert (cond.tokens.shape[1], cond.full) == (length, full)
    assert torch.equal(cond.tokens, batch.tokens[:, :length])
    assert torch.equal(cond.num_tokens, batch.num_tokens)


@pytest.mark.parametrize("counts", [(40, 7), (23, 23)])
def test_loss_and_gradients_are_those_of_padded_prompts(
    folder: Path, counts: tuple[int, int]
) -> None:
    """Under guidance, whose negative prompt has another length; with and without a mask."""
    ours, batch = recipe(folder), prompts(*counts)
    found = []
    for cut in (cut_for(ours), None):
        negative = prompts(5)
        trio = build_trio(ours)
        negative_cond = conditioning(negative, CPU, shared_by=cut)
        objective = PiIDObjective(trio, PixelCodec(), negative_cond, ours, CPU)
        objective.shared_by = cut
        lengths = []
        trio.backbone.module.register_forward_pre_hook(
            lambda module, args, kwargs, seen=lengths: seen.append(
                (
                    kwargs["encoder_hidden_states"].shape[1],
                    kwargs["encoder_hidden_states_mask"] is None,
                )
            ),
            with_kwargs=True,
        )
        parts = []
        for loss, _ in objective.losses(batch, 0, micro_batch_generator(0, 0, 0)):
            loss.backward()
            parts.append(loss.detach())
        gradients = {
            name: parameter.grad
            for name, parameter in trio.trainable_parameters().items()
            if parameter.grad is not None
        }
        found.append((torch.stack(parts), gradients, set(lengths)))
    (losses, gradients, cut_calls), (expected, whole, calls) = found
    length = 23 if counts == (23, 23) else 64
    assert cut_calls == {(length, counts == (23, 23)), (length, False)}  # student; with negative
    assert calls == {(MAX_TOKENS, False)}
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", [name for name in BUILT_IN if name != "dit"])
def test_a_family_says_rightly_whether_it_masks(family: str) -> None:
    """Positions beyond `num_tokens` change nothing exactly where the record says so."""
    backbone, (x, sigma, cond) = case(family)
    padded = replace(cond, num_tokens=cond.num_tokens.clamp(max=3))
    padded.tokens[:, 3:] = 0
    cut = replace(padded, tokens=padded.tokens[:, :3])
    seen = backbone.teacher_velocity(x, sigma, padded) - backbone.teacher_velocity(x, sigma, cut)
    if find_family(family).masks_text:
        assert seen.abs().max() < 1e-5
    else:
        assert seen.abs().max() > 1e-4
