"""What `piflow.backbones.Backbone` promises, put to the test for any adapter of a model.

Each check takes a function that makes a fresh case, and raises an AssertionError that says what is
wrong. `piflow.testing.family` has the checks that need a whole family.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from piflow.backbones import Backbone, Conditioning, OutputLayer
from piflow.backbones.base import pack
from piflow.backbones.flops import sample_flops
from piflow.backbones.transformer import TransformerBackbone
from piflow.roles import lora
from piflow.roles.heads import time_width
from piflow.sharding import FSDPStrategy

Make = Callable[[], tuple[Backbone, Conditioning, tuple[int, int]]]
"""Makes a tiny backbone in float32 and evaluation mode, with random weights that are the same at
every call; three prompts that all differ, of different lengths if the family's text is ragged, with
pictures to be edited of another size than the latents, if the family edits; and the latents' height
and width, not square if the family allows that."""

Check = Callable[[Make], None]

_ADAPTER = "student"
_TIGHT, _LOOSE = 1e-6, 1e-5


class Case:
    """A fresh backbone and inputs for its samples, at as many noise levels."""

    def __init__(self, make: Make) -> None:
        self.backbone, self.cond, (self.height, self.width) = make()
        self.batch = self.cond.batch_size
        generator = torch.Generator().manual_seed(3)
        shape = (self.batch, self.backbone.latent_channels, self.height, self.width)
        self.x = torch.randn(shape, generator=generator)
        self.sigma = torch.linspace(1.0, 0.2, self.batch)

    def velocity(self, backbone: Backbone | None = None) -> Tensor:
        """The teacher's, of this backbone or another one."""
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
        """LoRA on the default targets, its output not zero; all else is frozen."""
        module = self.backbone.module.requires_grad_(False)
        names = lora.resolve_targets(
            module, self.backbone.default_lora_targets, skip=self.backbone.output_names
        )
        generator = torch.Generator().manual_seed(4)
        lora.inject(module, _ADAPTER, dict.fromkeys(names, 2), dropout=0.0, generator=generator)
        parameters = lora.parameters(module, _ADAPTER)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return parameters


class Spy(nn.Module):
    """The output layer, remembering what it was given."""

    def __init__(self, output: OutputLayer) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        self.hidden, self.temb = hidden, temb
        tokens: Tensor = self.output(hidden, temb)
        return tokens


def require(holds: Any, told: str) -> None:
    """Raise an AssertionError unless `holds`; unlike an assert, also under ``python -O``."""
    if not holds:
        raise AssertionError(told)


def require_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """The same of tensors that must be equal within an absolute tolerance."""
    torch.testing.assert_close(
        found, expected, atol=tolerance, rtol=0, msg=lambda text: f"{what}: {text}"
    )


def samples(cond: Conditioning, start: int, stop: int) -> Conditioning:
    """Samples `start` to `stop` (exclusive)."""
    return Conditioning(
        cond.tokens[start:stop],
        cond.num_tokens[start:stop],
        None if cond.pooled is None else cond.pooled[start:stop],
        condition=None if cond.condition is None else cond.condition[start:stop],
    )


def names_and_config(make: Make) -> None:
    """It says what it is, in names that its module has."""
    backbone = Case(make).backbone
    modules = dict(backbone.module.named_modules())
    require(set(backbone.output_names) <= modules.keys(), "output_names aren't the module's")
    require(backbone.class_name, "class_name is empty")
    require(len(set(backbone.adapter_class_names)) == 2, "adapter_class_names aren't two names")
    require(
        set(backbone.adapter_fields) <= set(backbone.config), "adapter_fields aren't the config's"
    )
    json.dumps({field: backbone.config[field] for field in backbone.adapter_fields})
    for kind in backbone.block_classes:
        found = any(isinstance(module, kind) for module in modules.values())
        require(found, f"no block is a {kind.__name__}")
    require(backbone.dtype == torch.float32, f"dtype is {backbone.dtype}, not float32")
    in_training = [name for name, module in modules.items() if module.training]
    require(not in_training, f"in training mode: {in_training[:3]}")


