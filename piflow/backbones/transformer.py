"""What the families share: a diffusers transformer over patches, and how it is loaded."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from piflow import storage
from piflow.backbones.base import PATCH, Conditioning, OutputLayer, unpack
from piflow.backbones.recompute import block_checkpoint
from piflow.sharding.gguf_file import GGUF_FILE, read_gguf
from piflow.sharding.weights import (
    StoredTensor,
    fill,
    parameters_on_meta,
    stored_tensors,
    with_scales,
)
from piflow.storage.foreign import parse_object, shown
from piflow.storage.model_folder import LIBRARY_ERRORS, check_model_folder, reason

SHOWN = 3  # differing tensors that an error names


class TransformerBackbone(ABC):
    """A `Backbone` whose module ends in `proj_out(norm_out(hidden, temb))`.

    A family sets the class attributes and says how its config is checked and its model called. Its
    conventions are declared, and this class alone follows them: `velocity_sign`, `time_of` and
    `patch_size`.

    Args:
        module: an instance of `model_class`.
        embedded_guidance: the guidance that the model takes as an input, the same for every call;
            needed exactly if the config says `guidance_embeds`.

    Raises:
        ValueError: another class, a config that the family refuses, or guidance that doesn't fit.
    """

    model_class: ClassVar[Any]  # the diffusers class
    class_name: str
    block_classes: tuple[type[nn.Module], ...]
    output_names: tuple[str, ...] = ("norm_out", "proj_out")
    stored_output_names: tuple[str, ...] = ("norm_out", "proj_out")  # the same in the files
    adapter_class_names: tuple[str, str]
    adapter_fields: tuple[str, ...]
    fixed_size: ClassVar[bool] = False  # whether latents have one size alone
    takes_condition: ClassVar[bool] = False  # whether it edits pictures, which come with each call
    patch_size: int = PATCH
    latent_frames: int = 1
    velocity_sign: ClassVar[Literal[1, -1]] = 1
    """What the model predicts is this times the velocity ε - x0."""

    def __init__(self, module: nn.Module, *, embedded_guidance: float | None = None) -> None:
        if not isinstance(module, self.model_class):
            raise ValueError(f"expected a {self.class_name}, got {type(module).__name__}")
        self._config = _constructor_arguments(module.config)
        self.check_config(self._config, embedded_guidance)
        self.module: nn.Module = self.adapt(module)
        self.dtype: torch.dtype = _dtype_of(module)
        self.embedded_guidance = embedded_guidance
        self._counted: dict[tuple[int, int, int, int], int] = {}
        features, self.width = self.output_layer().projection.weight.shape
        self.latent_channels: int = features // self.patch_size**2

    @classmethod
    def load(
        cls,
        uri: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        embedded_guidance: float | None = None,
    ) -> Self:
        """Loads a diffusers folder (config.json + safetensors) from a URI, in evaluation mode.

        Raises:
            ValueError: no config.json or weights there, another model class, a config that the
                family refuses, weights that don't fit it, or guidance that doesn't.
        """
        folder = str(storage.local_folder(str(uri)))
        cls._check_folder(folder, str(uri), embedded_guidance)
        try:
            module = cls.model_class.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except LIBRARY_ERRORS as error:
            raise ValueError(f"cannot load the model {uri}: {reason(error)}") from error
        return cls(module.to(device), embedded_guidance=embedded_guidance)

    @classmethod
    def load_empty(
        cls,
        uri: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        embedded_guidance: float | None = None,
    ) -> tuple[Self, dict[nn.Parameter, StoredTensor]]:
        """`load`, less the weights: parameters on "meta", and where their values lie.

        The output layer, which heads are made from, and all buffers are real, on the CPU. Of a
        folder on an object store nothing is downloaded; one on a hub is, once a machine.

        Raises:
            ValueError: as `load`.
        """
        folder = storage.for_ranges(str(uri))
        config, stored = cls._check_folder(folder, str(uri), embedded_guidance)
        with parameters_on_meta(dtype):
            module = cls.model_class.from_config(config).eval()
        _keep_in_float32(module)
        buffers = dict(module.named_buffers())
        at_once = {
            name: source
            for name, source in stored.items()
            if name in buffers or name.split(".")[0] in cls.stored_output_names
        }
        fill(module, at_once, device="cpu")
        sources = {parameter: stored[name] for name, parameter in module.named_parameters()}
        return cls(module, embedded_guidance=embedded_guidance), sources

    @classmethod
    def empty_student(
        cls, uri: str | Path, config: Mapping[str, Any], *, dtype: torch.dtype
    ) -> tuple[nn.Module, dict[str, StoredTensor]]:
        """A merged student's transformer, less its values, and where they lie by its names.

        The output layer, in whose place the student has a head, is NaN: nothing that comes from it
        can be taken for a velocity. All else is on "meta"; buffers are real.

        Args:
            uri: of the folder with the weights; one of a hub must be its local copy.
            config: constructor arguments of the model that the student was made from.

        Raises:
            ValueError: a config that the family refuses, or weights that don't fit it.
        """
        check_model_folder(str(uri), str(uri))
        try:
            with torch.device("meta"):
                empty = cls.model_class.from_config(dict(config))
            with parameters_on_meta(dtype):
                module = cls.model_class.from_config(dict(config)).eval()
        except LIBRARY_ERRORS as error:
            raise ValueError(
                f"{uri}: config.json isn't that of a student of a {cls.class_name}: {reason(error)}"
            ) from error
        _keep_in_float32(module)
        stored = {
            name: tensor for name, tensor in model_tensors(str(uri)).items() if not is_of_head(name)
        }
        outputs = cls.stored_output_names
        expected = {
            name: tensor
            for name, tensor in empty.state_dict().items()
            if name.split(".")[0] not in outputs
        }
        check_weights(stored, expected, str(uri))
        for name, parameter in list(module.named_parameters()):
            if name.split(".")[0] in outputs:
                owner, _, leaf = name.rpartition(".")
                nan = torch.full_like(parameter, torch.nan, device="cpu")
                setattr(module.get_submodule(owner), leaf, nn.Parameter(nan))
        buffers = dict(module.named_buffers())
        fill(module, {name: s for name, s in stored.items() if name in buffers}, device="cpu")
        return module, {name: s for name, s in stored.items() if name not in buffers}

    @staticmethod
    def stored_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A DX head as the diffusers class would store an output layer of as many channels.

        Args:
            tensors: `norm_out` and `proj_out`, by the adapter format's names and order.
        """
        return dict(tensors)

    @staticmethod
    def read_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `stored_head`."""
        return dict(tensors)

    @classmethod
    def on_meta(
        cls,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        embedded_guidance: float | None = None,
    ) -> Self:
        """A backbone of this config without any value, to be counted: all of it is on "meta".

        Raises:
            ValueError: a config that the family refuses, or guidance that doesn't fit it.
        """
        try:
            with parameters_on_meta(dtype), torch.device("meta"):
                module = cls.model_class.from_config(dict(config)).eval()
            _keep_in_float32(module)
        except LIBRARY_ERRORS as error:
            raise ValueError(
                f"config.json isn't that of a {cls.class_name}: {reason(error)}"
            ) from error
        return cls(module, embedded_guidance=embedded_guidance)

    @classmethod
    def _check_folder(
        cls, folder: str, uri: str, embedded_guidance: float | None
    ) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """Config and places of the weights of a folder that `uri` in errors stands for."""
        config = read_model_config(folder, cls.class_name, uri)
        try:
            with torch.device("meta"):
                empty = cls.model_class.from_config(config)
        except LIBRARY_ERRORS as error:
            raise ValueError(
                f"{uri}: config.json isn't that of a {cls.class_name}: {reason(error)}"
            ) from error
        cls.check_config(_constructor_arguments(empty.config), embedded_guidance)
        stored = stored_tensors(folder, shown=uri)
        check_weights(stored, empty.state_dict(), uri)
        return config, stored

    @staticmethod
    @abstractmethod
    def check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
        """Raises a ValueError for what the family's code doesn't cover."""

    @staticmethod
    def adapt(module: nn.Module) -> nn.Module:
        """The module to call, if the diffusers one doesn't end as `Backbone` asks."""
        return module

    @property
    @abstractmethod
    def default_lora_targets(self) -> tuple[str, ...]:
        """Name suffixes of the linear layers that the student adapts, each with a gradient."""

    @staticmethod
    def time_of(sigma: Tensor) -> Tensor:
        """The time `(B,)` that the model is called with at noise levels sigma `(B,)`, float32.

        sigma itself here, for models that multiply it by 1000 themselves.
        """
        return sigma

    @abstractmethod
    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """One call of the model: what its last layer gives, `(B, HW/p², F)`, channel-major.

        Args:
            x: latents `(B, C, H, W)`.
            time: `time_of(sigma)`, `(B,)`.
            cond: as many prompts.

        Raises:
            ValueError: shapes that don't fit the model.
        """

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at noise levels sigma `(B,)` in [0, 1] -> `(B, HW/p², F)`.

        Those of the model's own output layer are the velocity's, whatever its sign.

        Raises:
            ValueError: shapes that don't fit the model.
        """
        self.check_batch(x, sigma, cond)
        tokens = self.model_tokens(x, self.time_of(sigma.float()), cond)
        has_own_output = isinstance(self.module.get_submodule("proj_out"), nn.Linear)
        return -tokens if has_own_output and self.velocity_sign < 0 else tokens

    def flops(self, height: int, width: int, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward pass: its matrix products.

        They are counted by PyTorch, once for each size, in a pass of an empty copy of the model. A
        family may give a closed form (`piflow.backbones.flops`), which needs no pass.

        Args:
            height, width: of the latents.
            text_tokens: L, padding included.
        """
        return self.editing_flops(height, width, text_tokens, 0)

    def editing_flops(
        self, height: int, width: int, text_tokens: int, condition_tokens: int
    ) -> int:
        """The same of a sample that edits a picture of so many tokens.

        Of a family that edits none, `flops` is asked alone, and this with 0.
        """
        size = (height, width, text_tokens, condition_tokens)
        if size not in self._counted:
            self._counted[size] = self._count_flops(*size)
        return self._counted[size]

    def _count_flops(self, height: int, width: int, text_tokens: int, condition_tokens: int) -> int:
        with torch.device("meta"):
            module = self.model_class.from_config(self._config).eval()
            empty = type(self)(module, embedded_guidance=self.embedded_guidance)
            x = torch.empty(1, self.latent_channels, height, width)
            patch = self.patch_size
            cond = empty.blank_conditioning(text_tokens).editing(
                empty.blank_condition(patch, patch * condition_tokens)
            )
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), counter:
                empty.output_tokens(x, torch.empty(1), cond)
        return int(counter.get_total_flops())

    def blank_conditioning(self, text_tokens: int) -> Conditioning:
        """One prompt of zeros, in the shapes that the model takes, on PyTorch's default device.

        Args:
            text_tokens: L, padding included.
        """
        pooled = self._config.get("pooled_projection_dim")
        return Conditioning(
            torch.zeros(1, text_tokens, self.text_width),
            torch.full((1,), text_tokens),
            torch.zeros(1, pooled) if pooled else None,
        )

    def blank_condition(self, height: int, width: int) -> Tensor | None:
        """Latents of zeros of a picture to be edited; None for a model that edits none."""
        if not self.takes_condition:
            return None
        return torch.zeros(1, self.latent_channels, height, width)

    @property
    def text_width(self) -> int:
        """D, of the token states that the model takes; 0: it takes none."""
        return int(self._config.get("joint_attention_dim") or 0)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as in config.json."""
        return dict(self._config)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """`(B, C, H, W)` float32 velocity u = ε - x0, unguided.

        Args and errors as `output_tokens`.
        """
        tokens = self.output_tokens(x, sigma, cond)
        return self.unpack(tokens.float(), x.shape[2], x.shape[3])

    @torch.no_grad()
    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The same without gradients."""
        return self(x, sigma, cond)

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """`(B, HW/p², p²F)` -> `(B, F, H, W)`."""
        return unpack(tokens, height, width, self.patch_size)

    def output_layer(self) -> OutputLayer:
        """The teacher's `norm_out` and `proj_out`; a negative copy if the model's sign is.

        Raises:
            ValueError: they were replaced already.
        """
        projection = self.module.get_submodule("proj_out")
        if not isinstance(projection, nn.Linear):
            raise ValueError(
                "this backbone's output layer was already replaced: load a fresh backbone for "
                "each trio"
            )
        if self.velocity_sign < 0:
            projection = _negative(projection)
        return OutputLayer(self.module.get_submodule("norm_out"), projection, self.patch_size)

    def require_stored_output(self) -> None:
        """Lets the output layer be changed by what was made for the diffusers model.

        Raises:
            ValueError: it has the weights in another order than the files.
        """
        if not isinstance(self.module, self.model_class):
            raise ValueError(
                f"LoRA on a {self.class_name}'s output layer isn't supported, whose weights are "
                "kept in another order here: merge it into the base, and give that as model.path"
            )

    def install_output(self, output: nn.Module) -> None:
        """Makes `output(hidden, temb)` the model's last layer; its sign stays as it is.

        It takes `norm_out`'s place, which is called with both arguments, and `proj_out` becomes
        the identity: the forward pass stays the model's own, tensors in, tensor out, so sharding
        and checkpointing hooks see nothing unusual.

        Raises:
            ValueError: the output layer was replaced already.
        """
        self.output_layer()
        self.module.norm_out = output
        self.module.proj_out = nn.Identity()

    def enable_gradient_checkpointing(self, *, selective: bool = False) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations.

        Args:
            selective: but keeps matrix products and attention, see `block_checkpoint`.
        """
        model: Any = self.module
        model.enable_gradient_checkpointing(block_checkpoint(selective))

    def check_batch(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> None:
        """Refuses latents, noise levels and prompts that don't go together.

        Raises:
            ValueError: another number of channels, or of samples.
        """
        if x.ndim != 4 or x.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents must be (B, {self.latent_channels}, H, W) for this model, "
                f"got {tuple(x.shape)}"
            )
        if sigma.shape != x.shape[:1] or cond.batch_size != x.shape[0]:
            raise ValueError(
                f"one sigma and one prompt a sample: latents hold {x.shape[0]}, sigma is "
                f"{tuple(sigma.shape)}, the conditioning holds {cond.batch_size}"
            )
        self.check_condition(cond)

    def check_condition(self, cond: Conditioning) -> None:
        """Refuses prompts without the pictures that the model edits, or with some that it doesn't.

        Raises:
            ValueError: either, or latents of another number of channels.
        """
        if cond.condition is None:
            if self.takes_condition:
                raise ValueError(
                    "this model edits a picture, and the conditioning brings none: give latents "
                    "of one for each prompt"
                )
            return
        if not self.takes_condition:
            raise ValueError(
                "this model makes pictures of prompts alone, and the conditioning brings pictures "
                "to be edited: leave them out, or use a family that edits"
            )
        if cond.condition.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents of pictures to be edited must be (B, {self.latent_channels}, h, w) for "
                f"this model, got {tuple(cond.condition.shape)}"
            )

    def check_tokens(self, cond: Conditioning) -> None:
        """Refuses token states of another width than `text_width`.

        Raises:
            ValueError: they have another.
        """
        expected = self.text_width
        if cond.tokens.shape[2] != expected:
            raise ValueError(
                f"this model takes token states of width {expected}, got {cond.tokens.shape[2]}: "
                "embed the prompts with the encoder it was trained with"
            )

    def pooled(self, cond: Conditioning) -> Tensor:
        """The pooled vector, of the width `pooled_projection_dim`.

        Raises:
            ValueError: it is missing, or has another width.
        """
        expected = self._config["pooled_projection_dim"]
        if cond.pooled is None or cond.pooled.shape[1] != expected:
            came = "none" if cond.pooled is None else f"width {cond.pooled.shape[1]}"
            raise ValueError(
                f"this model takes a pooled vector of width {expected}, got {came}: "
                "embed the prompts with the encoder it was trained with"
            )
        return cond.pooled


def model_tensors(folder: str) -> dict[str, StoredTensor]:
    """Where the tensors of a merged student lie, of any of its formats.

    Raises:
        ValueError: files that are missing, damaged or of other types.
    """
    file = storage.join(folder, GGUF_FILE)
    if storage.exists(file):
        return read_gguf(file)[1]
    return with_scales(stored_tensors(folder))


def is_of_head(name: str) -> bool:
    """Whether a tensor of a merged student is its head's, by the name in the file."""
    return name.split(".")[0].startswith(("norm_out", "proj_out", "scale_shift_table"))


