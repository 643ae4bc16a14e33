"""Networks that turn pictures and prompts into features, from folders whose weights are hashed.

How a picture is prepared belongs to the metric and is written here, as CLIP's and DINOv2's authors
have it, by Pillow's own resizing. A folder's preprocessor_config.json is not read: a file that
differs there would change figures without changing a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from piflow import storage
from piflow.backbones import text
from piflow.config import EvaluationConfig, NetworkConfig
from piflow.config.metrics import METRICS, Network
from piflow.evaluation.references import References
from piflow.storage.fingerprint import files_sha256
from piflow.storage.foreign import redacted, shown

WEIGHTS = "model.safetensors"
_AT_ONCE = 32  # pictures or prompts; a constant, since batches of other sizes round differently
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINOV2_SIDE = 224  # pixels; its positions are interpolated from those of 518


class FeatureNetwork(ABC):
    """A network on a device.

    Attributes:
        model_type: of its folder's config.json.
        has_text: whether it has a text model, and its folder a tokenizer.
        scale: factor of cosines between pictures and prompts, as it was trained with.
    """

    model_type: ClassVar[str]
    has_text: ClassVar[bool]
    scale = 1.0

    @abstractmethod
    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size as the network's input ``(3, h, w)``."""

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """Features ``(B, D)`` of prepared pictures ``(B, 3, h, w)``."""

    @torch.no_grad()
    def pictures(
        self, images: Iterable[Image.Image], advance: Callable[[int], None] = lambda count: None
    ) -> Tensor:
        """Features of RGB pictures, ``(B, D)`` float64 on the CPU.

        Args:
            advance: told how many more pictures were seen.
        """
        parts = []
        for batch in _batches(images):
            pixels = torch.stack([self.prepare(image) for image in batch])
            parts.append(self.forward(pixels).double().cpu())
            advance(len(batch))
        return torch.cat(parts)

    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Features of prompts in the space of the pictures', ``(P, D)`` float64 on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} has no text model")


