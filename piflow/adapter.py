"""The published adapter format: what a few-step student is as files.

A folder with `config.json` (the student's architecture, diffusers style) and
`diffusion_pytorch_model.safetensors` (LoRA, the GM output layer, `norm_out`; metadata).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from diffusers import __version__ as diffusers_version
from peft.tuners.lora import LoraLayer
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor, nn

from piflow import storage
from piflow.backbones.base import Backbone
from piflow.config import GMFlowPolicyConfig
from piflow.heads import OUTPUT_LAYERS, PATCH_POSITIONS
from piflow.lora import ranks_of

CLASS_NAME = "GMFluxTransformer2DModel"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PREFIX = "transformer."  # some published files have it

BASE_FIELDS = (
    "in_channels",
    "out_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class AdapterConfig:
    """`config.json`: the policy head's fields, then the base architecture's.

    Attributes:
        num_gaussians: mixture components K.
        logstd_inner_dim: width of the log-std MLP.
        base: the base class's fields, `BASE_FIELDS`.
    """

    num_gaussians: int
    logstd_inner_dim: int
    base: dict[str, Any]

    @classmethod
    def of(cls, backbone: Backbone, policy: GMFlowPolicyConfig) -> AdapterConfig:
        """The config of a student on this backbone."""
        config = backbone.config
        base = {field: config[field] for field in BASE_FIELDS}
        return cls(policy.num_gaussians, policy.logstd_inner_dim, json.loads(json.dumps(base)))

    def policy(self) -> GMFlowPolicyConfig:
        """The policy head's shape (training-only fields are the defaults)."""
        return GMFlowPolicyConfig(
            num_gaussians=self.num_gaussians, logstd_inner_dim=self.logstd_inner_dim
        )

    def to_json(self) -> str:
        """The published layout."""
        fields = {
            "_class_name": CLASS_NAME,
            "_diffusers_version": diffusers_version,
            "num_gaussians": self.num_gaussians,
            "constant_logstd": None,
            "logstd_inner_dim": self.logstd_inner_dim,
            "gm_num_logstd_layers": 2,
            "logweights_channels": PATCH_POSITIONS,
            **self.base,
        }
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> AdapterConfig:
        """Reads the published layout.

        Raises:
            ValueError: another class, a field that is missing, or a head of another kind.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not valid JSON ({error}): export it again") from error
        name = fields.get("_class_name") if isinstance(fields, dict) else None
        if name != CLASS_NAME:
            raise ValueError(f"{where}: expected _class_name {CLASS_NAME}, got {name!r}")
        needed = ("num_gaussians", "logstd_inner_dim", *BASE_FIELDS)
        missing = [field for field in needed if field not in fields]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}: export it again")
        for field, value in (
            ("constant_logstd", None),
            ("gm_num_logstd_layers", 2),
            ("logweights_channels", PATCH_POSITIONS),
        ):
            if fields.get(field, value) != value:
                raise ValueError(
                    f"{where}: {field} {fields[field]!r} isn't supported, only {value!r}"
                )
        base = {field: fields[field] for field in BASE_FIELDS}
        return cls(fields["num_gaussians"], fields["logstd_inner_dim"], base)


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter.

    Attributes:
        config: the student's architecture.
        tensors: by published name without prefix, in the file's dtype, on the CPU.
        metadata: the file's: `policy_config` (JSON), `base_model`, and what the exporter added.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def check_fits(self, backbone: Backbone) -> None:
        """Refuses a base of another architecture, and tensors of other shapes than it needs.

        Raises:
            ValueError: names the field or tensor, what the adapter has and what the base has.
        """
        base = AdapterConfig.of(backbone, self.config.policy()).base
        wrong = [field for field in BASE_FIELDS if not _same(field, self.config.base, base)]
        if wrong:
            differences = ", ".join(
                f"{field} {self.config.base[field]} (base: {base[field]})" for field in wrong
            )
            raise ValueError(
                f"the adapter was made for another architecture: {differences}. "
                "Load the base model that it was made from"
            )
        _check_head(self.tensors, self.config, backbone.width)
        for name, tensor in self.tensors.items():
            if ".lora_" in name:
                _check_lora(name, tensor, backbone)


def save_adapter(
    folder: str | Path,
    backbone: Backbone,
    tensors: Mapping[str, Tensor],
    policy: GMFlowPolicyConfig,
    *,
    base_model: str,
    metadata: Mapping[str, str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
) -> None:
    """Writes an adapter folder; weights first, so that a folder with a config is complete.

    Args:
        folder: URI or path.
        tensors: whole tensors by published name, such as a strategy gathers from
            `Trio.ema_parameters()`.
        base_model: name or URI of the base, for the metadata.
        metadata: further strings for the safetensors header (lineage, sampling settings).
        dtype: of all tensors in the file.

    Raises:
        ValueError: tensors that are missing or don't fit the backbone, values that `dtype` can't
            hold, or metadata that would overwrite the format's own.
    """
    config = AdapterConfig.of(backbone, policy)
    Adapter(config, dict(tensors), {}).check_fits(backbone)
    own = {
        "format": "pt",
        "policy_config": json.dumps({"type": "GMFlow"}),
        "base_model": base_model,
    }
    extra = dict(metadata or {})
    clash = sorted(own.keys() & extra.keys())
    if clash:
        raise ValueError(f"metadata {', '.join(clash)} belongs to the format: use another key")
    converted = {name: _convert(name, tensor, dtype) for name, tensor in tensors.items()}
    content = serialise_tensors(converted, metadata={**own, **extra})
    storage.write_bytes(storage.join(str(folder), WEIGHTS_FILE), content)
    storage.write_bytes(storage.join(str(folder), CONFIG_FILE), config.to_json().encode())


def load_adapter(folder: str | Path) -> Adapter:
    """Reads an adapter folder from a URI or path.

    Raises:
        ValueError: a file that is missing or damaged, another class, or missing tensors.
    """
    content = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        uri = storage.join(str(folder), name)
        if not storage.exists(uri):
            raise ValueError(
                f"{folder} is not an adapter folder: it has no {name}. "
                "Give the folder that `piflow export` wrote"
            )
        content[name] = storage.read_bytes(uri)
    config_uri = storage.join(str(folder), CONFIG_FILE)
    config = AdapterConfig.from_json(content[CONFIG_FILE].decode(), config_uri)
    weights_uri = storage.join(str(folder), WEIGHTS_FILE)
    try:
        stored = parse_tensors(content[WEIGHTS_FILE])
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights_uri} is damaged ({error}): export it again") from error
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    width = config.base["num_attention_heads"] * config.base["attention_head_dim"]
    _check_head(tensors, config, width)
    ranks_of(tensors)
    return Adapter(config, tensors, _header_metadata(content[WEIGHTS_FILE]))


def _header_metadata(content: bytes) -> dict[str, str]:
    """The safetensors file's string metadata: 8 bytes of header length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return metadata


