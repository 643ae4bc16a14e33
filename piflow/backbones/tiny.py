"""What a family's tiny random model is made of, and parts that families share.

The classes, folders and files are those of the real models; only sizes and weights are not. Nothing
is downloaded.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from piflow.config import EncoderConfig, ModelConfig

TEXT_WIDTH = 16  # of token states and pooled vectors alike
VAE_CHANNELS = 4
CLIP_TOKENS = 16
HEADS: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 8}
AXES = (2, 2, 4)  # rotary dimensions; they sum to the head's
STD = 0.2  # of all weights but norms': every input matters, and nothing is zero as in fresh DiTs
_CHANNELS = {"vae": VAE_CHANNELS, "pixels": 12}


class TinyModel(Protocol):
    """What the module that a family's record calls `tiny` holds.

    Sizes are those of this file. Weights are drawn from PyTorch's global generator, which the
    caller seeds; the transformer's and the text models' are drawn again afterwards.
    """

    def transformer(
        self, model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
    ) -> nn.Module:
        """The family's class, with two blocks a stream: a first and a last one are told apart.

        Args:
            size: pixels of the pictures' sides.
            guidance_embeds: whether it takes an embedded guidance, if the family can.
        """
        ...

    def vae(self, size: int) -> nn.Module:
        """A VAE of the family's class that halves a picture, with `VAE_CHANNELS`."""
        ...

    def pipeline(self, parts: dict[str, Any]) -> Any:
        """The family's own diffusers pipeline, of parts by their names but the scheduler."""
        ...


class TinyEncoder(Protocol):
    """What the module that an encoder's config calls `tiny` holds."""

    def text_parts(self, encoder: Any) -> list[tuple[str, Any]]:
        """Folder's name and text model or tokenizer, each with `save_pretrained`."""
        ...


def channels(model: ModelConfig) -> int:
    """The latents' channels."""
    return _CHANNELS[model.codec]


def kl_options(size: int) -> dict[str, Any]:
    """Constructor options of an `AutoencoderKL` or one of its kind."""
    return {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": VAE_CHANNELS,
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "sample_size": size,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def kl_vae(size: int) -> Any:
    """A tiny `AutoencoderKL`."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(shift_factor=0.1, **kl_options(size))


def flow_scheduler() -> Any:
    """The scheduler of families that shift time by the picture's size."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def numbered(pieces: Iterable[str]) -> dict[str, int]:
    """A vocabulary of these pieces, each once."""
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def clip_tokenizer() -> Any:
    """CLIP's, of letters."""
    from transformers import CLIPTokenizer

    last = [f"{letter}</w>" for letter in string.ascii_lowercase]
    pieces = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *last]
    return CLIPTokenizer(vocab=numbered(pieces), merges=[], model_max_length=CLIP_TOKENS)


def clip_config(tokenizer: Any, layers: int) -> Any:
    """Configuration of a CLIP text model with this tokenizer."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer() -> Any:
    """T5's, of letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    scores = [(piece, 0.0 if number < 3 else -2.0) for number, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=scores, extra_ids=0)


def t5_model(vocabulary: int, width: int = TEXT_WIDTH) -> Any:
    """T5's encoder, of one layer."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=8,
            d_ff=TEXT_WIDTH,
            num_layers=1,
            num_heads=2,
        )
    )
