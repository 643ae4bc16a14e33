"""Between pictures and a backbone's latents: RGB itself, or the family's VAE."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from piflow import storage
from piflow.backbones.base import PATCH
from piflow.backbones.load import family_class
from piflow.config import ModelConfig, find_family
from piflow.config.picture_sizes import PIXEL_FACTOR, check_size, vae_factor
from piflow.storage.foreign import parse_object, shown
from piflow.storage.model_folder import LIBRARY_ERRORS, check_model_folder, reason


class Codec(Protocol):
    """Pictures `(B, 3, H, W)` float32 in [-1, 1] <-> latents `(B, C, h, w)` float32.

    A video is a picture of all its frames, one below the other, and so are its latents.

    Attributes:
        frames: of a picture, N: H is N times a frame's height.
    """

    frames: int

    @property
    def name(self) -> str:
        """What kind of codec it is: a VAE's class."""
        ...

    @property
    def channels(self) -> int:
        """C, of the latents."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents, of which h and w are multiples of the patch's side.

        Args:
            height, width: pixels of a frame; h is that of all frames.

        Raises:
            ValueError: height or width, in pixels, doesn't divide.
        """
        ...

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """`(B, 3, H, W)` -> `(B, C, h, w)`, without gradients for a VAE.

        Args:
            noise: `(B, C, h, w)` standard normal, to draw from a VAE's posterior; None: its mean.

        Raises:
            ValueError: not RGB, sizes that don't divide, or noise for what has no posterior.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, 3, H, W)`; values are not clamped to [-1, 1].

        Raises:
            ValueError: another number of channels.
        """
        ...


def build_codec(model: ModelConfig) -> Codec:
    """The recipe's codec; a VAE's weights are read at the first encode or decode.

    Raises:
        FileNotFoundError: there is no VAE.
        ValueError: its folder holds something else, or another family's VAE. FLUX.1's and
            Qwen-Image's have as many channels, so shapes alone wouldn't tell.
    """
    family = find_family(model.family)
    if model.codec == "pixels":
        return PixelCodec(family.patch_size, model.num_frames)
    codec = VAECodec(vae_uri(model), family.patch_size, model.num_frames)
    expected = family.vaes
    if codec.name not in expected:
        raise ValueError(
            f"model.family = {model.family} goes with a VAE of class {' or '.join(expected)}, "
            f"{vae_uri(model)} holds a {codec.name}: its latents would mean nothing to the "
            "teacher; set model.vae to the family's VAE, or correct model.family"
        )
    if family.video is not None and codec.frame_step != family.video.step:
        raise ValueError(
            f"model.family = {model.family} goes with a VAE that makes one frame of latents of "
            f"{family.video.step} frames, that of {vae_uri(model)} makes it of "
            f"{codec.frame_step}; set model.vae to the family's VAE"
        )
    return codec


def check_channels(model: ModelConfig, codec: Codec) -> None:
    """Refuses a codec whose latents have other channels than the model takes; by config.json alone.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: other channels, or a folder that `check_model_folder` refuses.
    """
    channels = codec.channels
    check_model_folder(model.path, model.path)
    place = storage.join(model.path, "config.json")
    config = parse_object(storage.read_bytes(place), where=place)
    taken = config.get("in_channels")
    if taken is None:  # the class's own default, which the first step knows
        return
    if type(taken) is not int:
        raise ValueError(f"{place} has in_channels {shown(repr(taken))}; expected a whole number")
    expected = taken
    if find_family(model.family).packs_latents:
        expected //= family_class(model.family).patch_size ** 2
    if channels != expected:
        source = f"the VAE {vae_uri(model)}" if model.codec == "vae" else "model.codec = pixels"
        raise ValueError(
            f"{source} makes latents of {channels} channels, and {model.path} takes {expected} "
            f"(in_channels is {taken}): set model.vae to the VAE that the model was trained with"
        )


def vae_uri(model: ModelConfig) -> str:
    """Where the recipe's VAE lies."""
    return model.vae or storage.sibling(model.path, "vae")


def absolute_paths(model: ModelConfig) -> ModelConfig:
    """The same model, its LoRA and VAE, found from any working directory."""
    paths: dict[str, Any] = {"path": storage.absolute(model.path)}
    if model.vae is not None:
        paths["vae"] = storage.absolute(model.vae)
    if model.lora is not None:
        path = storage.absolute(model.lora.path)
        paths["lora"] = model.lora.model_copy(update={"path": path})
    return model.model_copy(update=paths)


