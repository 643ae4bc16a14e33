"""Teacher, student and EMA as three views of one backbone.

    frozen base ──┬─ no adapter        + the model's own output layer = teacher
                  ├─ adapter "student" + GM head "student"            = student (trained)
                  └─ adapter "ema"     + GM head "ema"                = EMA of the student

One copy of the base in memory and in every all-gather. Between calls the student is active, so a
backward pass that recomputes activations (gradient checkpointing) recomputes the student's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from piflow import lora as adapters
from piflow.backbones import Backbone, Conditioning, load_backbone
from piflow.config import GMFlowPolicyConfig, GuidanceConfig, LoRAConfig, ModelConfig
from piflow.ema import ema_update
from piflow.guidance import guided_teacher
from piflow.heads import BIAS_NOISE, OUTPUT_LAYERS, GMHead, OutputRouter, TeacherHead, split_gm
from piflow.policies import GMFlowPolicy

if TYPE_CHECKING:
    from piflow.adapter import Adapter

STUDENT = "student"
EMA = "ema"


class Trio:
    """Three roles over one backbone; callers name the role by the method and toggle nothing.

    `x` is `(B, C, H, W)`, `sigma` `(B,)`, `cond` a `Conditioning` of B prompts. Make one with
    `Trio.build` (training) or `Trio.from_adapter` (sampling).
    """

    def __init__(self, backbone: Backbone, router: OutputRouter, num_gaussians: int) -> None:
        self.backbone = backbone
        self.num_gaussians = num_gaussians
        self._router = router
        self._adapted = adapters.layers(backbone.module)
        for name, parameter in backbone.module.named_parameters():
            parameter.requires_grad_(_role_of(name) == STUDENT)
        self._activate(STUDENT)

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        lora: LoRAConfig,
        policy: GMFlowPolicyConfig,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        embedded_guidance: float | None = None,
    ) -> Trio:
        """Loads the recipe's base and adds student and EMA to it, in training mode.

        Args:
            generator: a CPU generator; equal seeds give equal trios on every worker and device.
            device: where the base is loaded. For a base that only fits sharded give "cpu": the
                sharding strategy moves it, block by block.
            embedded_guidance: FLUX.1-dev's guidance input, for all three roles.

        Raises:
            ValueError: a folder that isn't the family's model, or a LoRA target without a match.
        """
        backbone = load_backbone(model, device=device, embedded_guidance=embedded_guidance)
        return cls.from_backbone(backbone, lora, policy, generator=generator)

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        lora: LoRAConfig,
        policy: GMFlowPolicyConfig,
        *,
        generator: torch.Generator,
        bias_noise: float = BIAS_NOISE,
    ) -> Trio:
        """Adds student and EMA, equal to each other, to a loaded backbone, which it takes over.

        At the start the student's mixture mean is the teacher's velocity up to `bias_noise`.
        """
        norm_out, proj_out = backbone.output_layers()
        targets = lora.targets
        if targets is None:
            targets = adapters.present_targets(
                backbone.module, backbone.default_lora_targets, skip=OUTPUT_LAYERS
            )
        names = adapters.resolve_targets(backbone.module, targets, skip=OUTPUT_LAYERS)
        ranks = dict.fromkeys(names, lora.rank)
        adapters.inject(backbone.module, STUDENT, ranks, dropout=lora.dropout, generator=generator)
        adapters.inject(backbone.module, EMA, ranks, dropout=0.0, generator=generator)
        head = GMHead.from_teacher(
            norm_out, proj_out, policy, generator=generator, bias_noise=bias_noise
        )
        heads = {STUDENT: head, EMA: copy.deepcopy(head)}
        router = OutputRouter(TeacherHead(norm_out, proj_out), heads, STUDENT)
        backbone.install_output(router)
        trio = cls(backbone, router, policy.num_gaussians)
        trio.update_ema(0.0)
        return trio.train(True)

    @classmethod
    def from_adapter(cls, backbone: Backbone, adapter: Adapter) -> Trio:
        """Adds a published adapter to a loaded backbone, for sampling: teacher and student only.

        Raises:
            ValueError: the adapter was made for another architecture, or its tensors don't fit.
        """
        adapter.check_fits(backbone)
        norm_out, proj_out = backbone.output_layers()
        ranks = adapters.ranks_of(adapter.tensors)
        generator = torch.Generator().manual_seed(0)  # every value it draws is overwritten below
        if ranks:
            adapters.inject(backbone.module, STUDENT, ranks, dropout=0.0, generator=generator)
        policy = adapter.config.policy()
        head = GMHead.from_teacher(norm_out, proj_out, policy, generator=generator)
        router = OutputRouter(TeacherHead(norm_out, proj_out), {STUDENT: head}, STUDENT)
        backbone.install_output(router)
        trio = cls(backbone, router, policy.num_gaussians)
        trio.load_student(adapter.tensors)
        return trio.train(False)

    @property
    def module(self) -> nn.Module:
        """The one module that is sharded."""
        return self.backbone.module

    @property
    def block_classes(self) -> tuple[type[nn.Module], ...]:
        """Modules that are sharded one by one: the backbone's blocks and the output layer."""
        return (*self.backbone.block_classes, OutputRouter)

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The frozen base's unguided velocity `(B, C, H, W)`, float32, without gradient."""
        with self._role(None):
            return self.backbone.teacher_velocity(x, sigma, cond)

    def student(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> GMFlowPolicy:
        """The student's policy from `(x, sigma)`, with gradient unless the caller forbids it.

        LoRA dropout (training mode only) draws from torch's global generator.
        """
        return self._policy(STUDENT, x, sigma, cond)

    @torch.no_grad()
    def ema(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> GMFlowPolicy:
        """The averaged student's policy, without gradient or dropout."""
        return self._policy(EMA, x, sigma, cond)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The student's weights by published name; ask again after sharding, which replaces them.

        Names are those of the published adapter format, the same for student and EMA.
        """
        return self._parameters_of(STUDENT)

    def ema_parameters(self) -> dict[str, nn.Parameter]:
        """The EMA's weights, same names and order; without `requires_grad`."""
        return self._parameters_of(EMA)

    @torch.no_grad()
    def update_ema(self, beta: float) -> None:
        """ema ← beta·ema + (1-beta)·student, in place on this worker's shards."""
        averages, student = self.ema_parameters(), self.trainable_parameters()
        ema_update(list(averages.values()), list(student.values()), beta)

    @torch.no_grad()
    def load_student(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the student's weights from whole tensors by published name; before sharding.

        Raises:
            ValueError: a name that is missing or unknown, or a shape that doesn't fit.
        """
        parameters = self.trainable_parameters()
        _check_tensors(tensors, parameters)
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])

    def train(self, mode: bool = True) -> Trio:
        """Training mode (LoRA dropout on) or evaluation mode; returns itself."""
        self.module.train(mode)
        return self

    def _policy(self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning) -> GMFlowPolicy:
        if role not in self._router.heads:
            raise ValueError(
                f"this trio has no {role!r} role: it was made from an adapter, for sampling; use "
                "student, or Trio.build"
            )
        with self._role(role):
            tokens = self.backbone.output_tokens(x, sigma, cond)
        means, logweights, logstds = split_gm(tokens.float(), self.num_gaussians)
        height, width = x.shape[2:]
        logweights = self.backbone.unpack(logweights, height, width)[:, :, None]
        return GMFlowPolicy(
            means=self.backbone.unpack(means, height, width).unflatten(1, (self.num_gaussians, -1)),
            logstds=logstds[:, None, None, None, None],
            logweights=logweights.log_softmax(dim=1),
            x_src=x,
            sigma_src=sigma,
        )

    def _parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        if role not in self._router.heads:
            raise ValueError(f"this trio has no {role!r} role: it was made from an adapter")
        head = self._router.heads[role]
        return {**adapters.parameters(self.module, role), **dict(head.named_parameters())}

    @contextmanager
    def _role(self, role: str | None) -> Iterator[None]:
        """Activates a role (None: the teacher), then the student again."""
        self._activate(role)
        try:
            yield
        finally:
            self._activate(STUDENT)

    def _activate(self, role: str | None) -> None:
        adapters.activate(self._adapted, role)
        self._router.role = "teacher" if role is None else role


class TeacherVelocity(Protocol):
    """What can be guided: a `Trio`, or a bare `Backbone`."""

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor: ...


class GuidedTeacher:
    """A teacher under classifier-free guidance, as a function (x, sigma) -> velocity.

    Positive and negative prompt go through the model as one doubled batch. The call is the same on
    all workers whatever sigma is, since every forward pass is a collective.

    Args:
        teacher: a trio or a bare backbone.
        cond: B prompts.
        negative: the empty prompt, one or B; not used when `guidance.scale` is 1.
        guidance: scale, sigma interval and orthogonal share.

    Raises:
        ValueError: guidance without a negative prompt.
    """

    def __init__(
        self,
        teacher: TeacherVelocity,
        cond: Conditioning,
        negative: Conditioning | None,
        guidance: GuidanceConfig,
    ) -> None:
        if guidance.scale == 1.0:
            self._velocity = _velocity_of(teacher, cond)
            return
        if negative is None:
            raise ValueError(
                f"guidance.scale {guidance.scale} needs the empty prompt's conditioning, got none: "
                "pass it, or set guidance.scale to 1"
            )
        both = Conditioning.cat([cond, negative.expand(cond.batch_size)])
        self._velocity = guided_teacher(
            _velocity_of(teacher, both),
            guidance.scale,
            guidance.interval,
            guidance.orthogonal,
        )

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """`(B, C, H, W)`, `(B,)` -> guided velocity `(B, C, H, W)`, float32, without gradient."""
        return self._velocity(x, sigma)


def _velocity_of(
    teacher: TeacherVelocity, cond: Conditioning
) -> Callable[[Tensor, Tensor], Tensor]:
    """The teacher as a function of (x, sigma)."""
    return lambda x, sigma: teacher.teacher_velocity(x, sigma, cond)


def _role_of(name: str) -> str | None:
    """The role that a parameter belongs to by its module name; None: the frozen base."""
    parts = name.split(".")
    for container in ("lora_A", "lora_B", "heads"):
        if container in parts[:-1]:
            return parts[parts.index(container) + 1]
    return None


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses tensors that aren't exactly the expected names and shapes."""
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        raise ValueError(
            f"the student's tensors don't match the model: {len(missing)} missing "
            f"({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])})"
        )
    wrong = [name for name in expected if tensors[name].shape != expected[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} tensors have another shape than the model's, first {name}: expected "
            f"{tuple(expected[name].shape)}, got {tuple(tensors[name].shape)}"
        )
