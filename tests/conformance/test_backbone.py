"""What `piflow.backbones.Backbone` promises, for any adapter.

pytest tests/conformance --backbone my.module:function
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflow.backbones import Backbone, Conditioning, OutputLayer
from piflow.backbones.base import pack
from piflow.roles import lora
from piflow.roles.heads import time_width
from piflow.sharding import FSDPStrategy
from tests.conformance.samples import samples
from tests.unit.whole import gather

Make = Callable[[], tuple[Backbone, Conditioning, tuple[int, int]]]
ADAPTER = "student"


class Case:
    """A fresh backbone and inputs for three samples at three noise levels."""

    def __init__(self, make: Make) -> None:
        self.backbone, self.cond, (self.height, self.width) = make()
        self.batch = self.cond.batch_size
        generator = torch.Generator().manual_seed(3)
        shape = (self.batch, self.backbone.latent_channels, self.height, self.width)
        self.x = torch.randn(shape, generator=generator)
        self.sigma = torch.linspace(1.0, 0.2, self.batch)

    def velocity(self, backbone: Backbone | None = None) -> Tensor:
        return (backbone or self.backbone).teacher_velocity(self.x, self.sigma, self.cond)

    def gradients(self) -> dict[str, Tensor]:
        """By name, of what is trainable and reached."""
        self.backbone.module.zero_grad()
        self.backbone(self.x, self.sigma, self.cond).square().sum().backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in self.backbone.module.named_parameters()
            if parameter.grad is not None
        }

    def add_lora(self) -> dict[str, nn.Parameter]:
        """An adapter on the default targets, its output not zero; all else frozen."""
        module = self.backbone.module.requires_grad_(False)
        names = lora.resolve_targets(
            module, self.backbone.default_lora_targets, skip=self.backbone.output_names
        )
        generator = torch.Generator().manual_seed(4)
        ranks = dict.fromkeys(names, 2)
        lora.inject(module, ADAPTER, ranks, dropout=0.0, generator=generator)
        parameters = lora.parameters(module, ADAPTER)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return parameters


@pytest.fixture
def case(make: Make) -> Case:
    return Case(make)


class Spy(nn.Module):
    """The output layer, remembering what it was given."""

    def __init__(self, output: OutputLayer) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        self.hidden, self.temb = hidden, temb
        tokens: Tensor = self.output(hidden, temb)
        return tokens


def test_it_says_what_it_is(case: Case) -> None:
    backbone = case.backbone
    names = {name for name, _ in backbone.module.named_modules()}
    assert set(backbone.output_names) <= names
    assert backbone.class_name and len(set(backbone.adapter_class_names)) == 2
    assert set(backbone.adapter_fields) <= set(backbone.config)
    json.dumps({field: backbone.config[field] for field in backbone.adapter_fields})
    for block_class in backbone.block_classes:
        assert any(isinstance(module, block_class) for module in backbone.module.modules())
    assert backbone.dtype == torch.float32
    assert all(not module.training for module in backbone.module.modules())


def test_every_call_makes_the_same_weights(make: Make) -> None:
    one, other = (make()[0].module.state_dict() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_velocity_is_float32_latents(case: Case) -> None:
    velocity = case.velocity()
    assert velocity.shape == case.x.shape and velocity.dtype == torch.float32
    assert velocity.isfinite().all() and velocity.std() > 0
    assert not velocity.requires_grad
    assert case.backbone(case.x, case.sigma, case.cond).requires_grad


def test_unpack_inverts_channel_major_packing(case: Case) -> None:
    latents = torch.randn(2, 5, case.height, case.width)
    assert torch.equal(case.backbone.unpack(pack(latents), case.height, case.width), latents)


def test_velocity_is_the_unpacked_tokens(case: Case) -> None:
    tokens = case.backbone.output_tokens(case.x, case.sigma, case.cond)
    channels = case.backbone.latent_channels
    assert tokens.shape == (case.batch, case.height * case.width // 4, 4 * channels)
    unpacked = case.backbone.unpack(tokens.detach(), case.height, case.width)
    assert torch.equal(unpacked, case.velocity())


def test_every_input_counts(case: Case) -> None:
    """And every place of the latents reaches every other (attention, not position alone)."""
    whole = case.velocity()
    later = case.backbone.teacher_velocity(case.x, case.sigma * 0.9, case.cond)
    turned = Conditioning.cat([samples(case.cond, 1, case.batch), samples(case.cond, 0, 1)])
    other = case.backbone.teacher_velocity(case.x, case.sigma, turned)
    touched = case.x.clone()
    touched[:, :, -1, -1] += 3.0
    corner = case.backbone.teacher_velocity(touched, case.sigma, case.cond)[:, :, 0, 0]
    for changed, before in ((later, whole), (other, whole), (corner, whole[:, :, 0, 0])):
        difference = (changed - before).abs().flatten(1).amax(dim=1)
        assert (difference > 1e-5).all()


def test_a_sample_does_not_depend_on_its_batch(case: Case) -> None:
    whole = case.velocity()
    for i in range(case.batch):
        alone = case.backbone.teacher_velocity(
            case.x[i : i + 1], case.sigma[i : i + 1], samples(case.cond, i, i + 1)
        )
        torch.testing.assert_close(alone, whole[i : i + 1], atol=1e-5, rtol=0)


def test_sigma_of_any_float_dtype(case: Case) -> None:
    sigma = torch.tensor([1.0, 0.5, 0.25])  # exact in all of them
    expected = case.backbone.teacher_velocity(case.x, sigma, case.cond)
    for dtype in (torch.float64, torch.bfloat16):
        velocity = case.backbone.teacher_velocity(case.x, sigma.to(dtype), case.cond)
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["all", "half"])
def test_flops_are_what_torch_counts(case: Case, text: str) -> None:
    """At two sizes of text, and of picture unless the family has one size alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    cond, height = case.cond, case.height
    if text == "half":
        tokens = cond.tokens[:, : max(1, cond.tokens.shape[1] // 2)]
        num_tokens = cond.num_tokens.clamp(max=tokens.shape[1])
        cond = Conditioning(tokens, num_tokens, cond.pooled)
        height = height if case.backbone.class_name == "DiTTransformer2DModel" else height // 2
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # whose products are counted on any machine
        case.backbone.teacher_velocity(case.x[:, :, :height], case.sigma, cond)
    expected = case.backbone.flops(height, case.width, cond.tokens.shape[1])
    assert counter.get_total_flops() == case.batch * expected


def test_training_mode_adds_no_noise(case: Case) -> None:
    expected = case.velocity()
    case.backbone.module.train()
    torch.testing.assert_close(case.velocity(), expected, atol=1e-6, rtol=0)


def test_output_layer_gives_the_tokens(case: Case) -> None:
    """Installed again it changes nothing, and sees hidden states and a time embedding."""
    expected = case.velocity()
    spy = Spy(case.backbone.output_layer())
    case.backbone.install_output(spy)
    assert torch.equal(case.velocity(), expected)
    tokens, width = case.height * case.width // 4, case.backbone.width
    assert spy.hidden.shape == (case.batch, tokens, width)
    assert spy.temb.shape == (case.batch, time_width(spy.output))


def test_projection_rows_are_channel_major(case: Case) -> None:
    """Four rows of it are one channel's prediction."""
    expected = case.velocity()
    whole = case.backbone.output_layer()
    channel = case.backbone.latent_channels - 1
    rows = slice(4 * channel, 4 * channel + 4)
    parameters = {name: value[rows] for name, value in whole.projection.named_parameters()}
    part = nn.Linear(case.backbone.width, 4, bias="bias" in parameters)
    part.load_state_dict(parameters)
    case.backbone.install_output(OutputLayer(whole.norm, part))
    torch.testing.assert_close(case.velocity(), expected[:, channel, None], atol=1e-5, rtol=0)


def test_the_output_is_replaced_once(case: Case) -> None:
    case.backbone.install_output(case.backbone.output_layer())
    with pytest.raises(ValueError, match="already replaced"):
        case.backbone.output_layer()
    with pytest.raises(ValueError, match="already replaced"):
        case.backbone.install_output(nn.Identity())


def test_the_output_is_under_the_output_names(case: Case) -> None:
    case.backbone.install_output(Spy(case.backbone.output_layer()))
    names = [name for name, module in case.backbone.module.named_modules() if type(module) is Spy]
    assert len(names) == 1 and names[0] in case.backbone.output_names


def test_a_copy_is_independent(case: Case) -> None:
    expected = case.velocity()
    twin = copy.deepcopy(case.backbone)
    assert torch.equal(case.velocity(twin), expected)
    twin.install_output(twin.output_layer())
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(1.1)
    assert torch.equal(case.velocity(), expected)
    assert not torch.allclose(case.velocity(twin), expected)
    case.backbone.output_layer()


def test_gradients_reach_every_lora_layer(case: Case) -> None:
    """With the adapter off the velocity is the base's, bit by bit."""
    expected = case.velocity()
    parameters = case.add_lora()
    assert parameters
    assert not torch.allclose(case.velocity(), expected)
    case.gradients()
    unreached = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert not unreached
    lora.activate(lora.layers(case.backbone.module))
    assert torch.equal(case.velocity(), expected)


def test_every_lora_target_is_in_the_model(case: Case) -> None:
    for target in case.backbone.default_lora_targets:
        lora.resolve_targets(case.backbone.module, [target], skip=case.backbone.output_names)


@pytest.mark.parametrize("adapted", [False, True], ids=["all-weights", "lora"])
def test_gradient_checkpointing_changes_no_gradient(make: Make, adapted: bool) -> None:
    kept, recomputed = Case(make), Case(make)
    for case in (kept, recomputed):
        case.backbone.module.train()
        if adapted:
            case.add_lora()
    calls = _count_block_calls(recomputed.backbone)
    recomputed.backbone.enable_gradient_checkpointing()
    _assert_same(recomputed.gradients(), kept.gradients())
    assert set(calls.values()) == {2}, "each block runs again in the backward pass"


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_sharded_block_by_block(make: Make, recompute: bool) -> None:
    """No block's weights are used from outside its forward pass, where they aren't whole."""
    whole, sharded = Case(make), Case(make)
    for case in (whole, sharded):
        case.add_lora()
    if recompute:
        sharded.backbone.enable_gradient_checkpointing()
    strategy = FSDPStrategy(torch.device("cpu"))
    strategy.prepare(sharded.backbone.module, sharded.backbone.block_classes)
    torch.testing.assert_close(sharded.velocity(), whole.velocity(), atol=1e-6, rtol=0)
    _assert_same(gather(strategy, sharded.gradients()), whole.gradients())


def _count_block_calls(backbone: Backbone) -> dict[str, int]:
    """How often each block's forward runs from now on, by name."""
    calls: dict[str, int] = {}
    for name, module in backbone.module.named_modules():
        if isinstance(module, backbone.block_classes):
            module.register_forward_pre_hook(_counter(calls, name))
    return calls


def _counter(calls: dict[str, int], name: str) -> Callable[[nn.Module, Any], None]:
    def count(module: nn.Module, arguments: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    return count


def _assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-4, msg=name)
