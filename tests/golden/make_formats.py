"""Makes `formats`: a run, stores, a checkpoint and adapters as today's version writes them.

They are there so that a later version can prove that it reads them. What is committed was
written by version 0.1.0, before recipes had a schema version; this is its script, with today's
names. Run it with a version whose formats are to be kept, and not again after a change of
formats: a file that can't be read any more is what `tests/integration/test_formats.py` shall
find, which expects version 0.1.0's hashes. From the repository's root:

    PYTHONPATH=. python -m tests.golden.make_formats

Everything is made by the real commands, with Ray, on one CPU, in the folder `/runs`, which must not
be there yet and is removed at the end: some files hold absolute paths, and those shall say nothing
of the machine. It takes about two minutes.

    formats/recipes       the shipped recipes of then
    formats/gm            FLUX on pixels with a BERT encoder; Gaussian-mixture policy, from noise;
                          two picture sizes, classifier-free guidance with a negative prompt.
                          Embedded, distilled to step 2 of 4, exported in bfloat16. The run's folder
                          also has what was kept for an MLflow server that was away; the SQLite
                          file of MLflow, whose format isn't piflow's, is left out.
    formats/pictures      FLUX with VAE, T5 and CLIP; a store with pictures' latents; two DX
                          adapters, grid (in float32) and polynomial (in float16)
    formats/expected.*    what this version makes of all that
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from piflow.commands import distill, embed, export
from piflow.config import Recipe, load_recipe
from piflow.data.reader import EmbeddingStore
from piflow.runs import folder as run_folder
from piflow.runs.tracking import MlflowTracker
from piflow.runtime.session import ray_session
from piflow.testing.models import save_model
from piflow.training.checkpoint import load_state
from tests.golden import format_results as results

REPOSITORY = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "formats"
COUNT = 2  # pictures that are drawn
NO_SERVER = "http://127.0.0.1:9"  # nobody listens there

GM = """\
name: golden-gm
seed: 3
run_dir: run
model:
  path: model/transformer
encoder:
  path: model/encoder
  max_tokens: 12
embed:
  prompts: prompts.txt
  store: store
  height: 16
  width: 16
  buckets: [[16, 16], [8, 16]]
  rows_per_shard: 6
  rows_per_group: 2
  batch_size: 4
guidance:
  scale: 3.0
  negative_prompt: blurry
policy:
  num_gaussians: 2
  logstd_inner_dim: 8
objective:
  type: pi_id
  nfe: 2
  shift: 2.0
  total_substeps: 32
  num_intermediate_states: 2
  num_decay_iters: 6
lora:
  rank: 2
  dropout: 0.1
  targets: [attn.to_q, attn.to_out.0, proj_mlp, timestep_embedder.linear_1]
training:
  steps: 4
  batch_size: 4
  micro_batch_size: 2
  checkpoint_every: 2
  log_every: 1
  optimizer:
    lr: 1.0e-3
    weight_decay: 0.01
    warmup_steps: 1
    groups:
      - {match: "proj_out_*", lr_scale: 0.5}
  ema:
    gamma: 0.5              # an average that remembers the steps before the checkpoint
    start: 0
runtime:
  max_failures: 0
"""

PICTURES = """\
name: golden-pictures
seed: 4
run_dir: run-grid
model:
  path: model/transformer
  codec: vae
encoder:
  type: flux
  path: model
  max_tokens: 12
  padding: drop
embed:
  prompts: prompts.jsonl
  image_column: image
  store: store
  height: 16
  width: 16
  dtype: bf16
  rows_per_shard: 4
  rows_per_group: 2
  batch_size: 4
guidance:
  embedded: 3.5
policy:
  type: dx
  num_points: 3
objective:
  type: pi_id
  data: dependent
  pictures: store
  nfe: 2
  shift: 3.2
  total_substeps: 32
  num_intermediate_states: 2
  num_decay_iters: 6
lora:
  rank: 2
  dropout: 0.1
  targets: [attn.to_q, proj_mlp]
training:
  steps: 2
  batch_size: 4
  micro_batch_size: 2
  log_every: 1
  optimizer:
    lr: 1.0e-3
    warmup_steps: 1
  ema:
    start: 0
runtime:
  max_failures: 0