def rows_by_position(tensor: Tensor) -> Tensor:
    """Rows (C, patch position) of a projection's weight or bias, as (patch position, C)."""
    return tensor.unflatten(0, (-1, PATCH * PATCH)).transpose(0, 1).flatten(0, 1)


def rows_by_channel(tensor: Tensor) -> Tensor:
    """The inverse of `rows_by_position`."""
    return tensor.unflatten(0, (PATCH * PATCH, -1)).transpose(0, 1).flatten(0, 1)


def channel_major(projection: nn.Linear) -> nn.Linear:
    """A copy of the projection with its rows, (patch position, C), as (C, patch position)."""
    rows = torch.arange(projection.out_features, device=projection.weight.device)
    return reordered(projection, rows.reshape(PATCH * PATCH, -1).T.flatten())


def _negative(layer: nn.Linear) -> nn.Linear:
    """A copy of `layer` whose output has the other sign."""
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.neg_()
    return copied


def reordered(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    """A copy of `layer` with its output features in another order."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    with torch.device("meta"):  # its random weights are never drawn
        copied = nn.Linear(layer.in_features, layer.out_features)
    copied.weight = nn.Parameter(weight[rows], layer.weight.requires_grad)
    copied.bias = nn.Parameter(bias[rows], layer.bias.requires_grad)
    return copied


def check_packing(config: Mapping[str, Any]) -> None:
    """Refuses a transformer over packed tokens that don't hold 2×2 patches or predict others.

    Raises:
        ValueError: input features that aren't a multiple of 4, or other output features.
    """
    taken = config["in_channels"]
    patch = config["patch_size"]
    given = patch * patch * (config["out_channels"] or taken)
    if taken % (PATCH * PATCH):
        raise ValueError(
            f"expected in_channels to be a multiple of {PATCH * PATCH} (packed 2×2 patches), got "
            f"{taken}"
        )
    if given != taken:
        raise ValueError(
            f"expected tokens of {taken} features out as in (a velocity), got {given} from "
            f"patch_size {patch} and out_channels {config['out_channels']}: models that take more "
            "than noisy latents (fill, edit, control) aren't covered"
        )


def check_no_guidance(class_name: str, embedded_guidance: float | None) -> None:
    """Refuses embedded guidance for a family or model that has no input for it.

    Raises:
        ValueError: it was given.
    """
    if embedded_guidance is not None:
        raise ValueError(
            f"embedded guidance {embedded_guidance} was given but this {class_name} takes none: "
            "leave guidance.embedded out and use guidance.scale"
        )


def kept_in_float32(module: nn.Module) -> set[str]:
    """Names of a diffusers model's parameters that are float32 whatever dtype is asked for."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())  # of every ModelMixin
    names = (name for name, _ in module.named_parameters())
    return {name for name in names if not kept.isdisjoint(name.split("."))}


def _keep_in_float32(module: nn.Module) -> None:
    """Gives an empty model those parameters as diffusers' own loading would."""
    for name in kept_in_float32(module):
        parameter = module.get_parameter(name)
        parameter.data = parameter.data.float()


def _dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of what isn't kept in float32, which is that of the model's inputs."""
    kept = kept_in_float32(module)
    named = list(module.named_parameters())
    dtypes = [parameter.dtype for name, parameter in named if name not in kept]
    return dtypes[0] if dtypes else named[0][1].dtype


def _constructor_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without diffusers' own entries."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def read_model_config(folder: str, class_name: str, uri: str) -> dict[str, Any]:
    """The config.json of a folder that `uri` in errors stands for.

    Raises:
        ValueError: the folder isn't a `class_name`'s, or `check_model_folder` refuses it.
    """
    check_model_folder(folder, uri)
    path = storage.join(folder, "config.json")
    if not storage.exists(path):
        raise ValueError(
            f"{uri} has no config.json: give the folder of a diffusers {class_name} "
            "(of a whole pipeline, its `transformer` subfolder)"
        )
    config = parse_object(storage.read_bytes(path), where=f"{uri}/config.json")
    found = config.get("_class_name")
    if found != class_name:
        raise ValueError(
            f"{uri}: expected a {class_name}, config.json says {shown(repr(found))}: correct "
            "model.path or model.family"
        )
    return config


def check_weights(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, Tensor], uri: str
) -> None:
    """Refuses weights whose names or shapes aren't the model's.

    diffusers alone would go on with random values for what is missing.

    Raises:
        ValueError: they aren't.
    """
    missing = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected]
    reshaped = [
        f"{shown(name)} {stored[name].shape} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(map(shown, names[:SHOWN]))}"
        f"{', …' if len(names) > SHOWN else ''})"
        for names, what in (
            (missing, "tensors are missing"),
            (unknown, "aren't the model's"),
            (reshaped, "have another shape"),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{uri}: config.json and weights don't belong together: {'; '.join(problems)}. "
            "Copy both from one checkpoint"
        )
