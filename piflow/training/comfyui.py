"""An adapter as the one file that ComfyUI's π-Flow nodes (ComfyUI-piFlow) load beside a base.

They read the published adapter format: names with `lora` go to ComfyUI's LoRA loader, all others
replace the base's tensors by diffusers' names, a mixture's head is told by `proj_out_means` and
`proj_out_logweights` and measured by their shapes, and `policy_config` in the file's metadata says
what the policy is. There is no config.json.
"""

from __future__ import annotations

from typing import Any

from piflow import storage
from piflow.config import DXPolicyConfig, Recipe
from piflow.roles.adapter import WEIGHTS_FILE
from piflow.schedule import FewStep
from piflow.storage.scratch import scratch
from piflow.training.export import export_adapter

FAMILIES = ("flux", "flux2", "qwen_image")
_MODES = ("grid", "polynomial")


def require_readable(recipe: Recipe) -> None:
    """Refuses a student that the nodes can't hold; by the recipe alone.

    Raises:
        ValueError: says why, and what to export instead.
    """
    family, policy = recipe.model.family, recipe.policy
    reason = None
    if family not in FAMILIES:
        reason = f"they know {', '.join(FAMILIES)}, and model.family is {family}"
    elif recipe.lora is None:
        reason = "they load LoRA and head onto a base, and lora is null: all weights are trained"
    elif recipe.model.lora is not None:
        reason = "the base that they load has no model.lora, which this student needs"
    elif isinstance(policy, DXPolicyConfig) and policy.mode not in _MODES:
        reason = f"they know DX policies of mode {' or '.join(_MODES)}, not {policy.mode}"
    elif isinstance(policy, DXPolicyConfig) and family == "flux2":
        reason = "their FLUX.2 has no bias in its output layer, which a DX head needs"
    elif family == "flux" and recipe.guidance.embedded is None:
        reason = "their FLUX.1 takes an embedded guidance, and guidance.embedded isn't set"
    if reason is not None:
        raise ValueError(
            f"ComfyUI's π-Flow nodes can't hold this student: {reason}. Export it as adapter or "
            "merged, for piflow's own pipelines"
        )


def export_comfyui(recipe: Recipe, checkpoint: str, folder: str, **options: Any) -> str:
    """Write the adapter as one file.

    Args:
        folder: URI.
        options: of `export_adapter`.

    Returns:
        The file's URI; its name says recipe and steps.

    Raises:
        ValueError: as `require_readable` and `export_adapter`.
    """
    require_readable(recipe)
    steps = FewStep.of(recipe.distillation()).nfe
    target = storage.join(folder, f"{recipe.name}_{steps}step.safetensors")
    with scratch("comfyui") as own:
        export_adapter(recipe, checkpoint, str(own), **options)
        storage.copy_file(str(own / WEIGHTS_FILE), target)
    return target
