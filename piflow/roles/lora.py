"""Named LoRA adapters on a frozen module: where they go, what they are called, which one is on.

PEFT supplies the layers. Its public toggles change `requires_grad` as a side effect, so which
adapter is active is set here, on the layers' flags alone.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from piflow.config.model import ComputeDtype, LoRAInit
from piflow.storage.foreign import parse_object, shown

LORA_METADATA_KEY = "lora_adapter_metadata"  # diffusers': PEFT's configuration as JSON
ALPHA_KEYS = ("lora_alpha", "network_alpha", "ss_network_alpha")  # other exporters' metadata

_LAYER = re.compile(r"[\w.]+")


def resolve_targets(module: nn.Module, targets: Iterable[str], *, skip: Sequence[str]) -> list[str]:
    """Full names of the linear layers that the suffixes stand for, in the module's order.

    Args:
        targets: name suffixes, whole path components ("proj_out" isn't "xproj_out").
        skip: names of submodules that are never adapted, with all below them.

    Raises:
        ValueError: a target that matches no linear layer; lists what comes close.
    """
    linear = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not _under(name, skip)
    ]
    wanted = list(targets)
    matched = {target: [name for name in linear if _ends(name, target)] for target in wanted}
    missing = [target for target, names in matched.items() if not names]
    if missing:
        suffixes = sorted({suffix for name in linear for suffix in _suffixes(name)})
        near = difflib.get_close_matches(missing[0], suffixes, n=5, cutoff=0.4)
        raise ValueError(
            f"LoRA target {missing[0]!r} matches no linear layer of the model; "
            f"close to it: {', '.join(near) if near else 'nothing'}. Correct lora.targets, "
            "or leave it out for the family's own"
        )
    chosen = {name for names in matched.values() for name in names}
    return [name for name in linear if name in chosen]


def present_targets(module: nn.Module, targets: Iterable[str], *, skip: Sequence[str]) -> list[str]:
    """Those of a family's default targets that this model has (a small one may lack a kind)."""
    linear = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not _under(name, skip)
    ]
    return [target for target in targets if any(_ends(name, target) for name in linear)]


def inject(
    module: nn.Module,
    adapter: str,
    ranks: Mapping[str, int],
    *,
    dropout: float,
    generator: torch.Generator,
    compute_dtype: ComputeDtype = "base",
    init: LoRAInit = "kaiming",
) -> None:
    """Adds a float32 LoRA adapter, alpha = rank, to the named layers; B is zero.

    It lies where its layer does; on a layer without storage (on "meta"), on the CPU.

    Args:
        ranks: full layer name -> rank.
        dropout: on the adapter's input, in training mode.
        generator: a CPU generator; the values don't depend on the device.
        compute_dtype: what its matrix products are computed in.
        init: what A is drawn from.
    """
    add_layers(module, adapter, ranks, dropout=dropout, compute_dtype=compute_dtype)
    for name in ranks:
        for kind in ("lora_A", "lora_B"):
            layer = module.get_submodule(f"{name}.{kind}.{adapter}")
            if layer.get_parameter("weight").is_meta:  # as PEFT makes it on a base without storage
                layer.to_empty(device="cpu")
        down = module.get_parameter(f"{name}.lora_A.{adapter}.weight")
        value = torch.empty(down.shape)
        if init == "gaussian":
            nn.init.normal_(value, std=1 / len(value), generator=generator)
        else:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            down.copy_(value)
            nn.init.zeros_(module.get_parameter(f"{name}.lora_B.{adapter}.weight"))


