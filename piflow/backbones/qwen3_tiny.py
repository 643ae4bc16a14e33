"""A tiny random Qwen3 and its tokenizer, for families that take it."""

from __future__ import annotations

from typing import Any

from piflow.backbones import tiny


def text_parts(layers: int) -> list[tuple[str, Any]]:
    """`Qwen3ForCausalLM` of so many layers, and a tokenizer of bytes with a chat template."""
    tokenizer = _chat_tokenizer()
    return [("text_encoder", _model(len(tokenizer), layers)), ("tokenizer", tokenizer)]


def _chat_tokenizer() -> Any:
    """The template's parts are tokens, so that a short prompt isn't cut."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*marks, *sorted(ByteLevel.alphabet())]
    merges: Any = []
    tokenizer = Qwen2Tokenizer(
        vocab=tiny.numbered(pieces), merges=merges, additional_special_tokens=marks[1:]
    )
    tokenizer.add_tokens(["user\n", "assistant\n", "<think>\n\n</think>\n\n"])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    return tokenizer


def _model(vocabulary: int, layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=tiny.TEXT_WIDTH,
            intermediate_size=tiny.TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
