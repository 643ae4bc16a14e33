"""One training step of a shipped recipe's model at full width, with random weights, measured.

What is measured is training's own code: the trio, π-ID's objective, the trainer. Only the base's
values, the prompts' embeddings and the pictures' latents are made up, on the device. `evidence.py`
runs many of these one after the other.

`Case.published` is the same step as published trainers of this kind run it, for the ratio: LoRA and
heads in float32 under autocast, which casts them in every call; prompts with all their padding; the
policy's formula written with broadcasting. It is written here from the method's description.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self
from unittest import mock

import torch
from measure import peak_mebibytes
from policy import Outputs, broadcasting_mixture, broadcasting_velocity
from torch import Tensor, nn

from piflow.backbones import Codec, Conditioning, PixelCodec, family_class
from piflow.backbones.load import DTYPES
from piflow.backbones.transformer import TransformerBackbone
from piflow.config import Recipe, find_family, load_recipe
from piflow.data.batch import MicroBatch
from piflow.planning.memory import Placement, memory_of
from piflow.planning.model import model_of
from piflow.planning.passes import BACKWARD, LOSSES, PHASES, STUDENT, TEACHER, Passing
from piflow.planning.sizes import latent_size
from piflow.planning.traffic import teacher_calls
from piflow.roles.heads import PolicyClock
from piflow.roles.trio import Trio
from piflow.schedule import FewStep
from piflow.sharding.single import SingleStrategy
from piflow.sharding.weights import parameters_on_meta
from piflow.training.attention import use_attention
from piflow.training.blocks import prepare_blocks
from piflow.training.build import allow_tf32
from piflow.training.objective import PiIDObjective
from piflow.training.step import Trainer

RECIPES = Path(__file__).parent.parent / "pipelines" / "recipes"
UPDATE, WHOLE = "update", "step"
_SHRUNK = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6),
           "joint_attention_dim": 32, "num_layers": 2}  # fmt: skip
SHRUNK: dict[str, dict[str, Any]] = {
    "flux1-dev-gm-4nfe": {**_SHRUNK, "num_single_layers": 2, "pooled_projection_dim": 16},
    "qwen-image-gm-4nfe": _SHRUNK,
}
SHRUNK_KEYS = ("embed.height=64", "embed.width=64", "encoder.max_tokens=64", "lora.rank=4")


@dataclass(frozen=True)
class Case:
    """One way to run a recipe's step on one device.

    Attributes:
        recipe: name of a shipped one.
        micro_batch: samples; a step is one micro-batch.
        fp8: where the teacher's 8-bit weights come from, if it has some.
        published: as published trainers run it.
        shrunk: a narrow model and small pictures, to try the program itself.
    """

    recipe: str
    checkpointing: Literal["none", "selective", "full"] = "full"
    compiled: bool = False
    fp8: Literal["kept", "call"] | None = None
    published: bool = False
    micro_batch: int = 1
    shrunk: bool = False

    def load(self) -> Recipe:
        """The recipe with these settings, for one worker; its policy without dropout."""
        size = self.micro_batch
        keys = [
            "runtime.num_workers=1",
            f"training.batch_size={size}",
            f"training.micro_batch_size={size}",
            f"runtime.activation_checkpointing={self.checkpointing}",
            f"runtime.compile={str(self.compiled).lower()}",
            "policy.dropout=0",
            "lora.dropout=0",
            *(SHRUNK_KEYS if self.shrunk else ()),
        ]
        if self.published:
            keys.append("lora.compute_dtype=float32")
        if self.fp8 is not None:
            keep = str(self.fp8 == "kept").lower()
            keys.append(f"model.fp8_teacher={{keep_weights: {keep}}}")
        return load_recipe(RECIPES / f"{self.recipe}.yaml", keys)

    def config(self) -> dict[str, Any]:
        """The model's config.json: the published one, or that narrowed."""
        published = find_family(self.load().model.family).published
        if published is None:
            raise ValueError(f"{self.recipe}: expected a family with a published model, got none")
        return {**published.config, **(SHRUNK[self.recipe] if self.shrunk else {})}


# ------------------------------------------------------------------------------- what is made up


class _Latents(PixelCodec):
    """Latents of any number of channels, 8 times smaller than the picture; nothing is decoded."""

    def __init__(self, channels: int) -> None:
        self._channels = channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self._channels, height // 8, width // 8


def empty_backbone(recipe: Recipe, config: Mapping[str, Any]) -> TransformerBackbone:
    """The model on "meta", for counting."""
    kind = family_class(recipe.model.family)
    if not issubclass(kind, TransformerBackbone):
        raise ValueError(f"expected a transformer family, got {recipe.model.family}")
    return kind.on_meta(
        config, dtype=DTYPES[recipe.model.dtype], embedded_guidance=recipe.guidance.embedded
    )


