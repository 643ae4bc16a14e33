"""The typed recipe: the only home of defaults.

A recipe is one YAML file. Every key has its meaning and unit in the file of its section; unknown
keys are refused, and an error names the key, what came and what is allowed. Nothing heavy is
imported here, so mistakes surface before anything is started or rented.

Imports `piflow.storage` alone.
"""

from piflow.config.data import EmbedConfig
from piflow.config.identity import differences, flatten
from piflow.config.model import (
    BertEncoderConfig,
    ClassLabelEncoderConfig,
    EncoderConfig,
    Flux2EncoderConfig,
    FluxEncoderConfig,
    Fp8TeacherConfig,
    LoRAConfig,
    ModelConfig,
    QwenImageEncoderConfig,
    SD3EncoderConfig,
)
from piflow.config.objective import (
    DXPolicyConfig,
    FlowMatchingConfig,
    GMFlowPolicyConfig,
    GuidanceConfig,
    PiIDConfig,
    PolicyConfig,
)
from piflow.config.recipe import Recipe
from piflow.config.runtime import DeepSpeedConfig, RuntimeConfig
from piflow.config.section import RecipeError
from piflow.config.text import load_recipe, parse_recipe
from piflow.config.tracking import EvaluationConfig, TrackingConfig
from piflow.config.training import (
    EMAConfig,
    OptimizerConfig,
    ParameterGroupConfig,
    TrainingConfig,
)

__all__ = [
    "BertEncoderConfig",
    "ClassLabelEncoderConfig",
    "DXPolicyConfig",
    "DeepSpeedConfig",
    "EMAConfig",
    "EmbedConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "FlowMatchingConfig",
    "Flux2EncoderConfig",
    "FluxEncoderConfig",
    "Fp8TeacherConfig",
    "GMFlowPolicyConfig",
    "GuidanceConfig",
    "LoRAConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParameterGroupConfig",
    "PiIDConfig",
    "PolicyConfig",
    "QwenImageEncoderConfig",
    "Recipe",
    "RecipeError",
    "RuntimeConfig",
    "SD3EncoderConfig",
    "TrackingConfig",
    "TrainingConfig",
    "differences",
    "flatten",
    "load_recipe",
    "parse_recipe",
]
