"""Shipped recipes of earlier versions, as today's files with other values."""

from __future__ import annotations


def values_of_then(name: str) -> list[str]:
    """Overrides that bring a shipped recipe to what version 0.1.0 shipped under its name.

    They are what whoever goes on with such a run writes, since the recipe has taken over published
    values that change results.
    """
    values = ["schema_version=1"]
    if not name.startswith(("flux1-dev", "qwen-image", "imagenet")):
        return values
    values.append("training.optimizer.warmup_start=null")
    if name.startswith("imagenet"):
        values += ["training.optimizer.warmup_steps=100", "training.optimizer.type=adamw"]
        if name == "imagenet-dit-gm-2nfe":
            path = "models/DiT-flow-256/transformer"
            values += [f"model.path={path}", "guidance.scale=2.7", "guidance.interval=[0.0, 0.6]"]
        return values
    if name.startswith("qwen-image"):
        values.append('guidance.negative_prompt=" "')
    values += ["lora.init=kaiming", "training.batch_size=256"]
    return values if name.endswith("-datafree") else [*values, "embed.latent_values=mean"]
