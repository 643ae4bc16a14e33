"""Tiny random text encoders of FLUX.1 and Qwen-Image with tiny tokenizers, on disk."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch

CLIP_TOKENS = 10


@pytest.fixture(scope="session")
def flux_text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text_encoder (CLIP), text_encoder_2 (T5) and their tokenizers."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    folder = tmp_path_factory.mktemp("flux")
    clip_tokens = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    clip_tokens += ["re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(
        {token: number for number, token in enumerate(clip_tokens)},
        [("r", "e"), ("re", "d</w>")],
        model_max_length=CLIP_TOKENS,
    ).save_pretrained(folder / "tokenizer")
    words = [("▁red", -3.0), ("▁heart", -3.0), ("▁cat", -3.0)]
    t5_tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *words]
    t5_tokens += [(letter, -5.0) for letter in string.ascii_lowercase]
    T5TokenizerFast(t5_tokens, extra_ids=0).save_pretrained(folder / "tokenizer_2")
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokens),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=len(clip_tokens) - 2,
        eos_token_id=len(clip_tokens) - 1,
    )
    t5 = T5Config(vocab_size=len(t5_tokens), d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    _save(CLIPTextModel, clip, folder / "text_encoder")
    _save(T5EncoderModel, t5, folder / "text_encoder_2")
    return folder


@pytest.fixture(scope="session")
def qwen_text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text_encoder (Qwen2.5-VL) and a tokenizer of bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("qwen")
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*sorted(ByteLevel.alphabet()), *marks]
    Qwen2Tokenizer(
        {token: number for number, token in enumerate(tokens)},
        [],
        additional_special_tokens=marks[1:],
    ).save_pretrained(folder / "tokenizer")
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "bos_token_id": 0,
            "eos_token_id": len(tokens) - 1,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    _save(Qwen2_5_VLForConditionalGeneration, config, folder / "text_encoder")
    return folder


def _save(model_class: type, config: object, folder: Path) -> None:
    """Weights large enough that every token and position matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
