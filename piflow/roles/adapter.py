"""The published adapter format: what a few-step student is as files.

A folder with `config.json` (the student's architecture, diffusers style) and
`diffusion_pytorch_model.safetensors` (LoRA and the policy's output layer, or all weights of a fully
trained student; metadata).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import torch
from diffusers import __version__ as diffusers_version
from peft.tuners.lora import LoraLayer
from safetensors.torch import load as parse_tensors
from torch import Tensor, nn

from piflow import storage
from piflow.backbones.base import Backbone
from piflow.config import DXPolicyConfig, GMFlowPolicyConfig, PolicyConfig
from piflow.config.identity import VERSION_KEY
from piflow.policies.dx import Mode
from piflow.roles.heads import PolicyClock
from piflow.roles.lora import published_name, ranks_of, with_scale_one
from piflow.sharding.written import Entry, serialised
from piflow.storage.foreign import ForeignDataError, parse_object, shown
from piflow.storage.tensor_file import MAX_FILE_BYTES, read_header

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PREFIX = "transformer."  # some published files have it
POLICY_KEY = "policy_config"  # in the safetensors metadata
SETTINGS_KEY = "piflow_settings"  # there as well: what `piflow.inference` notes
FORMAT_KEY = "piflow_format"  # there too, of students that aren't adapters (`piflow.roles.merged`)
GM_PREFIX = "GM"  # of a GM student's class name; a DX student has the base's own class

GM_FIXED = {"constant_logstd": None, "gm_num_logstd_layers": 2}
POSITIONS = "logweights_channels"  # of a GM student: latent pixels of a token's patch
GM_OWN = ("num_gaussians", "logstd_inner_dim", *GM_FIXED, POSITIONS)
DX_OWN = ("segment_size", "shift", "mode")  # in the metadata
DX_PREFIX = "DX"  # of a DX student's class name in other exporters' files
DX_DEFAULTS = {"segment_size": 1.0, "mode": "grid"}  # where the published exporters leave them out
LATER_FIELDS = ("guidance_embeds",)  # which configs of earlier diffusers versions lack
SCHEMA_OF_PUBLISHED_POLYNOMIALS = 3
DORA = (".lora_magnitude_vector", ".dora_scale")  # in names of its tensors
HEAD_LAYERS: dict[str, tuple[str, ...]] = {  # beside `norm_out`; the values' projection first
    "gmflow": ("proj_out_means", "proj_out_logweights", "proj_out_logstds.1", "proj_out_logstds.3"),
    "dx": ("proj_out",),
}
MIN_SEGMENT = 1 / 64  # as many evaluations as recipes have
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Names -> whole tensors."""