class Clip(FeatureNetwork):
    """CLIP's projected features: pictures with their shorter side resized, cut to a square."""

    model_type, has_text = "clip", True

    def __init__(self, folder: Path, uri: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self._tokenizer = text.load_tokenizer(CLIPTokenizer, folder, uri)
        self._model = _loaded(CLIPModel, folder, uri, device)
        self._device = device
        self.side: int = self._model.config.vision_config.image_size  # pixels
        self.scale = float(self._model.logit_scale.exp())

    def prepare(self, image: Image.Image) -> Tensor:
        side, short = self.side, min(image.size)
        width, height = (int(side * length / short) for length in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        square = resized.crop((left, top, left + side, top + side))
        return _normalised(square, _CLIP_MEAN, _CLIP_STD)

    def forward(self, pixels: Tensor) -> Tensor:
        output = self._model.vision_model(pixel_values=pixels.to(self._device))
        return self._model.visual_projection(output.pooler_output)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        length = self._model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(prompts), _AT_ONCE):
            inputs = text.pad(self._tokenizer, prompts[start : start + _AT_ONCE], length)
            output = self._model.text_model(**inputs.to(self._device))
            parts.append(self._model.text_projection(output.pooler_output).double().cpu())
        return torch.cat(parts)


class HpsV2(Clip):
    """HPSv2's own CLIP: whole pictures, their longer side resized, padded with black to a square.

    So does the package hpsv2 1.2.0, which the score is published with.
    """

    def prepare(self, image: Image.Image) -> Tensor:
        scale = self.side / max(image.size)
        width, height = (max(1, round(length * scale)) for length in image.size)
        square = Image.new("RGB", (self.side, self.side))
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        square.paste(resized, ((self.side - width) // 2, (self.side - height) // 2))
        return _normalised(square, _CLIP_MEAN, _CLIP_STD)


class Dinov2(FeatureNetwork):
    """DINOv2's class token after the last norm: whole pictures, resized to 224 a side."""

    model_type, has_text = "dinov2", False

    def __init__(self, folder: Path, uri: str, device: torch.device) -> None:
        from transformers import Dinov2Model

        self._model = _loaded(Dinov2Model, folder, uri, device)
        self._device = device

    def prepare(self, image: Image.Image) -> Tensor:
        resized = image.resize((_DINOV2_SIDE, _DINOV2_SIDE), Image.Resampling.BICUBIC)
        return _normalised(resized, _IMAGENET_MEAN, _IMAGENET_STD)

    def forward(self, pixels: Tensor) -> Tensor:
        return self._model(pixel_values=pixels.to(self._device)).pooler_output


NETWORKS: dict[Network, type[Clip] | type[Dinov2]] = {
    "clip": Clip,
    "pick_score": Clip,
    "hps_v2": HpsV2,
    "dinov2": Dinov2,
}


@dataclass(frozen=True)
class OpenedNetwork:
    """A network's folder on this machine, whose weights are those that the recipe names.

    Attributes:
        identity: hash of weights, configuration and tokenizer.
    """

    kind: Network
    uri: str
    folder: Path
    identity: str

    def load(self, device: torch.device) -> FeatureNetwork:
        """The network, for inference in float32.

        Raises:
            ValueError: it doesn't load, or lacks weights.
        """
        return NETWORKS[self.kind](self.folder, self.uri, device)


@dataclass(frozen=True)
class Instruments:
    """What an evaluation's metrics measure with."""

    networks: dict[Network, OpenedNetwork]
    references: References | None

    def pictures_to_see(self, drawn: int) -> int:
        """How many pictures all networks see together, of so many that are drawn."""
        world = 0 if self.references is None else len(self.references)
        return drawn * len(self.networks) + world


def open_instruments(config: EvaluationConfig) -> Instruments:
    """The networks and references of the metrics that a recipe asks for; no weights are loaded.

    Raises:
        ValueError: a network's weights aren't those whose hash the recipe has, or its folder is of
            another kind or would have a library run code; a package is missing; or there are too
            few references.
        FileNotFoundError: there is no such folder.
    """
    asked = {name: METRICS[name] for name in config.measured}
    for name, metric in asked.items():
        if metric.package is not None and find_spec(metric.package[0]) is None:
            package, extra = metric.package
            raise ValueError(
                f"{name} needs the package {package}, which isn't installed: `pip install "
                f"'piflow[{extra}]'`, or leave the metric out of evaluation.metrics"
            )
    kinds = [kind for kind in NETWORKS if any(item.network == kind for item in asked.values())]
    networks = {kind: open_network(kind, getattr(config.networks, kind)) for kind in kinds}
    least = [item.least_pictures for item in asked.values() if item.references]
    references = None
    if least and config.references is not None:
        references = References(config.references, max(least))
    return Instruments(networks, references)


def open_network(kind: Network, config: NetworkConfig) -> OpenedNetwork:
    """The folder of a network, checked.

    Raises:
        ValueError, FileNotFoundError: as of `open_instruments`.
    """
    uri = redacted(config.path)
    key = f"evaluation.networks.{kind}"
    folder = storage.local_folder(config.path)
    read = text.read_config(folder, uri, f"{key},")
    network = NETWORKS[kind]
    if read.get("model_type") != network.model_type:
        raise ValueError(
            f"{key}: {uri}/config.json has model_type {shown(repr(read.get('model_type')))}, "
            f"expected {network.model_type!r}"
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{key}: {uri} has no {WEIGHTS}: expected all weights in that one file, as "
            "`save_pretrained` with a large enough max_shard_size writes it (pickled weights are "
            "never read)"
        )
    found = storage.sha256(str(folder / WEIGHTS))
    if found != config.sha256:
        raise ValueError(
            f"{key}.sha256 is {config.sha256}, and {uri}/{WEIGHTS} has {found}: these are other "
            "weights than the recipe means; copy the file again, or write the hash of the weights "
            "that you trust"
        )
    identity = files_sha256({uri: folder}, {uri: folder} if network.has_text else {})
    return OpenedNetwork(kind, uri, folder, identity)


def _loaded(model_class: Any, folder: Path, uri: str, device: torch.device) -> Any:
    return text.load_model(
        model_class,
        folder,
        uri,
        device=str(device),
        dtype=torch.float32,
        what="network",
    )


def _normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _batches(images: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    batch: list[Image.Image] = []
    for image in images:
        batch.append(image)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
