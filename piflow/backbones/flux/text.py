"""FLUX.1's text encoders as diffusers' `FluxPipeline.encode_prompt` calls them: T5 and CLIP.

The pipeline pads a prompt to `max_tokens` T5 tokens and masks nothing, neither in T5 nor in the
transformer, so the states of padding are part of what FLUX.1 was trained on. `padding: keep` stores
all of them and equals the pipeline; `padding: drop` runs the same call and keeps the prompt's own
states only, with zeros in place of the others in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from piflow.backbones import text
from piflow.backbones.flux import FluxEncoderConfig
from piflow.storage.fingerprint import EncoderIdentity

MAX_TOKENS = 512  # FluxPipeline takes no longer prompts
_CLIP, _T5 = "text_encoder", "text_encoder_2"
_CLIP_TOKENIZER, _T5_TOKENIZER = "tokenizer", "tokenizer_2"


def identity(config: FluxEncoderConfig) -> EncoderIdentity:
    """Both encoders' sizes, and the treatment of padding.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds something else, or `max_tokens` is over 512.
    """
    text.require_at_most(config.max_tokens, MAX_TOKENS, "FLUX.1")
    parts = _parts(config)
    clip, t5 = parts.config(_CLIP, "clip_text_model"), parts.config(_T5, "t5")
    clip_sizes = text.require_sizes(clip, ("num_hidden_layers", "hidden_size"), parts.uris[_CLIP])
    t5_sizes = text.require_sizes(t5, ("num_layers", "d_model"), parts.uris[_T5])
    return EncoderIdentity(
        name=f"t5-{t5_sizes[0]}x{t5_sizes[1]}+clip-{clip_sizes[0]}x{clip_sizes[1]}, "
        f"padding {config.padding}",
        weights_sha256=parts.sha256(),
        max_tokens=config.max_tokens,
        hidden_size=t5_sizes[1],
    )


def _parts(config: FluxEncoderConfig) -> text.Parts:
    return text.Parts(config.path, (_CLIP, _T5), (_CLIP_TOKENIZER, _T5_TOKENIZER))


class FluxTextModels:
    """Token states are T5's, pooled is CLIP's; CLIP reads a prompt's first 77 tokens only.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds no usable model or tokenizer.
    """

    def __init__(self, config: FluxEncoderConfig, device: str) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel
        from transformers import T5TokenizerFast as T5Tokenizer  # type: ignore[attr-defined]

        self.identity = identity(config)
        parts = _parts(config)
        self._clip = parts.load_model(CLIPTextModel, _CLIP, device)
        self._t5 = parts.load_model(T5EncoderModel, _T5, device)
        self._clip_tokenizer = parts.load_tokenizer(CLIPTokenizer, _CLIP_TOKENIZER)
        self._t5_tokenizer = parts.load_tokenizer(T5Tokenizer, _T5_TOKENIZER)
        text.require_clip_fits(self._clip_tokenizer, self._clip, parts.uris[_CLIP_TOKENIZER])
        self._keep_padding = config.padding == "keep"
        self._device = device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """T5's, with its end mark."""
        return text.count_tokens(self._t5_tokenizer, prompts)

    def forward(self, prompts: Sequence[str]) -> list[text.Embedding]:
        """The pipeline's two calls."""
        t5_inputs = text.pad(self._t5_tokenizer, prompts, self.identity.max_tokens)
        states = self._t5(t5_inputs.input_ids.to(self._device)).last_hidden_state
        length = self._clip_tokenizer.model_max_length
        clip_inputs = text.pad(self._clip_tokenizer, prompts, length)
        pooled = self._clip(clip_inputs.input_ids.to(self._device)).pooler_output
        if self._keep_padding:
            counts = [states.shape[1]] * len(prompts)
        else:
            counts = t5_inputs.attention_mask.sum(1).tolist()
        tokens = text.split_rows(states, counts)
        return [
            text.Embedding(*row) for row in zip(tokens, pooled.float().cpu().unbind(), strict=True)
        ]


def load(config: FluxEncoderConfig, device: str) -> FluxTextModels:
    """The models of a recipe's section, on this device.

    Raises:
        FileNotFoundError, ValueError: as `FluxTextModels`.
    """
    return FluxTextModels(config, device)
