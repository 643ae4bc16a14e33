"""How small the embeddings of the default recipe's prompts are."""

from __future__ import annotations

from pathlib import Path

from piflow.backbones.encoders import build_encoder
from piflow.config import load_recipe
from piflow.data.layout import empty_prompt_plan, recipe_prompts, store_layout
from piflow.data.manifest import StoreManifest
from piflow.data.prompts import PromptSet
from piflow.data.writer import write_shard

RECIPE = Path(__file__).parents[3] / "pipelines" / "recipes" / "emoji-flux.yaml"
EVERY = 32  # prompts of which one is encoded: what a file has of its own then weighs more, not less


def test_default_prompts_take_a_quarter_of_padded_fp8_at_most(tmp_path: Path) -> None:
    """Against 512 tokens of one byte a number; the manifest's figure is that of the files."""
    recipe = load_recipe(RECIPE)
    prompts = recipe_prompts(recipe).prompts[::EVERY]
    encoder = build_encoder(recipe.encoder)
    layout = store_layout(recipe, PromptSet(prompts, 0), encoder.identity)
    [plan] = layout.shards
    entries = [
        write_shard(str(tmp_path), part, encoder.encode([p.text for p in part.prompts]),
                    layout.inputs)[0]
        for part in (plan, empty_prompt_plan())
    ]  # fmt: skip
    manifest = StoreManifest(
        inputs=layout.inputs, inputs_sha256=layout.inputs.digest, buckets=layout.buckets,
        shards=(entries[0],), empty_prompt=entries[1], truncated_prompts=0,
    )  # fmt: skip
    padded = len(prompts) * 512 * encoder.identity.hidden_size
    assert manifest.times_smaller == padded / (tmp_path / plan.path).stat().st_size
    assert manifest.times_smaller >= 4