def equal_weights_at_every_call(make: Make) -> None:
    """The case is the same each time."""
    one, other = (make()[0].module.state_dict() for _ in range(2))
    equal = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    require(equal, "two calls made other weights: seed PyTorch's generator in the case")


def float32_velocity(make: Make) -> None:
    """Velocities are float32 latents, with a gradient where one is asked for."""
    case = Case(make)
    velocity = case.velocity()
    require(velocity.shape == case.x.shape, f"shape {tuple(velocity.shape)}")
    require(velocity.dtype == torch.float32, f"dtype {velocity.dtype}")
    require(velocity.isfinite().all() and velocity.std() > 0, "not finite, or constant")
    require(not velocity.requires_grad, "teacher_velocity has a gradient")
    trained = case.backbone(case.x, case.sigma, case.cond)
    require(trained.requires_grad, "the call itself has no gradient")


def channel_major_tokens(make: Make) -> None:
    """`unpack` inverts the packing, and the velocity is the unpacked tokens."""
    case = Case(make)
    latents = torch.randn(2, 5, case.height, case.width)
    patch = case.backbone.patch_size
    again = case.backbone.unpack(pack(latents, patch), case.height, case.width)
    require(torch.equal(again, latents), "unpack doesn't invert channel-major packing")
    tokens = case.backbone.output_tokens(case.x, case.sigma, case.cond)
    area = patch**2
    expected = (case.batch, case.height * case.width // area, area * case.backbone.latent_channels)
    require(tokens.shape == expected, f"tokens are {tuple(tokens.shape)}, not {expected}")
    unpacked = case.backbone.unpack(tokens.detach(), case.height, case.width)
    require(torch.equal(unpacked, case.velocity()), "the velocity isn't the unpacked tokens")


def every_input_counts(make: Make) -> None:
    """And every place of the latents reaches every other: attention, not position alone."""
    case = Case(make)
    whole = case.velocity()
    later = case.backbone.teacher_velocity(case.x, case.sigma * 0.9, case.cond)
    turned = Conditioning.cat([samples(case.cond, 1, case.batch), samples(case.cond, 0, 1)])
    turned = turned.editing(case.cond.condition)
    other = case.backbone.teacher_velocity(case.x, case.sigma, turned)
    pairs = {}
    if case.cond.condition is not None:
        shown = case.cond.editing(case.cond.condition.roll(1, 0))
        pairs["the picture to be edited"] = (
            case.backbone.teacher_velocity(case.x, case.sigma, shown),
            whole,
        )
    touched = case.x.clone()
    touched[:, :, -1, -1] += 3.0
    corner = case.backbone.teacher_velocity(touched, case.sigma, case.cond)[:, :, 0, 0]
    pairs |= {
        "sigma": (later, whole),
        "the prompt": (other, whole),
        "another corner of the latents": (corner, whole[:, :, 0, 0]),
    }
    for name, (changed, before) in pairs.items():
        difference = (changed - before).abs().flatten(1).amax(dim=1)
        require((difference > 1e-5).all(), f"{name} changes nothing")


def batch_independence(make: Make) -> None:
    """A sample doesn't depend on the others in its batch."""
    case = Case(make)
    whole = case.velocity()
    for i in range(case.batch):
        one = samples(case.cond, i, i + 1)
        alone = case.backbone.teacher_velocity(case.x[i : i + 1], case.sigma[i : i + 1], one)
        require_close(alone, whole[i : i + 1], _LOOSE, f"sample {i} alone")


def sigma_of_any_dtype(make: Make) -> None:
    """Noise levels may be of any float dtype."""
    case = Case(make)
    sigma = torch.tensor([1.0, 0.5, 0.25])[: case.batch]  # exact in all of them
    expected = case.backbone.teacher_velocity(case.x, sigma, case.cond)
    for dtype in (torch.float64, torch.bfloat16):
        velocity = case.backbone.teacher_velocity(case.x, sigma.to(dtype), case.cond)
        require_close(velocity, expected, _LOOSE, f"sigma of {dtype}")


def declared_time(make: Make) -> None:
    """`time_of` alone says what noise level the model sees, and keeps float32."""
    case = Case(make)
    backbone = case.backbone
    if not isinstance(backbone, TransformerBackbone):
        return
    time = backbone.time_of(case.sigma)
    require(time.shape == case.sigma.shape, f"time_of gives {tuple(time.shape)}")
    require(time.dtype == torch.float32, f"time_of gives {time.dtype} of float32")
    expected = case.velocity()
    declared = backbone.time_of
    changed: Any = backbone
    changed.time_of = lambda sigma: declared(0.9 * sigma)
    moved = case.backbone.teacher_velocity(case.x, case.sigma / 0.9, case.cond)
    require_close(moved, expected, _LOOSE, "sigma reaches the model past time_of")


def counted_operations(make: Make) -> None:
    """`flops` is what PyTorch counts, with all of the text, and half of it on half a picture."""
    case = Case(make)
    half = max(1, case.cond.tokens.shape[1] // 2)
    short = Conditioning(
        case.cond.tokens[:, :half],
        case.cond.num_tokens.clamp(max=half),
        case.cond.pooled,
        condition=case.cond.condition,
    )
    _require_flops(case, case.cond, case.height)
    try:
        case.backbone.teacher_velocity(case.x[:, :, : case.height // 2], case.sigma, case.cond)
    except ValueError:  # a model of one size of picture
        _require_flops(case, short, case.height)
    else:
        _require_flops(case, short, case.height // 2)


def _require_flops(case: Case, cond: Conditioning, height: int) -> None:
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # whose products are counted on any machine
        case.backbone.teacher_velocity(case.x[:, :, :height], case.sigma, cond)
    told = case.batch * sample_flops(case.backbone, height, case.width, cond)
    counted = counter.get_total_flops()
    require(counted == told, f"flops says {told} operations, PyTorch counts {counted}")


def no_noise_in_training(make: Make) -> None:
    """Training mode changes no velocity: there is no dropout."""
    case = Case(make)
    expected = case.velocity()
    case.backbone.module.train()
    require_close(case.velocity(), expected, _TIGHT, "in training mode")


def output_layer(make: Make) -> None:
    """Installed again it changes nothing, and sees hidden states and a time embedding."""
    case = Case(make)
    expected = case.velocity()
    spy = Spy(case.backbone.output_layer())
    case.backbone.install_output(spy)
    require(torch.equal(case.velocity(), expected), "the output layer's tokens aren't the model's")
    pixels = case.height * case.width
    if case.cond.condition is not None:
        pixels += case.cond.condition[0, 0].numel()
    tokens = pixels // case.backbone.patch_size**2
    hidden, temb = tuple(spy.hidden.shape), tuple(spy.temb.shape)
    require(hidden == (case.batch, tokens, case.backbone.width), f"hidden states are {hidden}")
    require(temb == (case.batch, time_width(spy.output)), f"the time embedding is {temb}")
    named = [name for name, module in case.backbone.module.named_modules() if module is spy]
    require(len(named) == 1 and named[0] in case.backbone.output_names, f"it lies at {named}")


def channel_major_projection(make: Make) -> None:
    """As many rows of the projection as a patch has pixels are one channel's prediction."""
    case = Case(make)
    expected = case.velocity()
    whole = case.backbone.output_layer()
    channel = case.backbone.latent_channels - 1
    area = whole.patch_size**2
    rows = slice(area * channel, area * channel + area)
    parameters = {name: value[rows] for name, value in whole.projection.named_parameters()}
    part = nn.Linear(case.backbone.width, area, bias="bias" in parameters)
    part.load_state_dict(parameters)
    case.backbone.install_output(OutputLayer(whole.norm, part, whole.patch_size))
    require_close(case.velocity(), expected[:, channel, None], _LOOSE, "the last channel's rows")


def output_replaced_once(make: Make) -> None:
    """A second output layer is refused."""
    backbone = Case(make).backbone
    backbone.install_output(backbone.output_layer())
    for again in (backbone.output_layer, lambda: backbone.install_output(nn.Identity())):
        try:
            again()
        except ValueError as error:
            require("already replaced" in str(error), f"refused with: {error}")
        else:
            raise AssertionError("the output layer may be replaced twice")


def independent_copies(make: Make) -> None:
    """`copy.deepcopy` shares no weights."""
    case = Case(make)
    expected = case.velocity()
    twin = copy.deepcopy(case.backbone)
    require(torch.equal(case.velocity(twin), expected), "a copy has another velocity")
    twin.install_output(twin.output_layer())
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(1.1)
    require(torch.equal(case.velocity(), expected), "a copy shares weights")
    require(not torch.allclose(case.velocity(twin), expected), "a copy's weights don't count")
    case.backbone.output_layer()


def lora_gradients(make: Make) -> None:
    """Each LoRA target is in the model and gets a gradient; switched off, the base is left."""
    case = Case(make)
    for target in case.backbone.default_lora_targets:
        lora.resolve_targets(case.backbone.module, [target], skip=case.backbone.output_names)
    expected = case.velocity()
    parameters = case.add_lora()
    require(parameters, "there are no LoRA targets")
    require(not torch.allclose(case.velocity(), expected), "LoRA changes nothing")
    case.gradients()
    unreached = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    require(not unreached, f"no gradient reaches {unreached}: leave them out of the targets")
    lora.activate(lora.layers(case.backbone.module))
    require(torch.equal(case.velocity(), expected), "without LoRA the velocity isn't the base's")


def gradient_checkpointing(make: Make) -> None:
    """Recomputed blocks change no gradient, of all weights and of LoRA."""
    for adapted in (False, True):
        kept, recomputed = Case(make), Case(make)
        for case in (kept, recomputed):
            case.backbone.module.train()
            if adapted:
                case.add_lora()
        calls = _count_block_calls(recomputed.backbone)
        recomputed.backbone.enable_gradient_checkpointing()
        _require_same(recomputed.gradients(), kept.gradients())
        require(set(calls.values()) == {2}, "a block doesn't run again in the backward pass")


def sharded_block_by_block(make: Make) -> None:
    """No block's weights are used from outside its forward pass, where they aren't whole."""
    with _process_group():
        for recompute in (False, True):
            whole, sharded = Case(make), Case(make)
            for case in (whole, sharded):
                case.add_lora()
            if recompute:
                sharded.backbone.enable_gradient_checkpointing()
            strategy = FSDPStrategy(torch.device("cpu"))
            strategy.prepare(sharded.backbone.module, sharded.backbone.block_classes)
            require_close(sharded.velocity(), whole.velocity(), _TIGHT, "sharded by FSDP2")
            found = {name: _whole(value) for name, value in sharded.gradients().items()}
            _require_same(found, whole.gradients())


CHECKS: tuple[Check, ...] = (
    names_and_config,
    equal_weights_at_every_call,
    float32_velocity,
    channel_major_tokens,
    every_input_counts,
    batch_independence,
    sigma_of_any_dtype,
    declared_time,
    counted_operations,
    no_noise_in_training,
    output_layer,
    channel_major_projection,
    output_replaced_once,
    independent_copies,
    lora_gradients,
    gradient_checkpointing,
    sharded_block_by_block,
)


@contextmanager
def _process_group() -> Iterator[None]:
    """One process, which FSDP2 takes for all."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _whole(value: Tensor) -> Tensor:
    gathered: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered


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


def _require_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    require(one and one.keys() == other.keys(), "gradients reach other weights")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-4, msg=name)