def random_backbone(
    recipe: Recipe, config: Mapping[str, Any], device: torch.device
) -> TransformerBackbone:
    """The model with random values, made where they stay: N(0, 1/inputs) matrices, norms of 1."""
    empty = empty_backbone(recipe, config)
    dtypes = {name: parameter.dtype for name, parameter in empty.module.named_parameters()}
    with parameters_on_meta(DTYPES[recipe.model.dtype]):
        module = type(empty).model_class.from_config(dict(config)).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        value = torch.empty(parameter.shape, dtype=dtypes[name], device=device)
        if value.ndim > 1:
            value.normal_(std=value[0].numel() ** -0.5, generator=generator)
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    nn.Module.to(module, device)
    return type(empty)(module, embedded_guidance=recipe.guidance.embedded)


def micro_batch(recipe: Recipe, backbone: TransformerBackbone, device: torch.device) -> MicroBatch:
    """Prompts of 40 to 120 tokens, as usual ones have, in host memory; latents on the device."""
    size, length = recipe.training.micro_batch_size, recipe.encoder.text_tokens
    generator = torch.Generator().manual_seed(0)
    blank = backbone.blank_conditioning(length)
    counts = torch.randint(min(40, length // 2), min(120, length) + 1, (size,), generator=generator)
    tokens = torch.randn(size, length, blank.tokens.shape[2], generator=generator)
    tokens *= torch.arange(length)[:, None] < counts[:, None, None]
    pooled = blank.pooled
    if pooled is not None:
        pooled = torch.randn(size, pooled.shape[1], generator=generator)
    names = tuple(str(number) for number in range(size))
    latents = torch.randn(size, backbone.latent_channels, *latent_size(recipe), generator=generator)
    side = recipe.embed.height, recipe.embed.width
    return MicroBatch(0, names, names, tokens, counts, pooled, *side, latents)


# ------------------------------------------------------------------ as published trainers run it


class BroadcastingPolicy:
    """A Gaussian mixture's policy, every quantity of shape (B, K, C, H, W)."""

    def __init__(
        self, means: Tensor, logstds: Tensor, logweights: Tensor, x_src: Tensor, sigma_src: Tensor
    ) -> None:
        sigma = sigma_src.to(x_src.device)
        self._out = Outputs(means, logstds, logweights, x_src, sigma, sigma)
        self._mixture = broadcasting_mixture(self._out)

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W), (B,) -> (B, C, H, W)."""
        return broadcasting_velocity(*self._mixture, self._out.logweights, self._out, x, sigma)

    def detach(self) -> Self:
        """The same without gradient."""
        out = self._out
        return type(self)(
            out.means.detach(), out.logstds.detach(), out.logweights.detach(), out.x, out.sigma
        )


@contextmanager
def as_published(trio: Trio, objective: PiIDObjective, device: torch.device) -> Iterator[None]:
    """Inside, the trio and the objective do what published trainers do."""

    def autocast(call: Callable[..., Any]) -> Callable[..., Any]:
        def cast(*arguments: Any) -> Any:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return call(*arguments)

        return cast

    objective.shared_by = None  # padding stays

    def plainly(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    with ExitStack() as stack:
        for name, value in (("student", autocast(trio.student)),
                            ("teacher_velocity", autocast(trio.teacher_velocity))):  # fmt: skip
            stack.enter_context(mock.patch.object(trio, name, value))
        stack.enter_context(mock.patch("piflow.roles.heads.GMFlowPolicy", BroadcastingPolicy))
        stack.enter_context(mock.patch("piflow.policies.rollout.recomputed", plainly))
        yield


# ------------------------------------------------------------------------------------ measurement


class Clock:
    """Seconds of named parts: of a GPU's own time between events, of a CPU's wall time."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside counts as this part."""
        began = self._now()
        yield
        self._spans.append((name, began, self._now()))

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, as this part."""

        def inner(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return call(*arguments, **options)

        return inner

    def seconds(self) -> dict[str, float]:
        """Sums of all parts since the last time."""
        if self._on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, began, ended in self._spans:
            spent = began.elapsed_time(ended) / 1e3 if self._on_gpu else ended - began
            sums[name] = sums.get(name, 0.0) + spent
        self._spans.clear()
        return sums


@cache
def _passing(recipe: str, micro_batch: int, shrunk: bool) -> Passing:
    """The planner's count of passes, which all of a recipe's cases share."""
    case = Case(recipe, micro_batch=micro_batch, shrunk=shrunk)
    return Passing(case.load(), empty_backbone(case.load(), case.config()))


def planned(case: Case) -> dict[str, Any]:
    """What the planner says of the case: operations by part, memory by part.

    Of the step as piflow runs it, also where the case is the published way. What is computed again
    in the backward pass is among `flops`, and isn't useful.
    """
    recipe = case.load()
    model = model_of(recipe, empty_backbone(recipe, case.config()), "made up")
    passing = _passing(case.recipe, case.micro_batch, case.shrunk)
    passes, least = passing.measure(case.checkpointing), passing.measure("none")
    memory = memory_of(recipe, model, passes, Placement("single", 1, 1))
    times = {TEACHER: teacher_calls(recipe)}
    flops, useful = (
        {name: times.get(name, 1) * sum(counted.flops(name).values()) for name in PHASES}
        for counted in (passes, least)
    )
    return {"flops": flops, "useful_flops": sum(useful.values()), "memory": memory.parts()}


def measured(
    case: Case, device: torch.device, *, repeats: int, matmul_flops: float
) -> dict[str, Any]:
    """The case's step: seconds by part, operations a second, memory; beside what was planned.

    Args:
        matmul_flops: operations a second of a large product in the model's dtype, measured.
    """
    recipe, config = case.load(), case.config()
    clock, plan = Clock(device), planned(case)
    run, loss = _step(case, recipe, config, device, clock)
    with run:
        began = time.perf_counter()
        loss()  # compiles, tunes, allocates
        first = time.perf_counter() - began
        clock.seconds()
        losses, rounds = [], []
        for _ in range(repeats):
            losses.append(loss())
            rounds.append(clock.seconds())
        above = peak_mebibytes(loss, device)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    seconds = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    network = sum(value for name, value in seconds.items() if name not in (WHOLE, LOSSES))
    seconds[LOSSES] = seconds[WHOLE] - network
    rate = plan["useful_flops"] / seconds[WHOLE]
    return {
        "first_seconds": first,
        "seconds": seconds,
        "losses": losses,
        "tflops": rate / 1e12,
        "share_of_matmul": rate / matmul_flops,
        "kernels_tflops": {
            name: flops / seconds[name] / 1e12
            for name, flops in plan["flops"].items()
            if name != LOSSES and seconds.get(name)
        },
        "above_level_mib": above,
        "peak_mib": None if peak is None else peak / 2**20,
        "planned_mib": {name: size / 2**20 for name, size in plan["memory"].items()},
        "planned_total_mib": sum(plan["memory"].values()) / 2**20,
    }


def _step(
    case: Case, recipe: Recipe, config: Mapping[str, Any], device: torch.device, clock: Clock
) -> tuple[AbstractContextManager[Any], Callable[[], float]]:
    """A function that trains one step and returns its loss, and the context that it needs."""
    allow_tf32(device)
    backbone = random_backbone(recipe, config, device)
    batch = micro_batch(recipe, backbone, device)
    trio = Trio.from_backbone(
        backbone,
        recipe.lora,
        recipe.policy,
        PolicyClock.of(FewStep.of(recipe.distillation())),
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    if case.fp8 is not None:
        trio.use_fp8_teacher(keep=case.fp8 == "kept")
    prepare_blocks(recipe.runtime, trio.backbone, trio.modules)
    strategy = SingleStrategy(device)
    for module in trio.modules:
        strategy.prepare(module, trio.block_classes)
    use_attention(recipe, trio.modules, device)
    cond = Conditioning(batch.tokens, batch.num_tokens, batch.pooled)
    negative = cond.select(torch.tensor([0])).to(device)
    codec: Codec = _Latents(backbone.latent_channels)
    objective = PiIDObjective(
        trio, codec, negative, recipe, device, lambda batch, generator: batch.latents
    )
    trainer = Trainer(
        objective,
        trio.trainable_parameters(),
        trio.ema_parameters(),
        strategy,
        recipe.training,
        recipe.seed,
    )
    stack = ExitStack()
    if case.published:
        stack.enter_context(as_published(trio, objective, device))
    for owner, name, part in (
        (trio, "student", STUDENT),
        (trio, "teacher_velocity", TEACHER),
        (strategy, "backward", BACKWARD),
        (strategy, "update", UPDATE),
    ):
        timed = clock.timed(part, getattr(owner, name))
        stack.enter_context(mock.patch.object(owner, name, timed))

    def step() -> float:
        with clock.part(WHOLE):
            return trainer.step(0, [batch]).loss

    return stack, step


def release(device: torch.device) -> None:
    """Gives the memory of what isn't reachable any more back, before the next case."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
