"""The prompt encoder of a recipe: what every kind says of itself, and the kinds of our families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from piflow import storage
from piflow.config.section import Positive, Variant


class EncoderConfig(Variant):
    """How prompts become a model's conditioning; a family names the kinds that it takes.

    A kind is a subclass with a default for `type`.
    """

    module: ClassVar[str]
    """Dotted name of a module that is a `piflow.backbones.text.EncoderModule`."""

    tiny: ClassVar[str | None] = None
    """Dotted name of a module that is a `piflow.backbones.tiny.TinyEncoder`, for `piflow smoke`;
    None: it can't be tried so.
    """

    in_pipeline: ClassVar[bool] = True
    """Whether its models are parts of the family's diffusers pipeline; a tiny model's are then in
    the pipeline's folder, else in its subfolder `encoder`.
    """

    @property
    def text_tokens(self) -> int:
        """Tokens of text that a prompt takes at most."""
        return 0

    @property
    def keeps_padding(self) -> bool:
        """Whether every prompt's states are stored with those of all its padding."""
        return False

    def absolute(self) -> Self:
        """The same encoder, found from any working directory."""
        return self

    def check_prompt(self, prompt: str) -> None:
        """Refuses a prompt that can't be encoded, before anything is loaded.

        Raises:
            ValueError: names it.
        """

    def example_prompts(self, texts: Sequence[str]) -> list[str]:
        """Different prompts that it takes, at most as many as these texts, or the texts."""
        return list(texts)


class TextEncoderConfig(EncoderConfig):
    """Text models with weights in a folder."""

    path: str
    """URI of their folder."""

    max_tokens: Positive
    """Tokens a prompt is padded or truncated to."""

    @property
    def text_tokens(self) -> int:
        """`max_tokens`."""
        return self.max_tokens

    def absolute(self) -> Self:
        """The same with an absolute path."""
        return self.model_copy(update={"path": storage.absolute(self.path)})


class BertEncoderConfig(TextEncoderConfig):
    """A BERT-like text encoder: token states, and their mean as the pooled vector."""

    module = "piflow.backbones.bert"
    tiny = "piflow.backbones.bert_tiny"
    in_pipeline = False

    type: Literal["bert"] = "bert"
    path: str
    """URI of a transformers folder (config, tokenizer, weights)."""

    max_tokens: Positive = 64
    """Tokens a prompt is padded or truncated to."""


class FluxEncoderConfig(TextEncoderConfig):
    """FLUX.1's two text encoders: T5 for token states, CLIP for the pooled vector."""

    module = "piflow.backbones.flux.text"
    tiny = "piflow.backbones.flux.tiny"

    type: Literal["flux"] = "flux"
    path: str
    """URI of a folder with text_encoder(_2) and tokenizer(_2)."""

    max_tokens: Positive = 512
    """T5 tokens a prompt is padded or truncated to."""

    padding: Literal["keep", "drop"] = "keep"
    """keep: all max_tokens states, as FluxPipeline feeds; drop: only the prompt's, zeros elsewhere
    (10-40 times smaller store, another conditioning than the pipeline's).
    """

    @property
    def keeps_padding(self) -> bool:
        """Whether `padding` says so."""
        return self.padding == "keep"


class Flux2EncoderConfig(TextEncoderConfig):
    """FLUX.2's text encoder: Mistral 3 after the family's system message, three layers' states."""

    module = "piflow.backbones.flux2.text"
    tiny = "piflow.backbones.flux2.tiny"

    type: Literal["flux2"] = "flux2"
    path: str
    """URI of a folder with text_encoder and tokenizer."""

    max_tokens: Positive = 512
    """Tokens, with the system message's, that a prompt is padded or cut to."""

    @property
    def keeps_padding(self) -> bool:
        """Always: the model has no mask."""
        return True


class QwenImageEncoderConfig(TextEncoderConfig):
    """Qwen-Image's text encoder: Qwen2.5-VL under the family's template."""

    module = "piflow.backbones.qwen_image.text"
    tiny = "piflow.backbones.qwen_image.tiny"

    type: Literal["qwen_image"] = "qwen_image"
    path: str
    """URI of a folder with text_encoder and tokenizer."""

    max_tokens: Positive = 512
    """Tokens after the template's, at most 1024."""


class SD3EncoderConfig(TextEncoderConfig):
    """Stable Diffusion 3's encoders: two CLIP models' states, then T5's; CLIP's pooled vectors."""

    module = "piflow.backbones.sd3.text"
    tiny = "piflow.backbones.sd3.tiny"

    type: Literal["sd3"] = "sd3"
    path: str
    """URI of a folder with text_encoder(_2, _3), tokenizer(_2, _3)."""

    max_tokens: Positive = 256
    """T5 tokens a prompt is padded or truncated to."""

    padding: Literal["keep", "drop"] = "keep"
    """keep: all states, as StableDiffusion3Pipeline feeds; drop: of T5 only the prompt's, zeros
    elsewhere (a smaller store, another conditioning than the pipeline's).
    """

    @property
    def keeps_padding(self) -> bool:
        """Whether `padding` says so."""
        return self.padding == "keep"


class ClassLabelEncoderConfig(EncoderConfig):
    """No text: a prompt is a class number; the empty prompt is the null class."""

    module = "piflow.backbones.dit.text"
    tiny = "piflow.backbones.dit.tiny"

    type: Literal["class_label"] = "class_label"
    num_classes: Positive = 1000
    """Prompts are 0 .. num_classes - 1."""

    def to_class(self, prompt: str) -> int:
        """A prompt's class; the empty prompt is the null class, `num_classes`.

        Raises:
            ValueError: it isn't a whole number of 0 … num_classes - 1.
        """
        if prompt == "":
            return self.num_classes
        if not (prompt.isascii() and prompt.isdecimal()) or int(prompt) >= self.num_classes:
            raise ValueError(
                f"the prompt {prompt!r} is not a class of encoder.num_classes = "
                f"{self.num_classes}; write whole numbers from 0 to {self.num_classes - 1}, or the "
                "empty prompt for no class"
            )
        return int(prompt)

    def check_prompt(self, prompt: str) -> None:
        """Refuses what `to_class` does."""
        self.to_class(prompt)

    def example_prompts(self, texts: Sequence[str]) -> list[str]:
        """The first classes."""
        return [str(number) for number in range(min(self.num_classes, len(texts)))]
