from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from piflow.backbones import Conditioning, DiTBackbone

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 1000,
}
NULL = 1000
SIGMA = torch.tensor([1.0, 0.6173, 0.2])


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**CONFIG).eval()


@pytest.fixture
def backbone(model: Any) -> DiTBackbone:
    return DiTBackbone(copy.deepcopy(model))


@pytest.fixture(scope="module")
def x() -> Any:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def classes(*numbers: float) -> Conditioning:
    batch = len(numbers)
    pooled = torch.tensor(numbers, dtype=torch.float32)[:, None]
    return Conditioning(torch.zeros(batch, 1, 1), torch.ones(batch, dtype=torch.long), pooled)


def test_velocity_is_the_untouched_models_output(model: Any, backbone: DiTBackbone, x: Any) -> None:
    labels = torch.tensor([3, 999, NULL])
    with torch.no_grad():
        expected = model(x, timestep=SIGMA * 1000, class_labels=labels).sample
    velocity = backbone.teacher_velocity(x, SIGMA, classes(3, 999, NULL))
    torch.testing.assert_close(velocity, expected, atol=1e-6, rtol=0)


def test_gradients_are_the_untouched_models(model: Any, backbone: DiTBackbone, x: Any) -> None:
    """The first block's embedder serves both the block and the output layer, as it did."""
    untouched = copy.deepcopy(model)
    labels = torch.tensor([3, 999, NULL])
    untouched(x, timestep=SIGMA * 1000, class_labels=labels).sample.square().sum().backward()
    backbone(x, SIGMA, classes(3, 999, NULL)).square().sum().backward()
    for name in ("timestep_embedder.linear_1.weight", "class_embedder.embedding_table.weight"):
        expected = untouched.get_parameter(f"transformer_blocks.0.norm1.emb.{name}").grad
        gradient = backbone.module.get_parameter(f"time_class_embed.{name}").grad
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_time_is_not_rounded(backbone: DiTBackbone, x: Any) -> None:
    one, other = (
        backbone.teacher_velocity(x, torch.full((3,), sigma), classes(0, 1, 2))
        for sigma in (0.5001, 0.5004)
    )
    assert not torch.equal(one, other)


def test_labels_are_not_dropped_in_training(model: Any, backbone: DiTBackbone, x: Any) -> None:
    """The untouched model drops each with probability 0.1."""
    x, sigma, labels = x[:1].expand(64, -1, -1, -1), SIGMA[1].expand(64), classes(*[7.0] * 64)
    backbone.module.train()
    velocity = backbone.teacher_velocity(x, sigma, labels)
    assert torch.equal(velocity, velocity[:1].expand_as(velocity))
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = model.train()(x, sigma * 1000, torch.full((64,), 7)).sample
    model.eval()
    assert not torch.allclose(dropped, dropped[:1].expand_as(dropped))


def test_the_null_class_is_a_class_of_its_own(backbone: DiTBackbone, x: Any) -> None:
    null = backbone.teacher_velocity(x, SIGMA, classes(NULL, NULL, NULL))
    last = backbone.teacher_velocity(x, SIGMA, classes(999, 999, 999))
    assert not torch.allclose(null, last)


def test_full_size() -> None:
    """DiT-XL/2 itself, without its weights: the embedder is moved, not copied."""
    with torch.device("meta"):
        model = DiTTransformer2DModel()
        expected = sum(p.numel() for p in model.parameters())
        backbone = DiTBackbone(model)
    assert sum(p.numel() for p in backbone.module.parameters()) == expected
    assert (backbone.width, backbone.latent_channels) == (1152, 4)


@pytest.mark.parametrize("number", [-1.0, 1001.0, 2.5, float("nan")])
def test_numbers_that_are_no_class(backbone: DiTBackbone, x: Any, number: float) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 999, or 1000 .*, got {number}"):
        backbone(x, SIGMA, classes(0, number, 1))


def test_half_precision_class_numbers_are_refused(backbone: DiTBackbone, x: Any) -> None:
    """bfloat16 rounds 999 to 1000, the null class."""
    with pytest.raises(ValueError, match="of float32, got .* torch.bfloat16"):
        backbone(x, SIGMA, classes(1, 2, 999).to("cpu", torch.bfloat16))
    with pytest.raises(ValueError, match="encoder.type class_label"):
        backbone(x, SIGMA, Conditioning(torch.zeros(3, 1, 1), torch.ones(3)))


@pytest.mark.parametrize("shape", [(3, 4, 8, 16), (3, 4, 4, 4)])
def test_other_sizes(backbone: DiTBackbone, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="takes latents of 8×8 alone"):
        backbone(torch.zeros(shape), SIGMA, classes(0, 1, 2))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 4, "expected patch_size 2"),
        ("out_channels", 8, "is a diffusion model"),
        ("dropout", 0.1, "expected dropout 0, got 0.1"),
    ],
)
def test_other_models(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTBackbone(DiTTransformer2DModel(**{**CONFIG, field: value}))


def test_embedded_guidance_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="takes none"):
        DiTBackbone(model, embedded_guidance=2.7)


@pytest.mark.parametrize("activation", ["gelu", "gelu-approximate", "geglu", "swiglu"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_flops_of_gated_and_plain_activations(activation: str, num_layers: int) -> None:
    """A gate is another matrix product of the block's first linear layer."""
    config = {**CONFIG, "activation_fn": activation, "num_layers": num_layers}
    backbone = DiTBackbone(DiTTransformer2DModel(**config).eval())
    size = 8
    x = torch.zeros(1, 4, size, size)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        backbone.teacher_velocity(x, torch.ones(1), classes(3))
    assert counter.get_total_flops() == backbone.flops(size, size, 1)
