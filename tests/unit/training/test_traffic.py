"""A step makes its host wait twice, at its end, and launches what it is known to launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from piflow.backbones import Backbone, PixelCodec
from piflow.config import GMFlowPolicyConfig, LoRAConfig
from piflow.data.batch import MicroBatch
from piflow.roles import lora
from piflow.roles.trio import Trio
from piflow.sharding.single import SingleStrategy
from piflow.training.objective import PiIDObjective
from piflow.training.step import Trainer
from tests.unit.models import case
from tests.unit.training.test_attention import recipe
from tests.unit.training.traffic import DEVICE, HOST, Traffic, counted

HEAD_AND_POLICY = 25  # operations
LOSS_AND_NORM = {"aten._local_scalar_dense.default": 2}


class Codec(PixelCodec):
    """Latents of the size that the tiny models take."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def latent_shape(self, height: int, width: int) -> Any:
        return self._shape


def _trio(backbone: Backbone) -> Trio:
    return Trio.from_backbone(
        backbone,
        LoRAConfig(rank=4, dropout=0.05),
        GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=8),
        None,
        generator=torch.Generator().manual_seed(0),
    )


def step(
    family: str,
    *,
    nfe: int = 2,
    states: int = 2,
    micro_batches: int = 1,
    full: bool = False,
    guidance: float = 4.0,
    wrong: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Traffic:
    """One optimiser step of a LoRA distillation."""
    backbone, (x, _, cond) = case(family)
    if full:
        cond = replace(cond, num_tokens=torch.full((3,), cond.tokens.shape[1]))
    ours = recipe(
        family=family,
        model={"dtype": "float32"},
        objective={"type": "pi_id", "nfe": nfe, "num_intermediate_states": states,
                   "total_substeps": 6},
        guidance={"scale": guidance},
        training={"batch_size": 3 * micro_batches, "micro_batch_size": 3, "steps": 3},
    )  # fmt: skip
    trio = _trio(backbone)
    strategy = SingleStrategy(DEVICE)
    for module in trio.modules:
        strategy.prepare(module, trio.block_classes)
    negative = cond.select(torch.tensor([0])).to(DEVICE)
    objective = PiIDObjective(trio, Codec(x.shape[1:]), negative, ours, DEVICE)
    losses = objective.losses
    objective.losses = lambda *arguments: (  # type: ignore[method-assign]
        (wrong(loss), last) for loss, last in losses(*arguments)
    )
    trainer = Trainer(
        objective,
        trio.trainable_parameters(),
        trio.ema_parameters(),
        strategy,
        ours.training,
        seed=0,
    )
    names = ("a", "b", "c")
    batches = [
        MicroBatch(index, names, names, cond.tokens, cond.num_tokens, cond.pooled, 4, 8)
        for index in range(micro_batches)
    ]
    trio.teacher_velocity(x.to(DEVICE), torch.ones(3, device=DEVICE), cond.to(DEVICE))  # positions
    with counted() as traffic:
        trainer.step(0, batches)
    return traffic


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3"])
def test_the_host_waits_for_loss_and_gradient_norm_alone(family: str) -> None:
    assert step(family).waits == LOSS_AND_NORM


def test_more_segments_states_and_micro_batches_are_no_more_waits() -> None:
    assert step("flux", nfe=3, states=3, micro_batches=2).waits == LOSS_AND_NORM


def test_prompts_of_one_length_wait_no_more_either() -> None:
    assert step("qwen_image", full=True, guidance=1.0).waits == LOSS_AND_NORM


def test_a_masked_call_waits_once_inside_diffusers() -> None:
    """`compute_text_seq_len_from_mask` brings a length to the device that nothing uses."""
    student, teacher = 2, 2 * 2  # segments, states
    waits = step("qwen_image").waits
    assert waits == {**LOSS_AND_NORM, "copy to device": student + teacher}


def test_a_planted_wait_is_seen() -> None:
    def looked_at(loss: Tensor) -> Tensor:
        loss.item()
        return loss

    assert step("flux", wrong=looked_at).waits.total() == 2 + 2  # segments
    with counted() as traffic:
        x = torch.ones(3).to(DEVICE)
        x[torch.tensor([0, 1])]
        torch.tensor([1.0], device=DEVICE)
        x.to(HOST)
        bool((x > 0).any())
    assert traffic.waits == {
        "copy to device": 2,
        "indices to device": 1,
        "copy to host": 1,
        "aten._local_scalar_dense.default": 1,
    }


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen_image", "sd3"])
def test_roles_launch_what_they_compute(family: str) -> None:
    """The teacher as many operations as the bare model; the student a few an adapter, and a head.

    An adapter's are two products, its sum, and the dropout of its input (three, where a GPU has one
    for them).
    """
    bare, (x, sigma, cond) = case(family)
    backbone, _ = case(family)
    trio = _trio(backbone)
    bare.module.to(DEVICE).requires_grad_(False)
    inputs = x.to(DEVICE), sigma.to(DEVICE), cond.to(DEVICE)
    with counted() as plain:
        bare.teacher_velocity(*inputs)
    adapters = len(lora.layers(backbone.module))
    for module in trio.modules:
        module.to(DEVICE)
    with counted() as teacher:
        trio.teacher_velocity(*inputs)
    with counted() as student:
        trio.student(*inputs)
    assert teacher.launches == plain.launches
    more = student.launches - teacher.launches
    assert more["aten.bernoulli_.float"] == adapters > 0
    assert more.total() <= 6 * adapters + HEAD_AND_POLICY
