"""One micro-batch's passes, run without values and counted: student, teacher, losses, backward.

The code that runs is training's own: the trio, its guided teacher and π-ID's losses. Blocks that
are alike are run once and counted as often as the model has them: a pass with one of a kind, and
one with two, tell what each more costs.

    stack of 38 blocks       first, middle ×36, last
    runs                     first, middle, last  and  first, middle, middle, last
    costs of the model       the former + 35 × (the latter - the former)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from piflow.backbones import Conditioning
from piflow.backbones.transformer import TransformerBackbone
from piflow.config import GMFlowPolicyConfig, LoRAConfig, PiIDConfig, Recipe
from piflow.imitation import ImitationSettings, run_data_free
from piflow.planning.counting import Counts, Operation, Watch, fused_attention
from piflow.planning.model import clock_of, ranks_of, teacher_ranks
from piflow.planning.sizes import condition_size, latent_size
from piflow.planning.stacks import block_stacks, form_of, set_blocks
from piflow.policies.base import Policy
from piflow.roles import lora as adapters
from piflow.roles.guided import GuidedTeacher
from piflow.roles.heads import build_head
from piflow.roles.teacher_lora import TEACHER as TEACHER_LORA
from piflow.roles.trio import SharedBackbone, Trio
from piflow.schedule import FewStep

Checkpointing = Literal["none", "full", "selective"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")

STUDENT, TEACHER, LOSSES, BACKWARD = "student", "teacher", "policy and losses", "backward"
PHASES = (STUDENT, TEACHER, LOSSES, BACKWARD)

_MOST_SAMPLES = 64  # of a pass that is run: larger micro-batches are so many times that


@dataclass(frozen=True)
class Passes:
    """A segment of a micro-batch: the student once, its teacher's calls, losses and backward pass.

    Attributes:
        operations: phase -> kernels and how many times each.
        kept: bytes of activations that the student's forward pass keeps for its backward pass.
        policy: bytes that the policy, its rollouts and the losses keep besides.
        working: bytes at the peak beyond both.
        peak_phase: when that is.
    """

    operations: dict[str, Counter[Operation]]
    kept: int
    policy: int
    working: int
    peak_phase: str

    def times(self, factor: float) -> Passes:
        """Of so many times the samples."""
        operations = {
            phase: Counter({_times(operation, factor): n for operation, n in counts.items()})
            for phase, counts in self.operations.items()
        }
        kept, policy, working = self.kept * factor, self.policy * factor, self.working * factor
        return Passes(operations, int(kept), int(policy), int(working), self.peak_phase)

    def flops(self, phase: str) -> dict[tuple[str, str], int]:
        """(kind, dtype) -> operations of products in one phase."""
        sums: Counter[tuple[str, str]] = Counter()
        for operation, count in self.operations.get(phase, {}).items():
            if operation.flops:
                sums[operation.kind, operation.dtype] += operation.flops * count
        return dict(sums)


def _times(operation: Operation, factor: float) -> Operation:
    flops, moved = int(operation.flops * factor), int(operation.moved * factor)
    return Operation(operation.kind, operation.dtype, flops, moved)


class Passing:
    """Counts a recipe's passes over a backbone on "meta", which it takes over.

    A policy's rollouts and losses cost the same whatever the blocks keep, and take the longest to
    count: they run once. Blocks are counted under a loss that is a policy's plain velocity.

    Raises:
        ValueError: a LoRA target without a match.
    """

    def __init__(self, recipe: Recipe, backbone: TransformerBackbone) -> None:
        self._recipe = recipe
        self._batch = min(recipe.training.micro_batch_size, _MOST_SAMPLES)
        self._runs = _shorten(backbone)
        with torch.random.fork_rng(devices=[]):
            self._trio = _trio(recipe, backbone)
        self._backbone = backbone
        self._student = backbone if self._trio is None else self._trio.backbone
        modules = (backbone.module,) if self._trio is None else self._trio.modules
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        self._parameters = trained
        self._stacks = [
            numbered
            for module in modules
            for numbered in enumerate(block_stacks(module, backbone.block_classes))
        ]
        with self._one_of_each():
            self._full, self._plain = self._count(plain=False), self._count(plain=True)
        self._passes = {"none": self._measured(self._plain)}

    def measure(self, checkpointing: Checkpointing) -> Passes:
        """The model's passes with blocks kept or computed again."""
        if checkpointing not in self._passes:
            selective = checkpointing == "selective"
            self._student.enable_gradient_checkpointing(selective=selective)
            with self._one_of_each():
                least = self._count(plain=True)
            self._passes[checkpointing] = self._measured(least)
        return self._passes[checkpointing]

    def _one_of_each(self, but: _Run | None = None) -> AbstractContextManager[None]:
        """Every run is one block long inside, and `but` two."""
        return _left_out(self._stacks, [run for run in self._runs if run is not but])

    def _measured(self, least: Counts) -> Passes:
        """All of the model's passes, from those of its shortest form under the plain loss."""
        operations = {phase: Counter(counts) for phase, counts in least.operations.items()}
        for phase in (LOSSES, BACKWARD):  # the policy's share
            _add(operations, phase, self._full, self._plain, 1)
        operations[TEACHER] = Counter(self._full.operations.get(TEACHER, {}))
        kept = _kept(least)
        for run in self._runs:
            with self._one_of_each(but=run):
                more = self._count(plain=True)
            for phase in PHASES:
                _add(operations, phase, more, least, run.length - 1)
            kept += (_kept(more) - _kept(least)) * (run.length - 1)
        return self._with_memory(operations, kept, least)

    def _with_memory(
        self, operations: dict[str, Counter[Operation]], kept: int, least: Counts
    ) -> Passes:
        losses, backward = self._full.spans[LOSSES], self._full.spans[BACKWARD]
        policy = backward.start - self._full.spans[STUDENT].end
        plain = least.spans[BACKWARD]
        beyond = {  # what is kept of the student, at each phase's peak
            STUDENT: least.spans[STUDENT].peak - least.spans[STUDENT].end,
            LOSSES: losses.peak - self._full.spans[STUDENT].end,
            BACKWARD: max(policy + backward.peak - backward.start, plain.peak - plain.start),
        }
        highest = max(beyond, key=lambda phase: beyond[phase])
        working = max(beyond[highest] - policy, 0)
        teacher = self._full.spans.get(TEACHER)
        if highest == LOSSES and teacher is not None and teacher.peak == losses.peak:
            highest = TEACHER
        passes = Passes(operations, kept, policy, working, highest)
        factor = self._recipe.training.micro_batch_size / self._batch
        return passes if factor == 1 else passes.times(factor)

    def _count(self, *, plain: bool) -> Counts:
        watch = Watch()
        for parameter in self._parameters:  # of the micro-batch before
            parameter.grad = torch.zeros_like(parameter)
        with torch.random.fork_rng(devices=[]), fused_attention(), watch:
            if self._trio is None:
                self._pretrain(watch)
            else:
                self._distil(watch, self._trio, plain)
        return watch.counts

    def _inputs(self) -> tuple[Tensor, Conditioning]:
        """Latents and prompts of a micro-batch."""
        height, width = latent_size(self._recipe)
        with torch.device("meta"):
            x = torch.empty(self._batch, self._backbone.latent_channels, height, width)
            cond = self._backbone.blank_conditioning(self._recipe.encoder.text_tokens)
            shown = condition_size(self._recipe)
            if shown is not None:
                cond = cond.editing(self._backbone.blank_condition(*shown))
        return x, cond.select(torch.zeros(self._batch, dtype=torch.long))

    def _distil(self, watch: Watch, trio: Trio, plain: bool) -> None:
        objective = self._recipe.distillation()
        x, cond = self._inputs()
        negative = cond.select(torch.zeros(1, dtype=torch.long))
        guided = GuidedTeacher(trio, cond, negative, self._recipe.guidance)
        called: list[Tensor] = []

        def student(x: Tensor, sigma: Tensor) -> Policy:
            with watch.phase(STUDENT):
                return trio.student(x, sigma, cond)

        def teacher(x: Tensor, sigma: Tensor) -> Tensor:
            if called:  # all calls cost the same
                return torch.empty_like(called[0])
            with watch.phase(TEACHER):
                called.append(guided(x, sigma))
            return called[0]

        parts = run_data_free(
            student,
            teacher,
            x,
            FewStep.of(objective),
            self._settings(),
            generator=torch.Generator().manual_seed(0),
        )
        with watch.phase(LOSSES):
            if plain:
                sigma = torch.ones(len(x), device="meta")
                loss = (student(x, sigma).velocity(x, sigma) - teacher(x, sigma)).square().mean()
            else:
                loss, _ = next(parts)
        with watch.phase(BACKWARD):
            loss.backward()

    def _settings(self) -> ImitationSettings:
        """As at a run's end: the student walks all the way, which is the longer one."""
        objective, policy = self._recipe.distillation(), self._recipe.policy
        return ImitationSettings(
            num_states=objective.num_intermediate_states,
            window_substeps=objective.window_substeps,
            dropout=policy.dropout if isinstance(policy, GMFlowPolicyConfig) else 0.0,
        )

    def _pretrain(self, watch: Watch) -> None:
        x, cond = self._inputs()
        with watch.phase(LOSSES):
            with watch.phase(STUDENT):
                velocity = self._backbone(x, torch.ones(len(x), device="meta"), cond)
            loss = (velocity - x).square().mean()
        with watch.phase(BACKWARD):
            loss.backward()


