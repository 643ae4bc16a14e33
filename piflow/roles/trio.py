"""Teacher, student and EMA behind one interface.

With LoRA they are three views of one backbone:

    frozen base ──┬─ no adapter        + the model's own output layer = teacher
                  ├─ adapter "student" + policy head "student"        = student (trained)
                  └─ adapter "ema"     + policy head "ema"            = EMA of the student

A teacher with a LoRA of its own has it on the base as an adapter that is always on.

One copy of the base in memory and in every all-gather. Between calls the student is active, so a
backward pass that recomputes activations (gradient checkpointing) recomputes the student's.

With full training they are three backbones: the teacher as it was loaded, and two float32 copies of
it with a policy head each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from piflow.backbones import Backbone, Conditioning, OutputLayer
from piflow.config.model import BaseWeights, LoRAConfig
from piflow.config.objective import PolicyConfig
from piflow.ema import ema_update
from piflow.policies import DXPolicy, GMFlowPolicy
from piflow.roles import lora as adapters
from piflow.roles import teacher_lora as teachers
from piflow.roles.base_weights import Coded, code_base
from piflow.roles.fp8 import Fp8Linears
from piflow.roles.heads import (
    BIAS_NOISE,
    DXHead,
    GMHead,
    OutputRouter,
    PolicyClock,
    PolicyHead,
    build_head,
)
from piflow.roles.merged import for_backbone
from piflow.sharding.weights import StoredTensor, read_tensor

if TYPE_CHECKING:
    from piflow.roles.adapter import Adapter


STUDENT = "student"

EMA = "ema"


class Roles(Protocol):
    """Which weights the roles have, and how to call them; "student" is always there.

    Attributes:
        backbone: the student's.
        modules: everything with weights.
        heads: policy head by role.
    """

    backbone: Backbone
    modules: tuple[nn.Module, ...]
    heads: dict[str, PolicyHead]

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The teacher's `(B, C, H, W)` velocity, float32, without gradient."""
        ...

    def use_fp8_teacher(self, keep: bool) -> Fp8Linears:
        """From now on the teacher's matrix products are in fp8; what switches them."""
        ...

    def tokens(self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The tokens `(B, HW/4, F)` of the role's head."""
        ...

    def body_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own weights but the head's, by published name."""
        ...

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""
        ...


class SharedBackbone:
    """LoRA: one module, whose adapters and output router are switched to a role for a call.

    Args:
        backbone: has the adapters of the roles; it is taken over.
        heads: policy head by role.

    Raises:
        ValueError: the backbone was taken over before.
    """

    def __init__(self, backbone: Backbone, heads: dict[str, PolicyHead]) -> None:
        self.backbone = backbone
        self.modules: tuple[nn.Module, ...] = (backbone.module,)
        self.heads = heads
        self._router = OutputRouter(backbone.output_layer(), heads, STUDENT)
        backbone.install_output(self._router)
        self._adapted = adapters.layers(backbone.module)
        self._fp8: Fp8Linears | None = None
        self._activate(STUDENT)

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with self._role(None), _active(self._fp8):
            return self.backbone.teacher_velocity(x, sigma, cond)

    def use_fp8_teacher(self, keep: bool) -> Fp8Linears:
        self._fp8 = Fp8Linears(self.backbone.module, self.backbone.block_classes, keep=keep)
        return self._fp8

    def tokens(self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with self._role(role):
            return self.backbone.output_tokens(x, sigma, cond)

    def body_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The LoRA weights."""
        return adapters.parameters(self.backbone.module, role)

    def train(self, mode: bool) -> None:
        """LoRA dropout is the only difference; the EMA's adapter has none."""
        self.backbone.module.train(mode)

    @contextmanager
    def _role(self, role: str | None) -> Iterator[None]:
        """Activates a role (None: the teacher), then the student again."""
        self._activate(role)
        try:
            yield
        finally:
            self._activate(STUDENT)

    def _activate(self, role: str | None) -> None:
        own = () if role is None else (role,)
        adapters.activate(self._adapted, teachers.TEACHER, *own)
        self._router.role = "teacher" if role is None else role


class MergedStudent(SharedBackbone):
    """A merged student, which has no teacher in it: another backbone, if there is one, is that.

    Args:
        backbone, heads: as of `SharedBackbone`; more LoRA may be on it.
        teacher: stays as it is.
    """

    def __init__(
        self, backbone: Backbone, heads: dict[str, PolicyHead], teacher: Backbone | None
    ) -> None:
        super().__init__(backbone, heads)
        self._teacher = teacher
        if teacher is not None:
            self.modules = (backbone.module, teacher.module)

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        if self._teacher is None:
            raise ValueError("a merged student has no teacher in it: load its adapter for that")
        return self._teacher.teacher_velocity(x, sigma, cond)


class SeparateBackbones:
    """Full training: the teacher's module, and a float32 copy of it for each role.

    Args:
        teacher: stays as it is.
        head: copied for each role.
        roles: "student", and what else has weights of its own.
    """

    def __init__(self, teacher: Backbone, head: PolicyHead, roles: Sequence[str]) -> None:
        self.heads = {role: copy.deepcopy(head) for role in roles}
        self._teacher = teacher
        self._copies = {role: _float_copy(teacher) for role in roles}
        for role, backbone in self._copies.items():
            backbone.install_output(self.heads[role])
        self.backbone = self._copies[STUDENT]
        self.modules = (teacher.module, *(copied.module for copied in self._copies.values()))
        self._fp8: Fp8Linears | None = None

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with _active(self._fp8):
            return self._teacher.teacher_velocity(x, sigma, cond)

    def use_fp8_teacher(self, keep: bool) -> Fp8Linears:
        self._fp8 = Fp8Linears(self._teacher.module, self._teacher.block_classes, keep=keep)
        return self._fp8

    def tokens(self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self._copies[role].output_tokens(x, sigma, cond)

    def body_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The module's own names; the head, wherever it was installed, is left out."""
        head = {id(parameter) for parameter in self.heads[role].parameters()}
        named = self._copies[role].module.named_parameters()
        return {name: parameter for name, parameter in named if id(parameter) not in head}

    def train(self, mode: bool) -> None:
        """Switch dropout on or off in the student; teacher and EMA never have it."""
        for module in self.modules:
            module.eval()
        self.backbone.module.train(mode)


def _active(fp8: Fp8Linears | None) -> AbstractContextManager[None]:
    return nullcontext() if fp8 is None else fp8.active()


class Trio:
    """Three roles; callers name the role by the method and toggle nothing.

    `x` is `(B, C, H, W)`, `sigma` `(B,)`, `cond` a `Conditioning` of B prompts. Make one with
    `build_trio` (training) or `Trio.from_adapter` (sampling).

    Attributes:
        coded: what the frozen base became in `code_base`; None: it is as it was loaded.
    """

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        self._fp8: Fp8Linears | None = None
        self.coded: Coded | None = None
        for module in roles.modules:
            module.requires_grad_(False)
        for parameter in self.trainable_parameters().values():
            parameter.requires_grad_(True)

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        lora: LoRAConfig | None,
        policy: PolicyConfig,
        clock: PolicyClock | None,
        *,
        generator: torch.Generator,
        bias_noise: float = BIAS_NOISE,
        teacher_lora: teachers.TeacherLora | None = None,
    ) -> Trio:
        """Adds student and EMA, equal to each other, to a loaded backbone, which it takes over.

        At the start the student's policy is the teacher's velocity; a GM one's up to its mixture's
        std and `bias_noise`.

        Args:
            lora: None for full training.
            clock: DX only.
            generator: a CPU generator; equal seeds give equal trios on every worker and device.
            teacher_lora: what the teacher, and with it the student, has on top of the base; with
                full training it is merged into the base's weights.

        Raises:
            ValueError: a LoRA target without a match, a teacher's LoRA that doesn't fit, a DX
                policy without a clock, or a backbone that was taken over before.
        """
        if teacher_lora is not None:
            teachers.merge(backbone, teacher_lora, outputs_alone=lora is not None)
        output = backbone.output_layer()  # of other conventions a copy, so after the merge
        if lora is not None:
            _inject_lora(backbone, lora, generator)
            if teacher_lora is not None:
                teachers.put_on(backbone, teacher_lora, lora.compute_dtype)
        head = build_head(output, policy, clock, generator=generator, bias_noise=bias_noise)
        roles: Roles
        if lora is None:
            roles = SeparateBackbones(backbone, head, (STUDENT, EMA))
        else:
            roles = SharedBackbone(backbone, {STUDENT: head, EMA: copy.deepcopy(head)})
        trio = cls(roles)
        ema_update(
            list(trio.ema_parameters().values()), list(trio.trainable_parameters().values()), 0
        )
        return trio.train(True)

    @classmethod
    def from_adapter(
        cls,
        backbone: Backbone,
        adapter: Adapter,
        teacher_lora: teachers.TeacherLora | None = None,
        teacher: Backbone | None = None,
    ) -> Trio:
        """Adds a published adapter to a loaded backbone, for sampling: teacher and student only.

        Args:
            backbone: the base; of a merged student its own, less its values filled in.
            teacher_lora: of the teacher that the student was made from; a merged one has it.
            teacher: beside a merged student; None: only the student is asked.

        Raises:
            ValueError: the adapter was made for another architecture, its tensors or the teacher's
                LoRA don't fit, or a backbone that was taken over before.
        """
        adapter = for_backbone(adapter, backbone)
        adapter.check_fits(backbone)
        if teacher_lora is not None:
            teachers.merge(backbone, teacher_lora, outputs_alone=not adapter.is_full_model)
        generator = torch.Generator().manual_seed(0)  # every value it draws is overwritten below
        config = adapter.config
        head = build_head(
            backbone.output_layer(), config.policy(), config.clock(), generator=generator
        )
        roles: Roles
        if adapter.is_full_model:
            roles = SeparateBackbones(backbone, head, (STUDENT,))
        else:
            ranks = adapters.ranks_of(adapter.tensors)
            if ranks:
                adapters.inject(backbone.module, STUDENT, ranks, dropout=0.0, generator=generator)
            if teacher_lora is not None:
                teachers.put_on(backbone, teacher_lora)
            heads = {STUDENT: head}
            roles = (
                SharedBackbone(backbone, heads)
                if adapter.body is None
                else MergedStudent(backbone, heads, teacher)
            )
        trio = cls(roles)
        trio.load_student(adapter.tensors)
        return trio.train(False)

    @property
    def backbone(self) -> Backbone:
        """The student's; with LoRA the one that all roles share."""
        return self._roles.backbone

    @property
    def head(self) -> PolicyHead:
        """The student's, which reads a policy from the tokens of `backbone`."""
        return self._roles.heads[STUDENT]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What is sharded: one module with LoRA, the roles' three with full training."""
        return self._roles.modules

    @property
    def block_classes(self) -> tuple[type[nn.Module], ...]:
        """Modules that are sharded one by one: the backbone's blocks and the output layers.

        And the layers in blocks whose weights an fp8 teacher doesn't ask for.
        """
        own = () if self._fp8 is None else self._fp8.apart
        return (*self.backbone.block_classes, OutputLayer, GMHead, DXHead, *own)

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The teacher's unguided velocity `(B, C, H, W)`, float32, without gradient."""
        return self._roles.teacher_velocity(x, sigma, cond)

    def student(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> GMFlowPolicy | DXPolicy:
        """The student's policy from `(x, sigma)`, with gradient unless the caller forbids it.

        LoRA dropout (training mode only) draws from torch's global generator.
        """
        return self._policy(STUDENT, x, sigma, cond)

    @torch.no_grad()
    def ema(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> GMFlowPolicy | DXPolicy:
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
    def load_student(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the student's weights from whole tensors by published name; before sharding.

        Raises:
            ValueError: a name that is missing or unknown, or a shape that doesn't fit.
        """
        parameters = self.trainable_parameters()
        _check_tensors(tensors, parameters)
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])

    def begin_as(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets student and EMA, as `load_student`."""
        self.load_student(tensors)
        ema_update(
            list(self.ema_parameters().values()), list(self.trainable_parameters().values()), 0
        )

    def train(self, mode: bool = True) -> Trio:
        """Training mode (LoRA dropout on) or evaluation mode; returns itself."""
        self._roles.train(mode)
        return self

    def enable_gradient_checkpointing(self, *, selective: bool = False) -> None:
        """Recomputes each of the student's blocks in the backward pass: less memory, more time.

        Args:
            selective: matrix products and attention are kept: some more memory, little more time.
        """
        self.backbone.enable_gradient_checkpointing(selective=selective)

    def use_fp8_teacher(self, *, keep: bool = False) -> Fp8Linears:
        """Compute the teacher's matrix products in fp8 (`piflow.roles.fp8`). Before sharding.

        Args:
            keep: weights are quantised once, at the first call.

        Returns:
            What says where their weights come from.

        Raises:
            ValueError: torchao isn't installed, or no layer has a size that fp8 takes.
        """
        self._fp8 = self._roles.use_fp8_teacher(keep)
        return self._fp8

    def code_base(
        self,
        kind: BaseWeights,
        *,
        stored: Mapping[str, StoredTensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Puts the frozen base into codes (`piflow.roles.base_weights`); with LoRA, unsharded.

        Args:
            stored: where the weights lie that have no storage, by their names in the module.
            device: where codes are made and stay.

        Raises:
            ValueError: full training, no torchao, or no layer that can be in codes.
        """
        if len(self.modules) != 1:
            raise ValueError("model.base_weights: full training has no frozen base of its own")

        def read(name: str, parameter: Tensor) -> Tensor:
            if not parameter.is_meta:
                return parameter
            return read_tensor((stored or {})[name])

        backbone = self.backbone
        self.coded = code_base(backbone.module, backbone.block_classes, kind, read, device=device)

    def exact_teacher(self) -> AbstractContextManager[None]:
        """Inside, `teacher_velocity` is that of the base's own precision."""
        return nullcontext() if self._fp8 is None else self._fp8.suspended()

    def _policy(
        self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> GMFlowPolicy | DXPolicy:
        head = self._head_of(role)
        tokens = self._roles.tokens(role, x, sigma, cond)
        return head.policy(tokens, self.backbone.unpack, x, sigma)

    def _parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        head = self._head_of(role)
        return {**self._roles.body_parameters(role), **dict(head.named_parameters())}

    def _head_of(self, role: str) -> PolicyHead:
        if role not in self._roles.heads:
            raise ValueError(
                f"this trio has no {role!r} role: it was made from an adapter, for sampling; use "
                "student, or build_trio"
            )
        return self._roles.heads[role]


def _inject_lora(backbone: Backbone, lora: LoRAConfig, generator: torch.Generator) -> None:
    """Adds the student's and the EMA's adapter."""
    module, skip = backbone.module, backbone.output_names
    targets = lora.targets
    if targets is None:
        targets = adapters.present_targets(module, backbone.default_lora_targets, skip=skip)
    ranks = dict.fromkeys(adapters.resolve_targets(module, targets, skip=skip), lora.rank)
    if not ranks:
        raise ValueError(
            "lora.targets names no layer of the model: list some, or set lora to null to train all "
            "weights"
        )
    compute = lora.compute_dtype
    for role, dropout in ((STUDENT, lora.dropout), (EMA, 0.0)):
        adapters.inject(
            module,
            role,
            ranks,
            dropout=dropout,
            generator=generator,
            compute_dtype=compute,
            init=lora.init,
        )


def _float_copy(backbone: Backbone) -> Backbone:
    """An independent backbone in float32."""
    copied = copy.deepcopy(backbone)
    copied.module.float()
    copied.dtype = torch.float32
    return copied


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