@dataclass(frozen=True)
class AdapterConfig:
    """What `config.json` and the metadata's `policy_config` say of a student.

    Attributes:
        class_name: `_class_name`, one of the backbone's `adapter_class_names`.
        fields: the rest of `config.json`: of a GM head, then the base class's. `in_channels` is a
            token's features where patches are packed before the model (FLUX, Qwen-Image), the
            latent's channels where the model does it (DiT); `out_channels` is the same, times N_g
            for DX.
        policy_fields: `policy_config`.
    """

    class_name: str
    fields: dict[str, Any]
    policy_fields: dict[str, Any]

    @classmethod
    def of(
        cls, backbone: Backbone, policy: PolicyConfig, clock: PolicyClock | None
    ) -> AdapterConfig:
        """The config of a student on this backbone; `clock` is DX's.

        Raises:
            ValueError: a DX policy without a clock.
        """
        base: dict[str, Any] = {field: backbone.config[field] for field in backbone.adapter_fields}
        base = json.loads(json.dumps(base))
        features = base["in_channels"]
        gm_class, dx_class = backbone.adapter_class_names
        if isinstance(policy, GMFlowPolicyConfig):
            own = {
                "num_gaussians": policy.num_gaussians,
                "logstd_inner_dim": policy.logstd_inner_dim,
                **GM_FIXED,
                POSITIONS: backbone.patch_size**2,
            }
            return cls(gm_class, {**own, **base, "out_channels": features}, {"type": "GMFlow"})
        if clock is None:
            raise ValueError("a DX student needs its segment_size and shift: pass its PolicyClock")
        patch = math.isqrt(backbone.patch_size**2 * backbone.latent_channels // features)
        patch = base.get("patch_size", patch)  # which a family may have for each axis
        outputs = {"patch_size": patch, "out_channels": policy.num_points * features}
        described = {"type": "DX", **asdict(clock), "mode": policy.mode}
        return cls(dx_class, {**base, **outputs}, described)

    def policy(self) -> PolicyConfig:
        """The policy head's shape (training-only fields are the defaults)."""
        if self.policy_fields["type"] == "GMFlow":
            return GMFlowPolicyConfig(
                num_gaussians=self.fields["num_gaussians"],
                logstd_inner_dim=self.fields["logstd_inner_dim"],
            )
        points = self.fields["out_channels"] // self.fields["in_channels"]
        return DXPolicyConfig(mode=self.policy_fields["mode"], num_points=points)

    def clock(self) -> PolicyClock | None:
        """What a DX policy was trained with; None for GM."""
        if self.policy_fields["type"] == "GMFlow":
            return None
        return PolicyClock(self.policy_fields["segment_size"], self.policy_fields["shift"])

    def to_json(self) -> str:
        """`config.json`, in the published layout."""
        own = {"_class_name": self.class_name, "_diffusers_version": diffusers_version}
        return json.dumps(own | self.fields, indent=2) + "\n"

    @classmethod
    def parse(cls, text: str | bytes, policy_json: str | None, where: str) -> AdapterConfig:
        """Reads `config.json` and the metadata's `policy_config` (None: the file has none).

        Raises:
            ValueError: no JSON, a field that is missing or has another type, a number that no
                student was trained with, or a head of another kind.
        """
        fields = parse_object(text, where=where)
        class_name = str(fields.get("_class_name")).removeprefix(DX_PREFIX)
        is_gm = class_name.startswith(GM_PREFIX)
        kind = "GMFlow" if is_gm else "DX"
        described = parse_object(
            policy_json or '{"type": "GMFlow"}', where=f"{where}'s {POLICY_KEY}"
        )
        if described.get("type") != kind:
            raise ValueError(
                f"{where}: _class_name {shown(class_name)} would be a {kind} student's, but "
                f"{POLICY_KEY} in the safetensors metadata is {shown(policy_json)}: config and "
                "weights don't belong together, or this is a base model and not an adapter"
            )
        if not is_gm:
            described = {**DX_DEFAULTS, **described}
        needed = ["in_channels", "out_channels", *(GM_OWN[:2] if is_gm else ())]
        missing = [field for field in needed if field not in fields]
        missing += [field for field in DX_OWN if not is_gm and field not in described]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}: export it again")
        _check_numbers(fields, is_gm, where)
        _check_outputs(fields, is_gm, where)
        if not is_gm:
            _check_clock(described, f"{where}'s {POLICY_KEY}")
        config = {key: value for key, value in fields.items() if not key.startswith("_")}
        return cls(class_name, config, described)


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter.

    Attributes:
        config: the student's architecture.
        tensors: by published name without prefix, in the file's dtype, on the CPU.
        metadata: the file's: `policy_config` (JSON), `base_model`, and what the exporter added.
        body: of a merged student the folder with all weights, of which `tensors` are the head's as
            stored there; None: it goes onto a base.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    body: str | None = None

    @property
    def is_full_model(self) -> bool:
        """Whether all weights were trained: there are others than LoRA and output layer."""
        return self.body is None and bool(_base_tensors(self.tensors, self.config.policy()))

    def check_fits(self, backbone: Backbone) -> None:
        """Refuses a base of another architecture, and LoRA that doesn't go onto it.

        Raises:
            ValueError: names the field or tensor, what the adapter has and what the base has.
        """
        config, policy = self.config, self.config.policy()
        expected = AdapterConfig.of(backbone, policy, config.clock())
        if config.class_name != expected.class_name:
            raise ValueError(
                f"expected _class_name {expected.class_name} for a student on a "
                f"{backbone.class_name}, got {shown(repr(config.class_name))}: load the "
                "base model that the adapter was made from"
            )
        left_out = [field for field in (*LATER_FIELDS, POSITIONS) if field not in config.fields]
        own = [field for field in GM_OWN if field != POSITIONS]
        base = [field for field in expected.fields if field not in (*own, *left_out)]
        missing = [field for field in base if field not in config.fields]
        if missing:
            raise ValueError(f"the adapter's config lacks {', '.join(missing)}: export it again")
        wrong = [field for field in base if not _same(field, config.fields, expected.fields)]
        if wrong:
            differences = ", ".join(
                f"{field} {shown(config.fields[field])} (base: {expected.fields[field]})"
                for field in wrong
            )
            raise ValueError(
                f"the adapter was made for another architecture: {differences}. "
                "Load the base model that it was made from"
            )
        _check_complete(self.tensors, policy)
        _check_values(self.tensors, policy, backbone)
        layers = dict(backbone.module.named_modules())
        for name, tensor in self.tensors.items():
            if ".lora_" in name:
                _check_lora(name, tensor, layers, backbone.output_names)


