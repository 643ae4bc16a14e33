"""FLUX.2-klein's text encoder as diffusers' `Flux2KleinPipeline.encode_prompt` calls it: Qwen3.

The prompt is the user's turn of a chat, with empty thoughts at the answer's beginning; a token's
state is those after layers 9, 18 and 27, end to end. The pipeline pads to `max_tokens`, and the
transformer has no text mask and gives every token a position, so all states are stored. There is no
pooled vector.
"""

from __future__ import annotations

from piflow.backbones.flux2_klein import Flux2KleinEncoderConfig
from piflow.backbones.qwen3 import Qwen3TextModel, Reading, qwen3_identity
from piflow.storage.fingerprint import EncoderIdentity

LAYERS = (9, 18, 27)  # whose states are taken
READING = Reading(LAYERS, thinking=False, keeps_padding=True)


def identity(config: Flux2KleinEncoderConfig) -> EncoderIdentity:
    """The language model's size, and the layers.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds something else, or the model has too few layers.
    """
    return qwen3_identity(config, READING)


def load(config: Flux2KleinEncoderConfig, device: str) -> Qwen3TextModel:
    """The models of a recipe's section, on this device.

    Raises:
        FileNotFoundError, ValueError: as `Qwen3TextModel`.
    """
    return Qwen3TextModel(config, READING, device)
