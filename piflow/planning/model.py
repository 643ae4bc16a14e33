"""A recipe's model without values: how many weights it has, and where each of them belongs.

Weights come in units: what FSDP gathers at once, for a block or a head to compute with, and the
rest of a module. A unit of a model with adapters holds base, student and EMA weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from piflow import storage
from piflow.backbones.load import DTYPES, family_class, with_frames
from piflow.backbones.transformer import TransformerBackbone, read_model_config
from piflow.config import GMFlowPolicyConfig, PiIDConfig, Published, Recipe, find_family
from piflow.planning.sizes import latent_size
from piflow.planning.stacks import token_linears
from piflow.roles import lora as adapters
from piflow.roles.fp8 import takes_fp8
from piflow.roles.heads import PolicyClock
from piflow.roles.teacher_lora import read_teacher_lora
from piflow.schedule import FewStep

Owner = Literal["base", "student", "ema"]
Part = Literal["block", "rest", "teacher head", "student head", "ema head"]

_FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        itemsize: bytes a value.
        coded: whether an fp8 teacher multiplies by its codes, where the recipe has one.
        linear: whether it is the base's and of a linear layer in a block, which may be in codes.
    """

    shape: tuple[int, ...]
    itemsize: int
    owner: Owner
    coded: bool = False
    linear: bool = False

    @property
    def numel(self) -> int:
        """Values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered at once."""

    part: Part
    weights: tuple[Weight, ...]

    def numel(self, owner: Owner) -> int:
        """Values of one owner."""
        return sum(weight.numel for weight in self.weights if weight.owner == owner)

    def nbytes(self, owner: Owner | None = None) -> int:
        """Bytes, of one owner or of all."""
        return sum(weight.nbytes for weight in self.weights if owner in (None, weight.owner))


@dataclass(frozen=True)
class Model:
    """All of it.

    Attributes:
        source: where the architecture comes from, for people.
        parameters: of the transformer as it is published.
        student, teacher, ema: units that the role's forward pass takes, the rest of its module
            last; with adapters they share their blocks, with full training nothing.
        shared: whether they do.
        text_width: of a token's states.
        pooled_width: of the pooled vector; 0: there is none.
        latent_channels: C.
        width: channels of a token in the blocks.
        blocks: transformer blocks.
    """

    source: str
    parameters: int
    student: tuple[Unit, ...]
    teacher: tuple[Unit, ...]
    ema: tuple[Unit, ...]
    shared: bool
    text_width: int
    pooled_width: int
    latent_channels: int
    width: int
    blocks: int

    @property
    def units(self) -> tuple[Unit, ...]:
        """Every unit once."""
        if not self.shared:
            return (*self.teacher, *self.student, *self.ema)
        heads = (unit for unit in (*self.teacher, *self.ema) if unit.part.endswith("head"))
        return (*self.student, *heads)

    @property
    def base_bytes(self) -> int:
        """Of what is frozen."""
        return sum(unit.nbytes("base") for unit in self.units)

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(unit.numel("student") for unit in self.units)

    @property
    def head(self) -> int:
        """Parameters of the student's policy head, among `trained`; 0: there is none."""
        return sum(unit.numel("student") for unit in self.student if unit.part == "student head")

    @property
    def coded(self) -> list[Weight]:
        """The weights whose codes an fp8 teacher multiplies by."""
        return [weight for unit in self.teacher for weight in unit.weights if weight.coded]

    @property
    def largest(self) -> int:
        """Values of the largest frozen weight."""
        sizes = (w.numel for unit in self.units for w in unit.weights if w.owner == "base")
        return max(sizes, default=0)


def backbone_of(recipe: Recipe, *, published: bool = False) -> tuple[TransformerBackbone, str]:
    """The recipe's backbone on "meta", and where its architecture comes from.

    Args:
        published: where the recipe's model isn't there, take its family's best known one.

    Raises:
        ValueError: there is no config.json, and no published model may stand for it; or a config
            that the family refuses.
    """
    kind = family_class(recipe.model.family)
    if not issubclass(kind, TransformerBackbone):
        raise ValueError(
            f"model.family = {recipe.model.family} can't be counted without its weights: its "
            "backbone is no piflow.backbones.transformer.TransformerBackbone"
        )
    dtype, guidance = DTYPES[recipe.model.dtype], recipe.guidance.embedded
    path, record = recipe.model.path, find_family(recipe.model.family)
    known = _known_model((record.published, *record.others), path)
    if not published or known is None or _is_there(path):
        source = path
        config = read_model_config(storage.for_ranges(path), kind.class_name, path)
    else:
        source = f"{known.name}'s published configuration ({path} isn't there)"
        config = dict(known.config)
    backbone = kind.on_meta(config, dtype=dtype, embedded_guidance=guidance)
    return with_frames(backbone, recipe.model), source


