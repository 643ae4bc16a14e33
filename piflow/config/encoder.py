"""The prompt encoder of a recipe: what every kind says of itself; a family's own lie with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import field_validator

from piflow import storage
from piflow.config.conditions import ConditionSizes
from piflow.config.section import Positive, Variant, valid_uri


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

    reads_pictures: ClassVar[bool] = False
    """Whether it reads the picture to be edited beside the prompt: its module then loads a
    `piflow.backbones.text.PicturePromptModel`.
    """

    @property
    def text_tokens(self) -> int:
        """Tokens of text that a prompt takes at most, those of a picture included."""
        return 0

    def picture_sizes(self, shown: ConditionSizes) -> ConditionSizes:
        """How the picture is scaled that it reads; as the model's own, unless a kind says else.

        Args:
            shown: how the model's own is.
        """
        return shown

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

    @field_validator("path")
    @classmethod
    def _is_a_uri(cls, path: str) -> str:  # of the kinds that derive from this one, too
        return valid_uri(path)

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