def _head_shapes(config: AdapterConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything in the file that isn't LoRA."""
    components, inner = config.num_gaussians, config.logstd_inner_dim
    features = config.base["out_channels"] or config.base["in_channels"]
    outputs = {
        "norm_out.linear": (2 * width, width),
        "proj_out_means": (components * features, width),
        "proj_out_logweights": (components * PATCH_POSITIONS, width),
        "proj_out_logstds.1": (inner, width),
        "proj_out_logstds.3": (1, inner),
    }
    weights: dict[str, tuple[int, ...]] = {f"{n}.weight": shape for n, shape in outputs.items()}
    biases: dict[str, tuple[int, ...]] = {f"{n}.bias": s[:1] for n, s in outputs.items()}
    return {**weights, **biases}


def _check_head(tensors: Mapping[str, Tensor], config: AdapterConfig, width: int) -> None:
    """Refuses a file whose output layer isn't complete and of the config's shapes."""
    expected = _head_shapes(config, width)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(
            f"the adapter lacks {len(missing)} of {len(expected)} output-layer tensors "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}): export it again"
        )
    unknown = [name for name in tensors if ".lora_" not in name and name not in expected]
    if unknown:
        raise ValueError(
            f"the adapter has {len(unknown)} tensors that are neither LoRA nor output layer "
            f"({', '.join(unknown[:3])}): it changes the base itself, which the teacher shares"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name}: expected {shape} from the config, got {tuple(tensors[name].shape)}"
            )


def _check_lora(name: str, tensor: Tensor, backbone: Backbone) -> None:
    """Refuses a LoRA tensor whose layer the base lacks or has in another shape."""
    layer, _, kind = name.removesuffix(".weight").rpartition(".")
    module = dict(backbone.module.named_modules()).get(layer)
    adaptable = isinstance(module, nn.Linear | LoraLayer) and layer not in OUTPUT_LAYERS
    if module is None or not adaptable or kind not in ("lora_A", "lora_B"):
        raise ValueError(
            f"the adapter's {name} belongs to no linear layer that can be adapted in the base: "
            "load the base model that it was made from"
        )
    axis, expected = (1, module.in_features) if kind == "lora_A" else (0, module.out_features)
    if tensor.ndim != 2 or tensor.shape[axis] != expected:
        raise ValueError(
            f"{name}: expected size {expected} in dimension {axis}, as the base's layer has it, "
            f"got shape {tuple(tensor.shape)}"
        )


def _same(field: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configs agree; `out_channels: null` means `in_channels`."""
    if field == "out_channels":
        return bool((one[field] or one["in_channels"]) == (other[field] or other["in_channels"]))
    return bool(one[field] == other[field])


def _convert(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A contiguous CPU copy in the file's dtype."""
    converted = tensor.detach().to(device="cpu", dtype=DTYPES[dtype]).contiguous()
    if not converted.isfinite().all():
        raise ValueError(
            f"{name} has values that {dtype} can't hold: export as bfloat16 or float32, or check "
            "that training stayed finite"
        )
    return converted