def add_layers(
    module: nn.Module,
    adapter: str,
    ranks: Mapping[str, int],
    *,
    dropout: float,
    compute_dtype: ComputeDtype = "base",
) -> None:
    """`inject` without values: float32 weights where their layers lie, on "meta" as well."""
    patterns = dict(ranks)
    first = next(iter(patterns.values()))
    config = LoraConfig(
        r=first,
        lora_alpha=first,
        rank_pattern=patterns,
        alpha_pattern=patterns,
        target_modules=list(patterns),
        lora_dropout=dropout,
        init_lora_weights=True,
    )
    with warnings.catch_warnings():
        # PEFT warns of a second adapter on one model, which is what is wanted here
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, module, adapter_name=adapter)
    for name in patterns:
        layer = module.get_submodule(name)
        for kind in ("lora_A", "lora_B"):
            projections = layer.get_submodule(kind)
            plain = projections.get_submodule(adapter).float()
            if compute_dtype == "base":
                plain = _InputDtypeLinear.of(plain)
            projections.add_module(adapter, plain)
    for adapted in layers(module):  # PEFT would cast their input to the weights' float32
        adapted.cast_input_dtype_enabled = compute_dtype == "float32"
        adapted.lora_variant.update(dict.fromkeys(adapted.lora_A, _UnscaledSum()))


class _UnscaledSum(LoraVariant):
    """W x + B A x, where PEFT multiplies B A x by alpha / rank, which is one here.

    That would be a pass over all the layer's outputs, and another over their gradients.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **_options: Any
    ) -> Tensor:
        """`(..., in)`, the base layer's `(..., out)` -> `(..., out)`."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        added: Tensor = result + up(down(module.lora_dropout[active_adapter](x)))
        return added