def _add(
    operations: dict[str, Counter[Operation]], phase: str, more: Counts, less: Counts, times: int
) -> None:
    """Adds so many times what `more` has more of than `less` in a phase."""
    counts = operations.setdefault(phase, Counter())
    above, below = (part.operations.get(phase, Counter()) for part in (more, less))
    for operation in above.keys() | below.keys():
        counts[operation] += (above[operation] - below[operation]) * times


def _kept(counts: Counts) -> int:
    return counts.spans[STUDENT].end - counts.spans[STUDENT].start


def _trio(recipe: Recipe, backbone: TransformerBackbone) -> Trio | None:
    """The recipe's roles, all on "meta"; None for pre-training, which has none.

    With adapters there is no EMA, which no pass of training asks.
    """
    if not isinstance(recipe.objective, PiIDConfig):
        backbone.module.requires_grad_(True)
        return None
    for name in backbone.output_names:  # heads copy their values
        backbone.module.get_submodule(name).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    if recipe.lora is None:
        trio = Trio.from_backbone(
            backbone, None, recipe.policy, clock_of(recipe), generator=generator
        )
    else:
        adapters.add_layers(
            backbone.module,
            STUDENT,
            ranks_of(recipe, backbone),
            dropout=recipe.lora.dropout,
            compute_dtype=recipe.lora.compute_dtype,
        )
        _add_teachers_lora(recipe, recipe.lora, backbone)
        output = backbone.output_layer()
        head = build_head(output, recipe.policy, clock_of(recipe), generator=generator)
        trio = Trio(SharedBackbone(backbone, {STUDENT: head}))
    for module in trio.modules:
        nn.Module.to(module, "meta")  # diffusers' own warns of dtypes
    return trio.train(True)


