"""A tiny random Qwen-Image, with Qwen2.5-VL."""

from __future__ import annotations

import re
from typing import Any

from piflow.backbones import tiny
from piflow.backbones.qwen_image import QwenImageEncoderConfig
from piflow.backbones.qwen_image.text import TEMPLATE
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`QwenImageTransformer2DModel`."""
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=4 * tiny.channels(model),
        out_channels=tiny.channels(model),
        num_layers=2,
        joint_attention_dim=tiny.TEXT_WIDTH,
        axes_dims_rope=tiny.AXES,
        **tiny.HEADS,
    )


def vae(size: int) -> Any:
    """`AutoencoderKLQwenImage`."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=tiny.VAE_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * tiny.VAE_CHANNELS,
        latents_std=[1.5] * tiny.VAE_CHANNELS,
    )


def pipeline(parts: dict[str, Any]) -> Any:
    """`QwenImagePipeline`."""
    from diffusers import QwenImagePipeline

    return QwenImagePipeline(scheduler=tiny.flow_scheduler(), **parts)


def text_parts(encoder: QwenImageEncoderConfig) -> list[tuple[str, Any]]:
    """Qwen2.5-VL and its tokenizer."""
    tokenizer = qwen_tokenizer(TEMPLATE)
    return [("text_encoder", qwen_model(len(tokenizer))), ("tokenizer", tokenizer)]


def qwen_tokenizer(template: str, more_marks: tuple[str, ...] = ()) -> Any:
    """A tokenizer of bytes, and of the words of the family's template.

    The pipeline drops as many tokens as the template has with the real tokenizer, a word each, so
    with bytes alone `max_tokens` would leave nothing of the prompt.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more_marks]
    words = re.findall(r" ?[A-Za-z]+", re.sub(r"<\|.*?\|>", "\n", template))
    spelled = [word.replace(" ", "Ġ") for word in words]  # as byte-level vocabularies write a space
    merges = {(word[:end], word[end]): None for word in spelled for end in range(1, len(word))}
    pieces = [*marks, *sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    pairs: Any = list(merges)  # annotated as strings there, which it doesn't take
    return Qwen2Tokenizer(
        vocab=tiny.numbered(pieces), merges=pairs, additional_special_tokens=marks[1:]
    )


def qwen_model(vocabulary: int, **marks: Any) -> Any:
    """Qwen2.5-VL, of one layer in both parts.

    Args:
        vocabulary: tokens that there are.
        marks: ids of those around pictures, and in their place, as the config calls them.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": vocabulary,
        "hidden_size": tiny.TEXT_WIDTH,
        "intermediate_size": tiny.TEXT_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": tiny.TEXT_WIDTH,
        "intermediate_size": tiny.TEXT_WIDTH,
        "num_heads": 2,
        "out_hidden_size": tiny.TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    return Qwen2_5_VLForConditionalGeneration(config)
