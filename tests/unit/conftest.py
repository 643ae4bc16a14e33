"""Tiny backbones with inputs, and an embedding reader, shared by the model tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Hub, serve_hub

REPOSITORY = Path(__file__).parents[2]  # scripts of ranks import tests


ON_REQUEST = {
    "inductor": "compiles C++; only with -m inductor",
    "slow_runs": "trainings that take minutes; only with -m slow_runs",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in ON_REQUEST.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = [name for name in ON_REQUEST if name not in config.option.markexpr]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in names)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX folder for training on one and several processes."""
    from tests.unit.sharding.training import save_model

    folder = tmp_path_factory.mktemp("sharding")
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def flux_config() -> dict[str, Any]:
    return {
        "in_channels": 48,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 6,
        "pooled_projection_dim": 5,
        "axes_dims_rope": [2, 2, 4],
    }


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory, flux_config: dict[str, Any]) -> Path:
    import torch
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("flux")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(**flux_config)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def flux_inputs() -> tuple[Any, Any, Any]:
    """Latents (3, 12, 4, 8), sigma (3,), Conditioning of three prompts of 4 tokens."""
    import torch

    from piflow.backbones import Conditioning

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 12, 4, 8, generator=generator)
    sigma = torch.tensor([1.0, 0.6, 0.2])
    cond = Conditioning(
        torch.randn(3, 4, 6, generator=generator),
        torch.full((3,), 4),
        torch.randn(3, 5, generator=generator),
    )
    return x, sigma, cond


@pytest.fixture(scope="session")
def make_case() -> Callable[[str], tuple[Any, tuple[Any, Any, Any]]]:
    """`case`; a fixture, so that torch is imported by the tests that need it."""
    from tests.unit.models import case

    return case


@pytest.fixture(scope="session")
def make_flux_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(prompts, height, width, negative prompts) -> a store that fits the tiny FLUX."""
    import torch

    from piflow.backbones import text
    from piflow.data import layout, manifest, reader, writer
    from piflow.data.prompts import Prompt, PromptSet
    from piflow.storage import fingerprint

    def encoded(generator: torch.Generator) -> text.EncodedPrompt:
        tokens = torch.randn(3, 6, generator=generator)
        return text.EncodedPrompt(tokens, torch.randn(5, generator=generator), False)

    def build(
        names: Sequence[str], height: int, width: int, negatives: Sequence[str] = ()
    ) -> reader.EmbeddingStore:
        uri = str(tmp_path_factory.mktemp("store"))
        prompts = tuple(Prompt(name, height, width) for name in names)
        inputs = manifest.StoreInputs(
            schema_version=manifest.SCHEMA_VERSION,
            encoder=fingerprint.EncoderIdentity(
                name="made-up", weights_sha256="0" * 64, max_tokens=4, hidden_size=6
            ),
            dtype="bf16",
            rows_per_shard=5,
            rows_per_group=2,
            num_prompts=len(prompts),
            prompts_sha256=PromptSet(prompts, 0).digest,
        )
        buckets, plans = layout.plan_store(prompts, 5, 2)
        generator = torch.Generator().manual_seed(0)
        extra = [layout.empty_prompt_plan(), *map(layout.negative_prompt_plan, negatives)]
        entries = [
            writer.write_shard(uri, plan, [encoded(generator) for _ in plan.prompts], inputs)[0]
            for plan in [*plans, *extra]
        ]
        shards, (empty, *negative) = entries[: len(plans)], entries[len(plans) :]
        made = manifest.StoreManifest(
            inputs=inputs,
            inputs_sha256=inputs.digest,
            buckets=buckets,
            shards=tuple(shards),
            empty_prompt=empty,
            negative_prompts=tuple(negative),
            truncated_prompts=0,
        )
        manifest.write_manifest(uri, made)
        return reader.EmbeddingStore.open(uri)

    return build


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Runs `script folder RANK WORLD_SIZE *arguments` in that many processes; all must succeed."""

    def run(
        script: Path,
        folder: Path,
        world_size: int = 2,
        *arguments: str,
        timeout: float = 400,
        **variables: str,
    ) -> None:
        known = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(folder), str(rank), str(world_size), *arguments],
                env={**os.environ, **known, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        print(outputs[0])  # shown where a test fails
        assert [process.returncode for process in processes] == [0] * world_size, "\n".join(outputs)

    return run


@pytest.fixture
def hub(tmp_path: Path, flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A model with a transformer and a dataset; the client has an empty cache and no token."""
    from huggingface_hub import HfFileSystem, constants

    model, data = tmp_path / "model", tmp_path / "data"
    (model / "vae").mkdir(parents=True)
    (model / "vae/config.json").write_text("{}")
    shutil.copytree(flux_folder, model / "transformer")
    (data / "data").mkdir(parents=True)
    (data / "data/a.txt").write_text("a red heart\n")
    (data / "data/b.txt").write_text("a blue one\n")
    with serve_hub({"models/lab/flux": model, "datasets/lab/prompts": data}) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served
        HfFileSystem.clear_instance_cache()