def _add_teachers_lora(recipe: Recipe, lora: LoRAConfig, backbone: TransformerBackbone) -> None:
    """In the base's dtype, on those of its layers that the shortened model has."""
    module = backbone.module
    layers = {name.replace(".base_layer", "") for name, _ in module.named_modules()}
    ranks = {n: rank for n, rank in teacher_ranks(recipe, backbone).items() if n in layers}
    if not ranks:
        return
    compute = lora.compute_dtype
    adapters.add_layers(module, TEACHER_LORA, ranks, dropout=0.0, compute_dtype=compute)
    for name in ranks:
        for kind in ("lora_A", "lora_B"):
            module.get_submodule(f"{name}.{kind}.{TEACHER_LORA}").to(backbone.dtype)


@dataclass(frozen=True)
class _Run:
    """Neighbours in a stack that are alike; two of them are there.

    Attributes:
        stack: number of the module's list of blocks.
        second: the place there of the one that may be left out.
        length: how many the model has.
    """

    stack: int
    second: int
    length: int


def _shorten(backbone: TransformerBackbone) -> list[_Run]:
    """Leaves two of each run of three or more alike blocks within a stack."""
    runs = []
    for number, stack in enumerate(block_stacks(backbone.module, backbone.block_classes)):
        blocks: list[nn.Module] = list(stack)
        kept = blocks[:1]
        for _, group in groupby(blocks[1:-1], key=form_of):
            alike = list(group)
            kept += alike[:2]
            if len(alike) > 2:
                runs.append(_Run(number, len(kept) - 1, len(alike)))
        set_blocks(stack, [*kept, *blocks[1:][-1:]])
    return runs


@contextmanager
def _left_out(stacks: Sequence[tuple[int, nn.ModuleList]], runs: Sequence[_Run]) -> Iterator[None]:
    """These runs are one block long inside, in all modules.

    Args:
        stacks: of all modules, each with its number in its module.
    """
    whole = [(number, stack, list(stack)) for number, stack in stacks]
    for number, stack, blocks in whole:
        seconds = [run.second for run in runs if run.stack == number]
        set_blocks(stack, [block for place, block in enumerate(blocks) if place not in seconds])
    try:
        yield
    finally:
        for _, stack, blocks in whole:
            set_blocks(stack, blocks)
