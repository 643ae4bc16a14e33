"""A tiny random FLUX.2, with Mistral 3."""

from __future__ import annotations

from typing import Any

from torch import nn

from piflow.backbones import tiny
from piflow.backbones.flux2 import Flux2EncoderConfig
from piflow.backbones.flux2.text import LAYERS
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`Flux2Transformer2DModel`."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4 * tiny.channels(model),
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=len(LAYERS) * tiny.TEXT_WIDTH,
        timestep_guidance_channels=tiny.TEXT_WIDTH,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
        **tiny.HEADS,
    )


def vae(size: int) -> Any:
    """`AutoencoderKLFlux2`, with a batch norm that isn't the identity."""
    from diffusers import AutoencoderKLFlux2

    made: Any = AutoencoderKLFlux2(**tiny.kl_options(size))
    nn.init.normal_(made.bn.running_mean, std=tiny.STD)
    nn.init.uniform_(made.bn.running_var, 0.5, 2.0)
    return made


def pipeline(parts: dict[str, Any]) -> Any:
    """`Flux2Pipeline`."""
    from diffusers import Flux2Pipeline

    return Flux2Pipeline(scheduler=tiny.flow_scheduler(), **parts)


def text_parts(encoder: Flux2EncoderConfig) -> list[tuple[str, Any]]:
    """Mistral 3 and its tokenizer."""
    tokenizer = _chat_tokenizer()
    return [("text_encoder", _mistral_model(len(tokenizer))), ("tokenizer", tokenizer)]


def _chat_tokenizer() -> Any:
    """A tokenizer of bytes with a chat template; FLUX.2's system message is one token of it.

    It pads on the left, so that a token's place depends on its prompt's length.
    """
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=tiny.numbered(["<pad>", *alphabet]), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = ["<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    chat = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=marks[1:],
    )
    chat.add_tokens([SYSTEM_MESSAGE])
    chat.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% set mark = 'SYSTEM_PROMPT' if message['role'] == 'system' else 'INST' %}"
        "[{{ mark }}]{{ message['content'][0]['text'] }}[/{{ mark }}]{% endfor %}"
    )
    return chat


def _mistral_model(vocabulary: int) -> Any:
    """With one layer more than FLUX.2 asks; its vision part is as small as it can be."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    size = {
        "hidden_size": tiny.TEXT_WIDTH,
        "intermediate_size": tiny.TEXT_WIDTH,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    text = {
        "model_type": "mistral",
        "vocab_size": vocabulary,
        "num_hidden_layers": LAYERS[-1] + 1,
        "num_key_value_heads": 1,
        **size,
    }
    vision = {
        "model_type": "pixtral",
        "num_hidden_layers": 1,
        "image_size": 8,
        "patch_size": 4,
        **size,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=0)
    return Mistral3ForConditionalGeneration(config)
