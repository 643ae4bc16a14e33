"""Prompt encoders of any kind: prompts -> token states and, for some models, a pooled vector."""

from __future__ import annotations

from piflow.backbones.text import EncoderModule, TextEncoder
from piflow.config import EncoderConfig
from piflow.config.family import resolve
from piflow.storage.fingerprint import EncoderIdentity


def build_encoder(config: EncoderConfig, device: str = "cpu") -> TextEncoder:
    """Load the recipe's encoder.

    Args:
        device: where it runs; results come back to the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no usable encoder of this type.
    """
    return TextEncoder(_module(config).load(config, device))


def encoder_identity(config: EncoderConfig) -> EncoderIdentity:
    """What the recipe's encoder is, without loading it: its files are read once for their hash.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no encoder of this type, or it takes fewer tokens.
    """
    return _module(config).identity(config)


def _module(config: EncoderConfig) -> EncoderModule:
    module: EncoderModule = resolve(config.module)
    return module
