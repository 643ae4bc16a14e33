"""Tiny backbones with inputs, and an embedding store, shared by the model tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]  # scripts of ranks import tests


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
    """A family's name -> a fresh tiny backbone, the same at every call, and its inputs.

    Inputs: latents (3, C, H, W), sigma (3,), Conditioning of three prompts.
    """
    import torch
    from diffusers import (
        DiTTransformer2DModel,
        Flux2Transformer2DModel,
        FluxTransformer2DModel,
        QwenImageTransformer2DModel,
        SD3Transformer2DModel,
    )

    from piflow.backbones import (
        Conditioning,
        DiTBackbone,
        Flux2Backbone,
        FluxBackbone,
        QwenImageBackbone,
        SD3Backbone,
    )

    size: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2}
    text: dict[str, Any] = {"joint_attention_dim": 6, "axes_dims_rope": (2, 2, 4)}

    def build(family: str) -> tuple[Any, Any, tuple[int, int]]:
        if family == "flux":
            flux = FluxTransformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=1, pooled_projection_dim=5,
                **size, **text,
            )  # fmt: skip
            cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4), torch.randn(3, 5))
            return FluxBackbone(flux.eval()), cond, (4, 8)
        if family == "qwen_image":
            qwen = QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, num_layers=2, **size, **text
            )
            cond = Conditioning(torch.randn(3, 5, 6), torch.tensor([5, 1, 3]))
            return QwenImageBackbone(qwen.eval()), cond, (4, 8)
        if family == "flux2":
            flux2 = Flux2Transformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=6,
                timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
                **size,
            )  # fmt: skip
            cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4))
            return Flux2Backbone(flux2.eval()), cond, (4, 8)
        if family == "sd3":
            sd3 = SD3Transformer2DModel(
                in_channels=4, out_channels=4, num_layers=2, sample_size=8, joint_attention_dim=6,
                caption_projection_dim=16, pooled_projection_dim=5, pos_embed_max_size=8, **size,
            )  # fmt: skip
            cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4), torch.randn(3, 5))
            return SD3Backbone(sd3.eval()), cond, (4, 8)
        dit = DiTTransformer2DModel(
            in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10, **size
        )
        classes = torch.tensor([[0.0], [7.0], [10.0]])
        cond = Conditioning(torch.zeros(3, 1, 1), torch.ones(3, dtype=torch.long), classes)
        return DiTBackbone(dit.eval()), cond, (8, 8)

    def case(family: str) -> tuple[Any, tuple[Any, Any, Any]]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone, cond, (height, width) = build(family)
            x = torch.randn(3, backbone.latent_channels, height, width)
        return backbone, (x, torch.tensor([1.0, 0.6, 0.2]), cond)

    return case


@pytest.fixture(scope="session")
def make_flux_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(prompts, height, width, negative prompts) -> a store that fits the tiny FLUX."""
    import torch

    from piflow.data import store
    from piflow.data.prompts import Prompt, PromptSet

    def encoded(generator: torch.Generator) -> store.EncodedPrompt:
        tokens = torch.randn(3, 6, generator=generator)
        return store.EncodedPrompt(tokens, torch.randn(5, generator=generator), False)

    def build(
        names: Sequence[str], height: int, width: int, negatives: Sequence[str] = ()
    ) -> store.EmbeddingStore:
        uri = str(tmp_path_factory.mktemp("store"))
        prompts = tuple(Prompt(name, height, width) for name in names)
        inputs = store.StoreInputs(
            schema_version=store.SCHEMA_VERSION,
            encoder=store.EncoderIdentity(
                name="made-up", weights_sha256="0" * 64, max_tokens=4, hidden_size=6
            ),
            dtype="bf16",
            rows_per_shard=5,
            rows_per_group=2,
            num_prompts=len(prompts),
            prompts_sha256=PromptSet(prompts, 0).digest,
        )
        buckets, plans = store.plan_store(prompts, 5, 2)
        generator = torch.Generator().manual_seed(0)
        extra = [store.empty_prompt_plan(), *map(store.negative_prompt_plan, negatives)]
        entries = [
            store.write_shard(uri, plan, [encoded(generator) for _ in plan.prompts], inputs)[0]
            for plan in [*plans, *extra]
        ]
        shards, (empty, *negative) = entries[: len(plans)], entries[len(plans) :]
        manifest = store.StoreManifest(
            inputs=inputs,
            inputs_sha256=inputs.digest,
            buckets=buckets,
            shards=tuple(shards),
            empty_prompt=empty,
            negative_prompts=tuple(negative),
            truncated_prompts=0,
        )
        store.write_manifest(uri, manifest)
        return store.EmbeddingStore.open(uri)

    return build


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """(script, folder, world_size) -> runs `script folder RANK WORLD_SIZE`; all must succeed."""

    def run(script: Path, folder: Path, world_size: int = 2) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(folder), str(rank), str(world_size)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        try:
            outputs = [process.communicate(timeout=120)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * world_size, "\n".join(outputs)

    return run