class _InputDtypeLinear(nn.Linear):
    """A linear layer that computes in its input's dtype, whatever its weight is kept in.

    What autocast does to one layer: the float32 weight is rounded for the product, and its gradient
    comes back in float32. Autocast itself would also change the base's norms, and so the teacher.
    """

    @classmethod
    def of(cls, layer: nn.Module) -> _InputDtypeLinear:
        """The same weight, which both then share."""
        weight = layer.get_parameter("weight")
        with torch.device("meta"):  # its own weight is replaced at once
            made = cls(weight.shape[1], weight.shape[0], bias=False)
        made.weight = nn.Parameter(weight.detach(), weight.requires_grad)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` -> `(..., out)`, in the input's dtype."""
        return nn.functional.linear(input, self.weight.to(input.dtype))


def layers(module: nn.Module) -> list[LoraLayer]:
    """The module's adapted layers."""
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def activate(adapted: Iterable[LoraLayer], *adapters: str) -> None:
    """Switches each layer to those of the adapters that it has; touches no parameter.

    PEFT's `set_adapter` and `disable_adapters` would also change `requires_grad`.
    """
    for layer in adapted:
        active = [adapter for adapter in adapters if adapter in layer.lora_A]
        layer._disable_adapters = not active
        if active:
            layer._active_adapter = active


def parameters(module: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's weights by published name: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            for kind in ("lora_A", "lora_B"):
                found[f"{name}.{kind}.weight"] = module.get_parameter(
                    f"{name}.{kind}.{adapter}.weight"
                )
    return found


def published_name(name: str) -> str:
    """A tensor's name without PEFT's name of the LoRA."""
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def ranks_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Full layer name -> rank, read from published LoRA tensors.

    Raises:
        ValueError: one of a layer's two tensors is missing, or their ranks differ.
    """
    ranks: dict[str, int] = {}
    names = {name for name in tensors if ".lora_" in name}
    for name in sorted(names):
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        other = f"{layer}.lora_{'B' if kind == 'lora_A' else 'A'}.weight"
        if kind not in ("lora_A", "lora_B") or other not in names:
            raise ValueError(
                f"LoRA tensor {shown(name)} has no partner {shown(other)}: the file is incomplete"
            )
        if kind == "lora_A":
            if tensors[name].ndim != 2 or tensors[other].ndim != 2:
                raise ValueError(f"LoRA of {shown(layer)}: expected two matrices")
            ranks[layer] = tensors[name].shape[0]
            if tensors[other].shape[-1] != ranks[layer]:
                raise ValueError(
                    f"LoRA of {shown(layer)}: A has rank {ranks[layer]} but B "
                    f"{tensors[other].shape[-1]}"
                )
    return ranks


@dataclass(frozen=True)
class _Strength:
    """What a file's metadata says of its LoRA: B·A is added times alpha/rank, or alpha/√rank.

    Attributes:
        alpha: of layers that no pattern names; None: the layer's rank.
        patterns: layer's name or end of name -> alpha.
        rooted: whether the rank's square root divides (rank-stabilised LoRA).
    """

    alpha: float | None
    patterns: dict[str, float]
    rooted: bool

    @classmethod
    def of(cls, metadata: Mapping[str, str], where: str) -> _Strength:
        """From the keys that diffusers and other exporters write.

        Raises:
            ValueError: entries of other types, patterns that aren't names, or DoRA.
        """
        text = metadata.get(LORA_METADATA_KEY)
        tree: dict[str, Any] = {}
        if text is not None:
            found = parse_object(text, where=f"{where}: {LORA_METADATA_KEY}")
            tree = {key.removeprefix("transformer."): value for key, value in found.items()}
        if tree.get("use_dora"):
            raise ValueError(f"{where} holds DoRA, which isn't LoRA: export the student with LoRA")
        plain = next((metadata[key] for key in ALPHA_KEYS if key in metadata), None)
        alpha = tree.get("lora_alpha", plain)
        patterns = tree.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(map(_LAYER.fullmatch, patterns)):
            raise ValueError(
                f"{where}: expected alpha_pattern to hold names of layers, got "
                f"{shown(patterns)}: export it again"
            )
        return cls(
            None if alpha is None else _alpha(alpha, where),
            {name: _alpha(value, where) for name, value in patterns.items()},
            bool(tree.get("use_rslora")),
        )

    def scale(self, layer: str, rank: int, own: float | None) -> float:
        """What the product is multiplied by; `own` is the layer's alpha where a tensor holds it."""
        named = [alpha for name, alpha in self.patterns.items() if _ends(layer, name)]
        alpha = next((a for a in (own, *named, self.alpha) if a is not None), float(rank))
        return alpha / (math.sqrt(rank) if self.rooted else rank)


def _alpha(value: Any, where: str) -> float:
    try:
        alpha = float(value)
    except (TypeError, ValueError):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise ValueError(f"{where}: expected LoRA's alpha to be a number, got {shown(repr(value))}")
    return alpha


def with_scale_one(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str
) -> dict[str, Tensor]:
    """The same student with alpha = rank, as adapters are here: B holds its layer's scale.

    Args:
        tensors: by published name; ``<layer>.alpha`` goes into the layer's B.
        metadata: the file's texts.
        where: what messages call the file.

    Raises:
        ValueError: an alpha that is no number or belongs to no layer, or LoRA of another kind.
    """
    alphas = {
        name.removesuffix(".alpha"): _alpha(tensor.item() if tensor.numel() == 1 else None, where)
        for name, tensor in tensors.items()
        if name.endswith(".alpha")
    }
    scaled = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    ranks = ranks_of(scaled)
    if unknown := sorted(alphas.keys() - ranks.keys()):
        raise ValueError(f"{where}: {shown(unknown[0])}.alpha belongs to no LoRA layer of the file")
    strength = _Strength.of(metadata, where) if ranks else None
    for layer, rank in ranks.items():
        scale = 1.0 if strength is None else strength.scale(layer, rank, alphas.get(layer))
        if scale != 1.0:
            name = f"{layer}.lora_B.weight"
            scaled[name] = scaled[name].float() * scale
    return scaled


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _under(name: str, parents: Sequence[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _suffixes(name: str) -> list[str]:
    """What a user may write for "blocks.0.ff.proj": ["ff.proj", "proj"], no block number."""
    parts = name.split(".")
    block = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
    return [".".join(parts[i:]) for i in range(block, len(parts))]