def _known_model(models: Sequence[Published | None], path: str) -> Published | None:
    """The known model whose repository's name is a folder's on the path; else the first."""
    parts = path.split("/")
    for model in models:
        repository = None if model is None else model.repository
        if repository is not None and repository.rpartition("/")[2] in parts:
            return model
    return models[0]


def _is_there(path: str) -> bool:
    """Whether a config.json can be read without a download; a hub's folder isn't asked for one."""
    if path.startswith("hf://"):
        return False
    try:
        return storage.exists(storage.join(path, "config.json"))
    except (OSError, ValueError):
        return False


def model_of(recipe: Recipe, backbone: TransformerBackbone, source: str) -> Model:
    """Sizes of the recipe's roles over this backbone, which stays as it is.

    Raises:
        ValueError: a LoRA target without a match.
    """
    module = backbone.module
    count = sum(parameter.numel() for parameter in module.parameters())
    heads = _heads(recipe, backbone)
    coded = coded_layers(recipe, backbone) if recipe.model.fp8_teacher is not None else frozenset()
    if not isinstance(recipe.objective, PiIDConfig):
        student = tuple(_units(backbone, "student", None))
        ema = tuple(_units(backbone, "ema", None))
        teacher: tuple[Unit, ...] = ()
    elif recipe.lora is None:
        teacher = tuple(_units(backbone, "base", None, coded=coded))
        student = (*_units(backbone, "student", None, skip=backbone.output_names), heads[0])
        ema = (*_units(backbone, "ema", None, skip=backbone.output_names), heads[1])
    else:
        ranks, own = ranks_of(recipe, backbone), teacher_ranks(recipe, backbone)
        output = Unit("teacher head", tuple(_output_weights(backbone)))
        skip = backbone.output_names
        units = tuple(_units(backbone, "base", ranks, skip=skip, coded=coded, teacher=own))
        teacher, student, ema = ((*units, head) for head in (output, *heads))
    pooled = backbone.config.get("pooled_projection_dim") or 0
    return Model(
        source=source,
        parameters=count,
        student=student,
        teacher=teacher,
        ema=ema,
        shared=bool(teacher) and recipe.lora is not None,
        text_width=backbone.text_width,
        pooled_width=int(pooled),
        latent_channels=backbone.latent_channels,
        width=backbone.width,
        blocks=sum(isinstance(part, backbone.block_classes) for part in module.modules()),
    )


def coded_layers(recipe: Recipe, backbone: TransformerBackbone) -> frozenset[str]:
    """Names of the layers whose products an fp8 teacher has in 8 bits, as without adapters."""
    blank = type(backbone).on_meta(
        backbone.config, dtype=backbone.dtype, embedded_guidance=backbone.embedded_guidance
    )
    blank.latent_frames = backbone.latent_frames
    names = token_linears(blank, latent_size(recipe))
    return frozenset(n for n in names if takes_fp8(blank.module.get_submodule(n)))


def teacher_ranks(recipe: Recipe, backbone: TransformerBackbone) -> dict[str, int]:
    """Layer -> rank of the teacher's LoRA, where it lies on the base as an adapter.

    None where the recipe has none, merges it (full training), or where its file can't be read here
    without a download.

    Raises:
        ValueError: as `read_teacher_lora`.
    """
    lora = recipe.model.lora
    if lora is None or recipe.lora is None or lora.path.startswith("hf://"):
        return {}
    try:
        found = read_teacher_lora(recipe.model)
    except OSError:
        return {}
    return {} if found is None else found.without(backbone.output_names).ranks


