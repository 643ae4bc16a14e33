"""Stable Diffusion 3's encoders as diffusers' `StableDiffusion3Pipeline.encode_prompt` calls them.

A prompt's states are two CLIP models' last but one, side by side and padded with zeros to T5's
width, followed by T5's; the pooled vector is both CLIP models' projections. The pipeline pads every
tokenizer's output and masks nothing, so the states of padding are part of what the family was
trained on: `padding: keep` stores all of them and equals the pipeline, `padding: drop` keeps CLIP's
states and T5's of the prompt's own tokens, with zeros in place of the others in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from piflow.backbones import text
from piflow.backbones.sd3 import SD3EncoderConfig
from piflow.storage.fingerprint import EncoderIdentity

MAX_TOKENS = 512  # StableDiffusion3Pipeline takes no longer prompts
_CLIPS, _T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
_CLIP_TOKENIZERS, _T5_TOKENIZER = ("tokenizer", "tokenizer_2"), "tokenizer_3"


def identity(config: SD3EncoderConfig) -> EncoderIdentity:
    """All three encoders' sizes, and the treatment of padding; `max_tokens` counts CLIP's too.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds something else, `max_tokens` is over 512, the two CLIP models
            differ in length, or are together wider than T5.
    """
    text.require_at_most(config.max_tokens, MAX_TOKENS, "Stable Diffusion 3")
    parts = _parts(config)
    clips = [parts.config(part, "clip_text_model") for part in _CLIPS]
    keys = ("num_hidden_layers", "hidden_size")
    clip_sizes = [
        text.require_sizes(clip, keys, parts.uris[part])
        for clip, part in zip(clips, _CLIPS, strict=True)
    ]
    t5 = parts.config(_T5, "t5")
    layers, width = text.require_sizes(t5, ("num_layers", "d_model"), parts.uris[_T5])
    lengths = [
        text.number_of(clip, "max_position_embeddings", parts.uris[part], default=77)
        for clip, part in zip(clips, _CLIPS, strict=True)
    ]
    if lengths[0] != lengths[1] or sum(size[1] for size in clip_sizes) > width:
        raise ValueError(
            f"the encoders of {config.path} don't belong together: CLIP models of {lengths} tokens "
            f"and widths {[size[1] for size in clip_sizes]}, T5 of width {width}; use the family's"
        )
    names = "".join(f"+clip-{size[0]}x{size[1]}" for size in clip_sizes)
    return EncoderIdentity(
        name=f"t5-{layers}x{width}{names}, padding {config.padding}",
        weights_sha256=parts.sha256(),
        max_tokens=lengths[0] + config.max_tokens,
        hidden_size=width,
    )


def _parts(config: SD3EncoderConfig) -> text.Parts:
    return text.Parts(config.path, (*_CLIPS, _T5), (*_CLIP_TOKENIZERS, _T5_TOKENIZER))


class SD3TextModels:
    """CLIP reads a prompt's first 77 tokens, T5 its first `max_tokens`.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds no usable model or tokenizer.
    """

    def __init__(self, config: SD3EncoderConfig, device: str) -> None:
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel
        from transformers import T5TokenizerFast as T5Tokenizer  # type: ignore[attr-defined]

        self.identity = identity(config)
        parts = _parts(config)
        self._clips = [
            parts.load_model(CLIPTextModelWithProjection, part, device) for part in _CLIPS
        ]
        self._clip_tokenizers = [
            parts.load_tokenizer(CLIPTokenizer, part) for part in _CLIP_TOKENIZERS
        ]
        self._t5 = parts.load_model(T5EncoderModel, _T5, device)
        self._t5_tokenizer = parts.load_tokenizer(T5Tokenizer, _T5_TOKENIZER)
        self._clip_length = self.identity.max_tokens - config.max_tokens
        found = self._clip_tokenizers[0].model_max_length  # which the pipeline takes for both
        if found != self._clip_length:
            raise ValueError(
                f"the CLIP tokenizer {parts.uris[_CLIP_TOKENIZERS[0]]} pads to {found} tokens, the "
                f"CLIP models take {self._clip_length}; set model_max_length in its "
                "tokenizer_config.json"
            )
        self._keep_padding = config.padding == "keep"
        self._device = device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """CLIP's, which are always as many, and T5's with its end mark."""
        counts = text.count_tokens(self._t5_tokenizer, prompts)
        return [self._clip_length + count for count in counts]

    def forward(self, prompts: Sequence[str]) -> list[text.Embedding]:
        """The pipeline's three calls."""
        length = self.identity.max_tokens - self._clip_length
        t5_inputs = text.pad(self._t5_tokenizer, prompts, length)
        t5_states = self._t5(t5_inputs.input_ids.to(self._device)).last_hidden_state
        clip_states, pooled = zip(*(self._clip(i, prompts) for i in range(2)), strict=True)
        clip = torch.cat(clip_states, dim=-1)
        clip = F.pad(clip, (0, t5_states.shape[-1] - clip.shape[-1]))
        states = torch.cat([clip.to(t5_states.dtype), t5_states], dim=1)
        counts = [states.shape[1]] * len(prompts)
        if not self._keep_padding:
            counts = (self._clip_length + t5_inputs.attention_mask.sum(1)).tolist()
        rows = text.split_rows(states, counts)
        vectors = torch.cat(pooled, dim=-1).float().cpu().unbind()
        return [text.Embedding(*row) for row in zip(rows, vectors, strict=True)]

    def _clip(self, number: int, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """One CLIP model's last but one states, and its projected pooled vector."""
        inputs = text.pad(self._clip_tokenizers[number], prompts, self._clip_length)
        output = self._clips[number](inputs.input_ids.to(self._device), output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds


def load(config: SD3EncoderConfig, device: str) -> SD3TextModels:
    """The models of a recipe's section, on this device.

    Raises:
        FileNotFoundError, ValueError: as `SD3TextModels`.
    """
    return SD3TextModels(config, device)