def save_adapter(
    folder: str | Path,
    backbone: Backbone,
    tensors: Mapping[str, Tensor],
    policy: PolicyConfig,
    clock: PolicyClock | None,
    *,
    base_model: str,
    metadata: Mapping[str, str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    read: Read | None = None,
) -> None:
    """Writes an adapter folder; weights first, so that a folder with a config is complete.

    Args:
        folder: URI or path.
        tensors: whole tensors by published name, such as a strategy gathers from
            `Trio.ema_parameters()`; with `read` they may be on "meta".
        clock: DX's segment size and shift; not used for GM.
        base_model: name or URI of the base, for the metadata.
        metadata: further strings for the safetensors header (lineage, sampling settings).
        dtype: of all tensors in the file.
        read: gives the values, of one tensor after the other.

    Raises:
        ValueError: output-layer tensors that are missing, LoRA that doesn't fit the backbone, a DX
            policy without a clock, values that `dtype` can't hold, or metadata that would overwrite
            the format's own.
    """
    config = AdapterConfig.of(backbone, policy, clock)
    Adapter(config, dict(tensors), {}).check_fits(backbone)
    own = {"format": "pt", POLICY_KEY: json.dumps(config.policy_fields), "base_model": base_model}
    extra = dict(metadata or {})
    clash = sorted(own.keys() & extra.keys())
    if clash:
        raise ValueError(f"metadata {', '.join(clash)} belongs to the format: use another key")
    given = read or _given(tensors)
    entries = {name: Entry(tuple(t.shape), DTYPES[dtype]) for name, t in tensors.items()}
    content = serialised(entries, {**own, **extra}, lambda name: given([name])[name])
    storage.delete_left_over(str(folder), recursive=False)  # of gigabytes, of a killed export
    storage.write_bytes(storage.join(str(folder), WEIGHTS_FILE), memoryview(content))
    storage.write_bytes(storage.join(str(folder), CONFIG_FILE), config.to_json().encode())


def _given(tensors: Mapping[str, Tensor]) -> Read:
    return lambda names: {name: tensors[name] for name in names}


def load_adapter(folder: str | Path) -> Adapter:
    """Reads an adapter folder from a URI or path.

    Raises:
        ValueError: a file that is missing or damaged, another class, or missing tensors.
    """
    uris = {name: storage.join(str(folder), name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    for name, uri in uris.items():
        if not storage.exists(uri):
            raise ValueError(
                f"{folder} is not an adapter folder: it has no {name}. "
                "Give the folder that `piflow export` wrote"
            )
    try:
        metadata = read_header(uris[WEIGHTS_FILE]).metadata  # before anything as long as it claims
        if FORMAT_KEY in metadata:
            raise ValueError(
                f"{folder} is a whole student ({shown(metadata[FORMAT_KEY])}) and no adapter: "
                "give the adapter that was exported beside it"
            )
        config = AdapterConfig.parse(
            storage.read_bytes(uris[CONFIG_FILE]), metadata.get(POLICY_KEY), uris[CONFIG_FILE]
        )
        config = _of_earlier_piflow(config, metadata)
        stored = parse_tensors(storage.read_bytes(uris[WEIGHTS_FILE], max_bytes=MAX_FILE_BYTES))
    except (safetensors.SafetensorError, ForeignDataError) as error:
        raise ValueError(
            f"the adapter is damaged: {shown(error, 1000)}; export it again"
        ) from error
    tensors = {_published_name(name): tensor for name, tensor in stored.items()}
    if len(tensors) < len(stored):
        raise ValueError(
            f"{uris[WEIGHTS_FILE]} holds tensors under two names for one, with and without the "
            f"prefix {PREFIX!r} or PEFT's '.default': export it again"
        )
    if dora := next((name for name in tensors if any(part in name for part in DORA)), None):
        raise ValueError(
            f"{uris[WEIGHTS_FILE]} holds DoRA ({shown(dora)}), which isn't LoRA: export the "
            "student with LoRA"
        )
    tensors = with_scale_one(tensors, metadata, uris[WEIGHTS_FILE])
    _check_complete(tensors, config.policy())
    ranks_of(tensors)
    return Adapter(config, tensors, metadata)


def _of_earlier_piflow(config: AdapterConfig, metadata: Mapping[str, str]) -> AdapterConfig:
    """The config as it was meant: `polynomial` was a polynomial of the velocity until schema 3.

    Raises:
        ForeignDataError: settings that aren't an object of JSON.
    """
    if config.policy_fields.get("mode") != "polynomial" or SETTINGS_KEY not in metadata:
        return config
    version = parse_object(metadata[SETTINGS_KEY], where=SETTINGS_KEY).get(VERSION_KEY, 0)
    if type(version) is not int or version >= SCHEMA_OF_PUBLISHED_POLYNOMIALS:
        return config
    return replace(config, policy_fields={**config.policy_fields, "mode": "velocity_polynomial"})


def _published_name(name: str) -> str:
    """A tensor's name without some exporters' prefix, and without PEFT's name of the LoRA."""
    return published_name(name.removeprefix(PREFIX))


def _check_numbers(fields: Mapping[str, Any], is_gm: bool, where: str) -> None:
    """Refuses sizes that aren't positive whole numbers."""
    for field in ("in_channels", "out_channels", *(GM_OWN[:2] if is_gm else ())):
        value = fields[field]
        if value is None and field == "out_channels":  # the same as in_channels
            continue
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{where}: expected {field} to be a positive whole number, got "
                f"{shown(repr(value))}: export it again"
            )


def _check_clock(described: Mapping[str, Any], where: str) -> None:
    """Refuses a DX policy's numbers and mode that no student was trained with."""
    size, shift, mode = (described[field] for field in DX_OWN)
    numbers = all(isinstance(value, int | float) for value in (size, shift))
    if not numbers or not MIN_SEGMENT <= size <= 1 or not 0 < shift < math.inf:
        raise ValueError(
            f"{where}: expected a segment_size from 1/{round(1 / MIN_SEGMENT)} to 1 and a positive "
            f"shift, got {shown(repr(size))} and {shown(repr(shift))}: export it again"
        )
    if mode not in get_args(Mode):
        raise ValueError(
            f"{where}: expected mode {' or '.join(get_args(Mode))}, got {shown(repr(mode))}"
        )


def _check_outputs(fields: Mapping[str, Any], is_gm: bool, where: str) -> None:
    """Refuses heads of a kind that isn't read here."""
    for field, value in GM_FIXED.items() if is_gm else ():
        if fields.get(field, value) != value:
            raise ValueError(
                f"{where}: {field} {shown(repr(fields[field]))} isn't supported, only {value!r}"
            )
    positions = fields.get(POSITIONS, 1)
    if is_gm and (type(positions) is not int or positions < 1):
        raise ValueError(
            f"{where}: expected {POSITIONS} to be a patch's latent pixels, such as 4, got "
            f"{shown(repr(positions))}: export it again"
        )
    features, outputs = fields["in_channels"], fields["out_channels"]
    if not is_gm and (not outputs or outputs % features):
        raise ValueError(
            f"{where}: expected out_channels to be N_g times in_channels = {features} for a DX "
            f"student, got {outputs}: export it again"
        )


def _base_tensors(tensors: Mapping[str, Tensor], policy: PolicyConfig) -> list[str]:
    """Names of tensors that are neither LoRA nor output layer."""
    layers = ("norm_out", *HEAD_LAYERS[policy.type])
    head = tuple(f"{layer}." for layer in layers)
    return [name for name in tensors if ".lora_" not in name and not name.startswith(head)]


def _check_complete(tensors: Mapping[str, Tensor], policy: PolicyConfig) -> None:
    """Refuses a file that lacks a part of its output layer, or has LoRA and base weights."""
    expected = [f"{n}.{kind}" for n in HEAD_LAYERS[policy.type] for kind in ("weight", "bias")]
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(
            f"the adapter lacks {len(missing)} of {len(expected)} output-layer tensors "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}): export it again"
        )
    changed = _base_tensors(tensors, policy)
    if changed and any(".lora_" in name for name in tensors):
        raise ValueError(
            f"the adapter has LoRA and {len(changed)} tensors that are neither LoRA nor output "
            f"layer ({', '.join(map(shown, changed[:3]))}): it changes the base itself, which the "
            "teacher shares"
        )


