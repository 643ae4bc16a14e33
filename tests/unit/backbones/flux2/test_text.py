"""FLUX.2's encoder against diffusers' own `Flux2Pipeline.encode_prompt`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.backbones.flux2 import Flux2EncoderConfig
from piflow.backbones.text import TextEncoder
from piflow.config import ModelConfig
from piflow.testing.models import save_model

MAX_TOKENS = 20
PROMPTS = ["red heart", "", "a cat of a red heart in a red cup of tea", "two [IMG]hearts"]


def _config(folder: Path) -> Flux2EncoderConfig:
    return Flux2EncoderConfig(path=str(folder), max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny pipeline, whose tokenizer pads on the left."""
    path = tmp_path_factory.mktemp("flux2")
    model = ModelConfig(family="flux2", path=str(path / "transformer"), codec="vae")
    save_model(path, model, _config(path), size=16)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return build_encoder(_config(folder))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_gives_what_the_pipeline_gives(
    folder: Path, encoder: TextEncoder, batch_size: int
) -> None:
    from diffusers import Flux2Pipeline

    pipeline = Flux2Pipeline.from_pretrained(str(folder), local_files_only=True)
    with torch.no_grad():
        tokens, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=MAX_TOKENS)
    assert tokens.shape == (4, MAX_TOKENS, encoder.identity.hidden_size)
    encoded = encoder.encode(PROMPTS, batch_size)
    for row, prompt in enumerate(encoded):
        assert prompt.pooled is None
        torch.testing.assert_close(prompt.tokens, tokens[row], rtol=0, atol=1e-5)
    assert [prompt.truncated for prompt in encoded] == [False, False, True, False]
    distances = torch.cdist(tokens.flatten(1), tokens.flatten(1)) + torch.eye(len(PROMPTS))
    assert (distances > 0.01).all()  # the prompts do differ: the comparison says something


def test_the_identity_names_the_layers_and_knows_the_template(folder: Path, tmp_path: Path) -> None:
    identity = encoder_identity(_config(folder))
    assert identity.name == "mistral3-31x16, layers 10+20+30"
    assert (identity.max_tokens, identity.hidden_size) == (MAX_TOKENS, 48)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    template = copy / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert encoder_identity(_config(copy)).weights_sha256 != identity.weights_sha256


def test_unusable_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        build_encoder(_config(copy))
    settings = copy / "text_encoder" / "config.json"
    tree = json.loads(settings.read_text())
    tree["text_config"]["num_hidden_layers"] = 29
    settings.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="has 29 layers, FLUX.2 takes the states after layers 10"):
        encoder_identity(_config(copy))
