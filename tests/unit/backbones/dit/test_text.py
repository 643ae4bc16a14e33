"""Class labels as prompts."""

from __future__ import annotations

import pytest
import torch

from piflow.backbones.dit import ClassLabelEncoderConfig
from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.config import BertEncoderConfig

CONFIG = ClassLabelEncoderConfig(num_classes=1000)


def test_a_prompt_is_its_class_and_the_empty_prompt_the_null_class() -> None:
    encoded = build_encoder(CONFIG).encode(["7", "0", "", "999"], batch_size=3)
    for prompt, expected in zip(encoded, [7.0, 0.0, 1000.0, 999.0], strict=True):
        assert torch.equal(prompt.tokens, torch.zeros(1, 1)) and not prompt.truncated
        assert prompt.pooled is not None and torch.equal(prompt.pooled, torch.tensor([expected]))


@pytest.mark.parametrize("prompt", ["1000", "-1", "1.0", "cat", " 3", "³", "٣"])
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="is not a class of encoder.num_classes = 1000; write"):
        build_encoder(CONFIG).encode(["1", prompt])
    with pytest.raises(ValueError, match="is not a class"):
        CONFIG.check_prompt(prompt)
    CONFIG.check_prompt("1")
    BertEncoderConfig(path="unused").check_prompt(prompt)


def test_examples_are_the_first_classes() -> None:
    assert ClassLabelEncoderConfig(num_classes=2).example_prompts(["a", "b", "c"]) == ["0", "1"]
    assert CONFIG.example_prompts(["a", "b", "c"]) == ["0", "1", "2"]
    assert BertEncoderConfig(path="unused").example_prompts(["a", "b"]) == ["a", "b"]


def test_the_identity_is_the_number_of_classes() -> None:
    identity = encoder_identity(CONFIG)
    assert identity == build_encoder(CONFIG).identity
    assert (identity.name, identity.max_tokens, identity.hidden_size) == ("class-label-1000", 1, 1)
    assert encoder_identity(ClassLabelEncoderConfig(num_classes=10)) != identity
