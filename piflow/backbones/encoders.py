"""Text encoders: prompts -> token states and, where the family has one, a pooled vector."""

from __future__ import annotations

from collections.abc import Iterable

from piflow import storage
from piflow.backbones import bert
from piflow.backbones.dit import text as dit
from piflow.backbones.flux import text as flux
from piflow.backbones.flux2 import text as flux2
from piflow.backbones.qwen_image import text as qwen_image
from piflow.backbones.sd3 import text as sd3
from piflow.backbones.text import PromptModel, TextEncoder
from piflow.config import (
    BertEncoderConfig,
    ClassLabelEncoderConfig,
    EncoderConfig,
    Flux2EncoderConfig,
    FluxEncoderConfig,
    QwenImageEncoderConfig,
    SD3EncoderConfig,
)
from piflow.storage.fingerprint import EncoderIdentity

__all__ = [
    "PromptModel",
    "TextEncoder",
    "absolute_path",
    "build_encoder",
    "check_prompts",
    "encoder_identity",
]


def build_encoder(config: EncoderConfig, device: str = "cpu") -> TextEncoder:
    """Load the recipe's encoder.

    Args:
        device: where it runs; results come back to the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no usable encoder of this type.
    """
    return TextEncoder(_load(config, device))


def encoder_identity(config: EncoderConfig) -> EncoderIdentity:
    """What the recipe's encoder is, without loading it: its files are read once for their hash.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no encoder of this type, or it takes fewer tokens.
    """
    if isinstance(config, BertEncoderConfig):
        return bert.identity(config)
    if isinstance(config, FluxEncoderConfig):
        return flux.identity(config)
    if isinstance(config, Flux2EncoderConfig):
        return flux2.identity(config)
    if isinstance(config, QwenImageEncoderConfig):
        return qwen_image.identity(config)
    if isinstance(config, SD3EncoderConfig):
        return sd3.identity(config)
    return dit.identity(config)


def absolute_path(config: EncoderConfig) -> EncoderConfig:
    """The same encoder, found from any working directory."""
    if isinstance(config, ClassLabelEncoderConfig):
        return config
    return config.model_copy(update={"path": storage.absolute(config.path)})


def check_prompts(config: EncoderConfig, prompts: Iterable[str]) -> None:
    """Refuse prompts that the encoder can't take, before anything is loaded.

    Raises:
        ValueError: names the first one.
    """
    if isinstance(config, ClassLabelEncoderConfig):
        for prompt in prompts:
            dit.to_class(prompt, config.num_classes)


def _load(config: EncoderConfig, device: str) -> PromptModel:
    if isinstance(config, BertEncoderConfig):
        return bert.BertModel(config, device)
    if isinstance(config, FluxEncoderConfig):
        return flux.FluxTextModels(config, device)
    if isinstance(config, Flux2EncoderConfig):
        return flux2.Flux2TextModel(config, device)
    if isinstance(config, QwenImageEncoderConfig):
        return qwen_image.QwenImageTextModel(config, device)
    if isinstance(config, SD3EncoderConfig):
        return sd3.SD3TextModels(config, device)
    return dit.ClassLabels(config)