def _check_values(tensors: Mapping[str, Tensor], policy: PolicyConfig, backbone: Backbone) -> None:
    """Refuses a projection of another shape than policy and base ask for."""
    values = policy.num_points if isinstance(policy, DXPolicyConfig) else policy.num_gaussians
    name = f"{HEAD_LAYERS[policy.type][0]}.weight"
    expected = (values * backbone.patch_size**2 * backbone.latent_channels, backbone.width)
    if tuple(tensors[name].shape) != expected:
        raise ValueError(
            f"{name}: expected {expected} from the config, got {tuple(tensors[name].shape)}"
        )
    if isinstance(policy, GMFlowPolicyConfig):
        name, width = f"{HEAD_LAYERS[policy.type][2]}.weight", policy.logstd_inner_dim
        if tensors[name].shape[:1] != (width,):
            raise ValueError(
                f"{name}: expected {width} rows, the config's logstd_inner_dim, got "
                f"{tuple(tensors[name].shape)}"
            )


def _check_lora(
    name: str, tensor: Tensor, layers: Mapping[str, nn.Module], output_names: Sequence[str]
) -> None:
    """Refuses a LoRA tensor whose layer the base lacks or has in another shape."""
    layer, _, kind = name.removesuffix(".weight").rpartition(".")
    module = layers.get(layer)
    adaptable = isinstance(module, nn.Linear | LoraLayer) and layer not in output_names
    if module is None or not adaptable or kind not in ("lora_A", "lora_B"):
        raise ValueError(
            f"the adapter's {shown(name)} belongs to no linear layer that can be adapted in the "
            "base: load the base model that it was made from"
        )
    axis, expected = (1, module.in_features) if kind == "lora_A" else (0, module.out_features)
    if tensor.ndim != 2 or tensor.shape[axis] != expected:
        raise ValueError(
            f"{shown(name)}: expected size {expected} in dimension {axis}, as the base's layer has "
            f"it, got shape {tuple(tensor.shape)}"
        )


def _same(field: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configs agree; `out_channels: null` means `in_channels`."""
    if field == "out_channels":
        return bool((one[field] or one["in_channels"]) == (other[field] or other["in_channels"]))
    return bool(one[field] == other[field])