class PixelCodec:
    """RGB itself, space-to-depth by 2: 12 latent channels, lossless, no weights.

    Args:
        patch_size: side, in latent pixels, of the patch that a token is.
        frames: of a video, each of which is as a picture.
    """

    name = "pixels"
    channels = 12
    factor = PIXEL_FACTOR

    def __init__(self, patch_size: int = PATCH, frames: int = 1) -> None:
        self._patch_size = patch_size
        self.frames = frames

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(12, H/2, W/2), of all frames together.

        Raises:
            ValueError: height or width isn't a positive multiple of a token's pixels.
        """
        step = self._patch_size
        return _latent_shape(self.channels, self.factor, step, height, width, self.frames)

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """`(B, 3, H, W)` -> `(B, 12, H/2, W/2)`.

        Raises:
            ValueError: not RGB, a height or width that isn't a multiple of a token's pixels, or
                noise.
        """
        if noise is not None:
            raise ValueError("pixels have no posterior to draw from: leave the noise out")
        _check_pictures(pictures, self.frames)
        self.latent_shape(pictures.shape[2] // self.frames, pictures.shape[3])
        return F.pixel_unshuffle(pictures, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """`(B, 12, h, w)` -> `(B, 3, 2h, 2w)`.

        Raises:
            ValueError: not 12 latent channels.
        """
        _check_latents(latents, self.channels)
        return F.pixel_shuffle(latents, self.factor)


_SCALING_FACTOR = 0.18215  # diffusers' default for AutoencoderKL; its oldest files lack the key


@dataclass(frozen=True)
class _LatentSpace:
    """A VAE's geometry and its latents' normalisation, `(z - shift) · scale` by channel.

    Attributes:
        shift, scale: one value, or one a channel; None: they are in the VAE's batch norm, one for
            each channel and place in a 2×2 patch.
    """

    channels: int
    factor: int  # pixels a latent pixel, each way
    shift: tuple[float, ...] | None
    scale: tuple[float, ...] | None
    has_frames: bool  # a video VAE: (B, C, T, H, W), pictures are one frame
    frame_step: int = 1  # frames of a video that one of the latents stands for, but for the first


class VAECodec:
    """A diffusers VAE in float32: the posterior's mean or a draw, normalised as the pipelines do.

    `AutoencoderKL` (FLUX.1, Stable Diffusion, DiT): `(z - shift_factor) · scaling_factor`.
    `AutoencoderKLQwenImage`, `AutoencoderKLWan`: `(z - latents_mean) / latents_std` by channel.
    `AutoencoderKLFlux2`: its batch norm's running mean and deviation over 2×2 patches. Pictures go
    through one by one, so that memory is one picture's and results don't depend on the batch.

    Args:
        uri: the VAE's folder (config.json and safetensors); only config.json is read at once.
        patch_size: as of `PixelCodec`.
        frames: of a video, for the VAE of some.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it isn't one of these four classes' VAE of RGB pictures.
    """

    def __init__(self, uri: str, patch_size: int = PATCH, frames: int = 1) -> None:
        self._uri = uri
        self.frames = frames
        config = _read_config(uri)
        self._class_name = str(config.get("_class_name"))
        if self._class_name not in _LATENT_SPACES:
            raise ValueError(
                f"config.json of VAE {uri} has _class_name {shown(repr(self._class_name))}; "
                f"supported: "
                f"{', '.join(_LATENT_SPACES)}; set model.vae to the VAE's folder"
            )
        try:
            self._space = _LATENT_SPACES[self._class_name](config)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"config.json of VAE {uri} lacks what {self._class_name} needs: {reason(error)}"
            ) from error
        self._patch = 2 if self._space.shift is None else 1  # of what is normalised
        self._step = math.lcm(patch_size, self._patch)
        self._vae: Any = None

    @property
    def name(self) -> str:
        """The VAE's class."""
        return self._class_name

    @property
    def channels(self) -> int:
        """C, of the latents; from config.json alone."""
        return self._space.channels

    @property
    def frame_step(self) -> int:
        """Frames that one frame of latents stands for, but for the first; from config.json."""
        return self._space.frame_step

    @property
    def _latent_frames(self) -> int:
        return (self.frames - 1) // self._space.frame_step + 1

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H/factor, W/factor), H of all frames of latents; from config.json alone.

        Raises:
            ValueError: height or width isn't a positive multiple of a token's pixels.
        """
        space, step = self._space, self._step
        return _latent_shape(space.channels, space.factor, step, height, width, self._latent_frames)

    @torch.no_grad()
    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """`(B, 3, H, W)` -> `(B, C, h, w)`, on the pictures' device.

        Args:
            noise: as of `Codec.encode`.

        Raises:
            ValueError: not RGB, sizes that don't divide, noise of another shape, or weights that
                don't load.
        """
        _check_pictures(pictures, self.frames)
        size = (pictures.shape[2] // self.frames, pictures.shape[3])
        shape = (len(pictures), *self.latent_shape(*size))
        if noise is not None and noise.shape != shape:
            raise ValueError(f"expected noise of shape {shape}, got {tuple(noise.shape)}")
        pictures = pictures.float()
        vae = self._on(pictures.device)
        inputs = pictures.unflatten(2, (self.frames, -1)) if self._space.has_frames else pictures
        posterior = vae.encode(inputs).latent_dist
        z, spread = posterior.mode(), posterior.std
        if self._space.has_frames:
            z, spread = z.flatten(2, 3), spread.flatten(2, 3)
        if noise is not None:
            z = z + spread * noise.to(z)
        shift, scale = self._normalisation(vae, pictures.device)
        z = F.pixel_unshuffle(z, self._patch)
        return F.pixel_shuffle((z - shift) * scale, self._patch)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, 3, h·factor, w·factor)`, on the latents' device.

        Raises:
            ValueError: another number of channels, or weights that don't load.
        """
        _check_latents(latents, self._space.channels)
        latents = latents.float()
        vae = self._on(latents.device)
        shift, scale = self._normalisation(vae, latents.device)
        z = F.pixel_unshuffle(latents, self._patch) / scale + shift
        z = F.pixel_shuffle(z, self._patch)
        if not self._space.has_frames:
            pictures: Tensor = vae.decode(z).sample
            return pictures
        frames: Tensor = vae.decode(z.unflatten(2, (self._latent_frames, -1))).sample
        return frames.flatten(2, 3)

    def _normalisation(self, vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Shift and scale, each `(1, 1, 1, 1)`, `(1, C, 1, 1)` or, of patches, `(1, 4C, 1, 1)`."""
        if self._space.shift is None:
            shift, scale = vae.bn.running_mean, torch.rsqrt(vae.bn.running_var + vae.bn.eps)
        else:
            shift, scale = (
                torch.tensor(values, dtype=torch.float32, device=device)
                for values in (self._space.shift, self._space.scale)
            )
        return shift.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)

    def _on(self, device: torch.device) -> Any:
        """The VAE on this device, loaded when it is first needed."""
        if self._vae is None:
            self._vae = _load_vae(self._class_name, self._uri)
        return self._vae.to(device)


def _load_vae(class_name: str, uri: str) -> Any:
    import diffusers

    folder = str(storage.local_folder(uri))
    check_model_folder(folder, f"VAE {uri}")
    try:
        vae, info = getattr(diffusers, class_name).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except LIBRARY_ERRORS as error:
        raise ValueError(f"cannot load the VAE {uri}: {reason(error)}") from error
    if info["missing_keys"]:
        raise ValueError(
            f"the VAE {uri} lacks {len(info['missing_keys'])} of the model's weights, e.g. "
            f"{', '.join(sorted(info['missing_keys'])[:3])}; use a complete {class_name}"
        )
    vae.enable_slicing()
    return vae.eval().requires_grad_(False)


def _space_of_kl(config: dict[str, Any]) -> _LatentSpace:
    _require_rgb(config.get("in_channels", 3))
    return _LatentSpace(
        channels=int(config["latent_channels"]),
        factor=vae_factor(config),
        shift=(float(config.get("shift_factor") or 0.0),),
        scale=(float(config.get("scaling_factor", _SCALING_FACTOR)),),
        has_frames=False,
    )


def _space_of_flux2(config: dict[str, Any]) -> _LatentSpace:
    if list(config.get("patch_size", (2, 2))) != [2, 2]:
        raise ValueError(f"the VAE has patch_size {config['patch_size']}; expected [2, 2]")
    return replace(_space_of_kl(config), shift=None, scale=None)


def _space_of_qwen_image(config: dict[str, Any]) -> _LatentSpace:
    _require_rgb(config.get("input_channels", 3))
    std = torch.tensor(config["latents_std"], dtype=torch.float32)
    return _LatentSpace(
        channels=int(config["z_dim"]),
        factor=vae_factor(config),
        shift=tuple(float(value) for value in config["latents_mean"]),
        scale=tuple((1.0 / std).tolist()),  # in float32, as the pipeline inverts it
        has_frames=True,
    )


def _space_of_wan(config: dict[str, Any]) -> _LatentSpace:
    for key in ("is_residual", "patch_size"):
        if config.get(key):
            raise ValueError(f"the VAE has {key} = {config[key]} (Wan 2.2); expected Wan 2.1's")
    _require_rgb(config.get("in_channels", 3))
    space = _space_of_qwen_image({**config, "input_channels": 3})
    return replace(space, frame_step=int(2 ** sum(map(bool, config["temperal_downsample"]))))


_LATENT_SPACES = {
    "AutoencoderKL": _space_of_kl,
    "AutoencoderKLFlux2": _space_of_flux2,
    "AutoencoderKLQwenImage": _space_of_qwen_image,
    "AutoencoderKLWan": _space_of_wan,
}


def _require_rgb(channels: int) -> None:
    if channels != 3:
        raise ValueError(f"the VAE takes {channels} picture channels; expected one for RGB, 3")


def _read_config(uri: str) -> dict[str, Any]:
    check_model_folder(uri, f"VAE {uri}")
    content = storage.read_bytes(storage.join(uri, "config.json"))
    return parse_object(content, where=f"config.json of VAE {uri}")


def _latent_shape(
    channels: int, factor: int, patch: int, height: int, width: int, frames: int
) -> tuple[int, int, int]:
    check_size(height, width, patch * factor)
    return channels, frames * (height // factor), width // factor


def _check_pictures(pictures: Tensor, frames: int) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2] % frames:
        told = "" if frames == 1 else f", with {frames} frames one below the other"
        raise ValueError(f"pictures must be (B, 3, H, W){told}, got {tuple(pictures.shape)}")


def _check_latents(latents: Tensor, channels: int) -> None:
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"latents must be (B, {channels}, h, w), got {tuple(latents.shape)}")