def _units(
    backbone: TransformerBackbone,
    owner: Owner,
    ranks: dict[str, int] | None,
    *,
    skip: tuple[str, ...] = (),
    coded: frozenset[str] = frozenset(),
    teacher: dict[str, int] | None = None,
) -> Iterator[Unit]:
    """A module's blocks and the rest of it, adapters included; not what lies under `skip`."""
    module = backbone.module
    taken: set[str] = set()
    for name, part in module.named_modules():
        if isinstance(part, backbone.block_classes):
            names = [f"{name}.{inner}" for inner, _ in part.named_parameters()]
            taken.update(names)
            weights = _weights(module, names, owner, ranks, f"{name}.", coded)
            lora = _teachers(module, teacher or {}, f"{name}.")
            yield Unit("block", (*weights, *lora))
    left = [
        name
        for name, _ in module.named_parameters()
        if name not in taken and not name.startswith(tuple(f"{entry}." for entry in skip))
    ]
    own, lora_left = (
        {name: rank for name, rank in (found or {}).items() if not _in_blocks(name, taken)}
        for found in (ranks, teacher)
    )
    weights = _weights(module, left, owner, own, "")
    yield Unit("rest", (*weights, *_teachers(module, lora_left, "")))


def _in_blocks(layer: str, taken: set[str]) -> bool:
    return f"{layer}.weight" in taken


def _weights(
    module: nn.Module,
    names: list[str],
    owner: Owner,
    ranks: dict[str, int] | None,
    under: str,
    coded: frozenset[str] = frozenset(),
) -> Iterator[Weight]:
    for name in names:
        parameter = module.get_parameter(name)
        size = parameter.itemsize if owner == "base" else _FLOAT
        layer, _, kind = name.rpartition(".")
        is_weight = kind == "weight"
        linear = is_weight and bool(under) and type(module.get_submodule(layer)) is nn.Linear
        yield Weight(
            tuple(parameter.shape), size, owner, is_weight and layer in coded,
            linear and owner == "base",
        )  # fmt: skip
    adapter: tuple[Owner, Owner] = ("student", "ema")
    for _, shapes in _factors(module, ranks or {}, under):
        yield from (Weight(shape, _FLOAT, role) for role in adapter for shape in shapes)


def _teachers(module: nn.Module, ranks: dict[str, int], under: str) -> Iterator[Weight]:
    """The teacher's LoRA below a name, which is kept in its layers' dtype."""
    for layer, shapes in _factors(module, ranks, under):
        yield from (Weight(shape, layer.itemsize, "base") for shape in shapes)


def _factors(
    module: nn.Module, ranks: dict[str, int], under: str
) -> Iterator[tuple[nn.Parameter, tuple[tuple[int, int], tuple[int, int]]]]:
    """The weight of each adapted layer below a name, and the shapes of its adapter's matrices."""
    for name, rank in ranks.items():
        if name.startswith(under):
            weight = module.get_parameter(f"{name}.weight")
            out, into = weight.shape
            yield weight, ((rank, into), (out, rank))


def ranks_of(recipe: Recipe, backbone: TransformerBackbone) -> dict[str, int]:
    """Layer -> rank of the recipe's adapters, as `Trio.from_backbone` chooses them."""
    if recipe.lora is None:
        return {}
    module, skip = backbone.module, backbone.output_names
    targets = recipe.lora.targets
    if targets is None:
        targets = adapters.present_targets(module, backbone.default_lora_targets, skip=skip)
    return dict.fromkeys(adapters.resolve_targets(module, targets, skip=skip), recipe.lora.rank)


def _output_weights(backbone: TransformerBackbone) -> Iterator[Weight]:
    for parameter in backbone.output_layer().parameters():
        yield Weight(tuple(parameter.shape), parameter.itemsize, "base")


def clock_of(recipe: Recipe) -> PolicyClock:
    """What a DX policy's head is made for."""
    return PolicyClock.of(FewStep.of(recipe.distillation()))


def _heads(recipe: Recipe, backbone: TransformerBackbone) -> tuple[Unit, Unit]:
    """The student's and the EMA's; empty without a policy."""
    if not isinstance(recipe.objective, PiIDConfig):
        return Unit("student head", ()), Unit("ema head", ())
    output = backbone.output_layer()
    norm, projection = output.norm, output.projection
    shapes = [tuple(parameter.shape) for parameter in norm.parameters()]
    features, width = projection.weight.shape
    policy = recipe.policy
    if isinstance(policy, GMFlowPolicyConfig):
        weights = policy.num_gaussians * (features // backbone.latent_channels)
        inner = policy.logstd_inner_dim
        layers = [(policy.num_gaussians * features, width), (weights, width), (inner, width)]
        layers.append((1, inner))
    else:
        layers = [(policy.num_points * features, width)]
    shapes += [shape for layer in layers for shape in (layer, layer[:1])]
    student = tuple(Weight(shape, _FLOAT, "student") for shape in shapes)
    ema = tuple(Weight(shape, _FLOAT, "ema") for shape in shapes)
    return Unit("student head", student), Unit("ema head", ema)
