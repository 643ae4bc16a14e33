"""The small default teacher: fresh weights for pre-training, and its export."""

from __future__ import annotations

import copy

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn

from piflow.backbones.flux.backbone import FluxBackbone
from piflow.backbones.transformer import read_model_config
from piflow.config import ModelConfig
from piflow.storage.model_folder import LIBRARY_ERRORS, reason


def fresh_backbone(model: ModelConfig, seed: int) -> FluxBackbone:
    """A backbone of `model.path`'s configuration with random weights.

    Linear layers start Xavier-uniform with zero biases; adaptive norms and the output projection
    start at zero, so every block starts as the identity and the first prediction is zero (the
    initialisation of DiT, arXiv 2212.09748, section 3.2).

    Raises:
        ValueError: another family than FLUX, or a folder without its configuration.
    """
    return FluxBackbone(fresh_module(model, seed))


def fresh_module(model: ModelConfig, seed: int) -> FluxTransformer2DModel:
    if model.family != "flux":
        raise ValueError(
            f"pre-training from fresh weights is for model.family flux, got {model.family}: train "
            "the teacher elsewhere and give its folder to distillation"
        )
    config = read_model_config(model.path, FluxBackbone.class_name, model.path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = FluxTransformer2DModel.from_config(config)
        except LIBRARY_ERRORS as error:
            raise ValueError(
                f"{model.path}: config.json isn't that of a {FluxBackbone.class_name}: "
                f"{reason(error)}"
            ) from error
        for name, parameter in module.named_parameters():
            _initialise(name, parameter)
    return module


def _initialise(name: str, parameter: nn.Parameter) -> None:
    adaptive_norm = "norm" in name and ".linear." in name
    if parameter.ndim == 2 and not adaptive_norm and not name.startswith("proj_out"):
        nn.init.xavier_uniform_(parameter)
    elif parameter.ndim == 2 or name.endswith(".bias"):
        nn.init.zeros_(parameter)


def average_of(backbone: FluxBackbone) -> FluxBackbone:
    """A frozen copy that holds the EMA."""
    average = copy.deepcopy(backbone)
    average.module.requires_grad_(False)
    return average
