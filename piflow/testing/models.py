"""Tiny random models of every family, saved as users have theirs: to try a recipe without the real.

The classes, folders and files are those of the real models (`save_pretrained`); only sizes and
weights are not. Nothing is downloaded.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piflow.backbones.flux2.text import LAYERS
from piflow.backbones.qwen_image.text import TEMPLATE
from piflow.config import (
    BertEncoderConfig,
    ClassLabelEncoderConfig,
    EncoderConfig,
    Flux2EncoderConfig,
    ModelConfig,
    QwenImageEncoderConfig,
    SD3EncoderConfig,
)

PICTURE_MULTIPLE = 4  # pixels; both codecs halve a picture, and the backbones take 2×2 patches
_TEXT_WIDTH = 16  # of token states and pooled vectors alike
_CLIP_TOKENS = 16
_HEADS: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 8}
_AXES = (2, 2, 4)  # rotary dimensions; they sum to the head's
_LATENT_CHANNELS = {"vae": 4, "pixels": 12}
_STD = 0.2  # of all weights but norms': every input matters, and nothing is zero as in fresh DiTs


def save_model(
    folder: Path,
    model: ModelConfig,
    encoder: EncoderConfig,
    *,
    size: int,
    guidance_embeds: bool = False,
    seed: int = 0,
) -> None:
    """Write a model folder that a recipe's `model` and `encoder` sections fit.

    ::

        transformer  vae  text_encoder  tokenizer  text_encoder_2  tokenizer_2  scheduler
        model_index.json                                        as far as the family has them

    With a BERT-like encoder, which no diffusers pipeline has, model and tokenizer are in `encoder`,
    and there are no index and no scheduler. The same arguments give the same weights.

    Args:
        folder: a local folder.
        size: pixels of the pictures' sides; DiT's latents have this one size.
        guidance_embeds: whether a FLUX takes an embedded guidance.
        seed: of the weights.

    Raises:
        ValueError: `size` isn't a positive multiple of `PICTURE_MULTIPLE`.
    """
    if size <= 0 or size % PICTURE_MULTIPLE:
        raise ValueError(
            f"expected a positive multiple of {PICTURE_MULTIPLE} pixels as size, got {size}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _text_parts(encoder)
        parts["transformer"] = _transformer(model, encoder, size, guidance_embeds)
        for part in parts.values():
            if isinstance(part, nn.Module):
                _randomise(part)
        if model.codec == "vae":  # whose fresh weights give pictures that differ
            parts["vae"] = _vae(model.family, size)
    if model.codec == "vae" and not isinstance(encoder, BertEncoderConfig):
        _pipeline(model, parts).save_pretrained(str(folder))
        return
    for name, part in parts.items():
        part.save_pretrained(str(folder / name))
    if isinstance(encoder, BertEncoderConfig):
        _bert_tokenizer().save_pretrained(str(folder / "encoder"))


def _pipeline(model: ModelConfig, parts: dict[str, Any]) -> Any:
    """The family's own, of these parts."""
    from diffusers import (
        DDIMScheduler,
        DiTPipeline,
        FlowMatchEulerDiscreteScheduler,
        Flux2Pipeline,
        FluxPipeline,
        QwenImagePipeline,
        StableDiffusion3Pipeline,
    )

    if model.family == "dit":
        return DiTPipeline(scheduler=DDIMScheduler(), **parts)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if model.family == "qwen_image":
        return QwenImagePipeline(scheduler=scheduler, **parts)
    if model.family == "flux2":
        return Flux2Pipeline(scheduler=scheduler, **parts)
    if model.family == "sd3":
        return StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts
        )
    return FluxPipeline(scheduler=scheduler, **parts)


def _randomise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "norm" not in name or parameter.ndim > 1:
            nn.init.normal_(parameter, std=_STD)


def _transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """Two blocks a stream, so that a first block, a last one and what is between are told apart."""
    from diffusers import (
        DiTTransformer2DModel,
        Flux2Transformer2DModel,
        FluxTransformer2DModel,
        QwenImageTransformer2DModel,
        SD3Transformer2DModel,
    )

    channels = _LATENT_CHANNELS[model.codec]
    if isinstance(encoder, ClassLabelEncoderConfig):
        return DiTTransformer2DModel(
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            sample_size=size // 2,
            num_embeds_ada_norm=encoder.num_classes,
            norm_num_groups=2,
            **_HEADS,
        )
    if model.family == "qwen_image":
        return QwenImageTransformer2DModel(
            in_channels=4 * channels,
            out_channels=channels,
            num_layers=2,
            joint_attention_dim=_TEXT_WIDTH,
            axes_dims_rope=_AXES,
            **_HEADS,
        )
    if model.family == "flux2":
        return Flux2Transformer2DModel(
            in_channels=4 * channels,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=len(LAYERS) * _TEXT_WIDTH,
            timestep_guidance_channels=_TEXT_WIDTH,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=guidance_embeds,
            **_HEADS,
        )
    if model.family == "sd3":
        text_width = 2 * _TEXT_WIDTH  # two CLIP models side by side
        return SD3Transformer2DModel(
            sample_size=size // 2,
            in_channels=channels,
            out_channels=channels,
            num_layers=3,
            joint_attention_dim=text_width,
            caption_projection_dim=_HEADS["num_attention_heads"] * _HEADS["attention_head_dim"],
            pooled_projection_dim=text_width,
            pos_embed_max_size=size,
            qk_norm="rms_norm",
            **_HEADS,
        )
    return FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        axes_dims_rope=_AXES,
        guidance_embeds=guidance_embeds,
        **_HEADS,
    )