"""
POLYNOMIAL = ["policy.mode=polynomial", "run_dir=run-polynomial"]
WORDS = ["a red heart", "blue fish", "green apple", "cat", "old owl", "a moon", "two stars", "sun"]


def main() -> None:
    root = Path(results.ROOT)
    root.mkdir()  # refused if it is there
    expected: dict[str, Any] = {
        "made_with": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "peft")
        },
    }
    tensors: dict[str, Tensor] = {}
    try:
        shutil.rmtree(GOLDEN, ignore_errors=True)
        expected["recipes"] = _recipes()
        with ray_session(_written(root / "gm", GM)):
            expected["gm"] = _gm(root / "gm", tensors)
            expected["pictures"] = _pictures(root / "pictures", tensors)
    finally:
        os.chdir(REPOSITORY)
        shutil.rmtree(root)
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, GOLDEN / "expected.safetensors")


def _recipes() -> dict[str, str]:
    """Copies the shipped recipes; their hashes by name."""
    shipped = sorted((REPOSITORY / "pipelines" / "recipes").glob("*.yaml"))
    (GOLDEN / "recipes").mkdir(parents=True)
    for path in shipped:
        shutil.copy(path, GOLDEN / "recipes")
    return {path.stem: load_recipe(path).hash() for path in shipped}


def _written(folder: Path, text: str) -> Recipe:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml")


def _gm(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The run that was stopped; returns what is expected of it."""
    recipe = _written(folder, GM)
    os.chdir(folder)
    save_model(Path("model"), recipe.model, recipe.encoder, size=16, seed=1)
    Path("prompts.txt").write_text("".join(f"{prompt}\n" for prompt in WORDS))
    manifest = embed.main(recipe, show_progress=False)
    stopped = load_recipe("recipe.yaml", [f"training.steps={results.STOPPED_AT}"])
    distill.main(stopped, show_progress=False)
    export.main(recipe)
    record = run_folder.read_record("run")
    assert record is not None
    _keep_for_later(record.mlflow_run_id)
    state = load_state(Path(run_folder.newest_checkpoint("run")))
    tensors |= _tensors("gm", {"adapter": "run/adapter"}, "model/encoder")
    _keep(folder)
    trained = results.train(recipe)
    tensors |= {f"gm.{name}": tensor for name, tensor in trained.weights.items()}
    return {
        "recipe_hash": recipe.hash(),
        "identity": recipe.identity(),
        "mlflow_run_id": record.mlflow_run_id,
        "checkpoint": {"step": state.step, "samples": state.samples, "loss": state.loss},
        "losses": trained.losses,
        "prompt_ids": trained.prompt_ids,
        **_store(manifest.inputs_sha256),
    }


def _keep_for_later(run_id: str) -> None:
    """What a run leaves in its folder when it ends while the MLflow server is away."""
    tracker = MlflowTracker(NO_SERVER, run_id, "run")
    tracker.log_metrics({"kept_while_away": 0.5}, step=results.STOPPED_AT)
    tracker.event("kept", "while the server was away")
    assert tracker.close() is not None


def _pictures(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The store with latents, and the two adapters."""
    recipe = _written(folder, PICTURES)
    os.chdir(folder)
    save_model(Path("model"), recipe.model, recipe.encoder, size=16, guidance_embeds=True, seed=2)
    rows = [{"prompt": prompt, "image": f"{n}.png"} for n, prompt in enumerate(WORDS)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, row in enumerate(rows):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(row["image"])
    manifest = embed.main(recipe, show_progress=False)
    trained = results.train(load_recipe("recipe.yaml", results.GENTLE))  # no run yet: from step 0
    polynomial = load_recipe("recipe.yaml", POLYNOMIAL)
    distill.main(recipe, show_progress=False)
    export.main(recipe, out="grid", dtype="float32")
    distill.main(polynomial, show_progress=False)
    export.main(polynomial, out="polynomial", dtype="float16")
    tensors |= _tensors("pictures", {"grid": "grid", "polynomial": "polynomial"}, "model")
    noise = tensors["pictures.noise"]
    for adapter in ("grid", "polynomial"):
        pictures = results.draw_by_pipeline(adapter, "model", noise)
        tensors[f"pictures.{adapter}.pipeline"] = pictures
    _keep(folder)
    return {
        "recipe_hash": recipe.hash(),
        "losses": trained.losses,
        "prompt_ids": trained.prompt_ids,
        **_store(manifest.inputs_sha256),
    }


def _store(inputs_sha256: str) -> dict[str, Any]:
    return {
        "manifest_hash": EmbeddingStore.open("store").manifest_hash,
        "inputs_sha256": inputs_sha256,
    }


def _tensors(name: str, adapters: dict[str, str], encoder: str) -> dict[str, Tensor]:
    """Of the store, the encoder and the adapters in the working directory."""
    found = {f"{name}.store.{key}": value for key, value in results.decoded("store").items()}
    first = next(iter(adapters.values()))
    settings = results.student_settings(first, "model/transformer", encoder)
    cond = results.text_conditioning(settings)
    found |= {f"{name}.encoder.tokens": cond.tokens, f"{name}.encoder.num_tokens": cond.num_tokens}
    if cond.pooled is not None:
        found[f"{name}.encoder.pooled"] = cond.pooled
    noise = found[f"{name}.noise"] = results.noise_of(settings, COUNT)
    for key, folder in adapters.items():
        drawn = results.draw(folder, "model/transformer", "store", noise)
        found |= {f"{name}.{key}.{what}": value for what, value in drawn.items()}
    return found


def _keep(folder: Path) -> None:
    """Copy what is committed: no MLflow files, and no run folder where only adapters are kept."""
    ignored = shutil.ignore_patterns("mlflow.db*", "mlartifacts", "run-*")
    shutil.copytree(folder, GOLDEN / folder.name, ignore=ignored)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
