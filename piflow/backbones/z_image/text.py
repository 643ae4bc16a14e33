"""Z-Image's text encoder as diffusers' `ZImagePipeline.encode_prompt` calls it: Qwen3.

The prompt is the user's turn of a chat, its template's thinking left on; the states are those that
the last layer gets. Only the prompt's and the template's tokens are stored. There is no pooled
vector.
"""

from __future__ import annotations

from piflow.backbones.qwen3 import Qwen3TextModel, Reading, qwen3_identity
from piflow.backbones.z_image import ZImageEncoderConfig
from piflow.storage.fingerprint import EncoderIdentity

READING = Reading(layers=(-2,), thinking=True, keeps_padding=False)


def identity(config: ZImageEncoderConfig) -> EncoderIdentity:
    """The language model's size.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds something else.
    """
    return qwen3_identity(config, READING)


def load(config: ZImageEncoderConfig, device: str) -> Qwen3TextModel:
    """The models of a recipe's section, on this device.

    Raises:
        FileNotFoundError, ValueError: as `Qwen3TextModel`.
    """
    return Qwen3TextModel(config, READING, device)