def _vae(family: str, size: int) -> Any:
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    if family == "qwen_image":
        return _qwen_vae()
    shared: dict[str, Any] = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": _LATENT_CHANNELS["vae"],
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "sample_size": size,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    if family != "flux2":
        return AutoencoderKL(shift_factor=0.1, **shared)
    vae: Any = AutoencoderKLFlux2(**shared)
    nn.init.normal_(vae.bn.running_mean, std=_STD)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


def _qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    channels = _LATENT_CHANNELS["vae"]
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
    )


def _text_parts(encoder: EncoderConfig) -> dict[str, Any]:
    """Folder name -> text encoder or tokenizer."""
    if isinstance(encoder, ClassLabelEncoderConfig):
        return {}
    if isinstance(encoder, BertEncoderConfig):
        return {"encoder": _bert_model(len(_bert_tokenizer()), encoder.max_tokens)}
    if isinstance(encoder, QwenImageEncoderConfig):
        tokenizer = _qwen_tokenizer()
        return {"text_encoder": _qwen_model(len(tokenizer)), "tokenizer": tokenizer}
    if isinstance(encoder, Flux2EncoderConfig):
        chat_tokenizer = _chat_tokenizer()
        return {"text_encoder": _mistral_model(len(chat_tokenizer)), "tokenizer": chat_tokenizer}
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    if isinstance(encoder, SD3EncoderConfig):
        return {
            "text_encoder": _clip_with_projection(clip_tokenizer),
            "tokenizer": clip_tokenizer,
            "text_encoder_2": _clip_with_projection(clip_tokenizer),
            "tokenizer_2": clip_tokenizer,
            "text_encoder_3": _t5_model(len(t5_tokenizer), 2 * _TEXT_WIDTH),
            "tokenizer_3": t5_tokenizer,
        }
    return {
        "text_encoder": _clip_model(clip_tokenizer),
        "tokenizer": clip_tokenizer,
        "text_encoder_2": _t5_model(len(t5_tokenizer)),
        "tokenizer_2": t5_tokenizer,
    }


def _numbered(pieces: Iterable[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def _bert_tokenizer() -> Any:
    """Of letters."""
    from transformers import BertTokenizer

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    later = [f"##{letter}" for letter in string.ascii_lowercase]
    return BertTokenizer(vocab=_numbered([*marks, *string.ascii_lowercase, *later]))


def _bert_model(vocabulary: int, max_tokens: int) -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=_TEXT_WIDTH,
            intermediate_size=_TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=max_tokens,
        )
    )


def _clip_tokenizer() -> Any:
    """Of letters."""
    from transformers import CLIPTokenizer

    last = [f"{letter}</w>" for letter in string.ascii_lowercase]
    pieces = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *last]
    return CLIPTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=_CLIP_TOKENS)


def _clip_model(tokenizer: Any) -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel(_clip_config(tokenizer, layers=1))


def _clip_with_projection(tokenizer: Any) -> Any:
    """Of two layers: Stable Diffusion 3 takes the states of the last but one."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip_config(tokenizer, layers=2))


def _clip_config(tokenizer: Any, layers: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=_TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=_CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_tokenizer() -> Any:
    """Of letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    scores = [(piece, 0.0 if number < 3 else -2.0) for number, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=scores, extra_ids=0)


def _t5_model(vocabulary: int, width: int = _TEXT_WIDTH) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=8,
            d_ff=_TEXT_WIDTH,
            num_layers=1,
            num_heads=2,
        )
    )


def _qwen_tokenizer() -> Any:
    """Of bytes, and of the words of the family's template.

    The pipeline drops as many tokens as the template has with the real tokenizer, a word each, so
    with bytes alone `max_tokens` would leave nothing of the prompt.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = re.findall(r" ?[A-Za-z]+", re.sub(r"<\|.*?\|>", "\n", TEMPLATE))
    spelled = [word.replace(" ", "Ġ") for word in words]  # as byte-level vocabularies write a space
    merges = {(word[:end], word[end]): None for word in spelled for end in range(1, len(word))}
    pieces = [*marks, *sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    pairs: Any = list(merges)  # annotated as strings there, which it doesn't take
    return Qwen2Tokenizer(
        vocab=_numbered(pieces), merges=pairs, additional_special_tokens=marks[1:]
    )


def _qwen_model(vocabulary: int) -> Any:
    """Its vision part is as small as it can be: text alone doesn't use it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": vocabulary,
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": _TEXT_WIDTH,
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
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": _TEXT_WIDTH,
        "num_heads": 2,
        "out_hidden_size": _TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


def _chat_tokenizer() -> Any:
    """Of bytes, with a chat template; FLUX.2's system message, which every prompt has, is a token.

    It pads on the left, so that a token's place depends on its prompt's length.
    """
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=_numbered(["<pad>", *alphabet]), merges=[]))
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
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": _TEXT_WIDTH,
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
