"""The typed recipe: the only home of defaults.

A recipe is one YAML file. Every key has its meaning and unit in the file of its section; unknown
keys are refused, and an error names the key, what came and what is allowed. Nothing heavy is
imported here, so mistakes surface before anything is started or rented.

Imports `piflow.storage` alone; a family's record is imported by the name that a recipe gives it.
"""

from piflow.config.conditions import ConditionSizes
from piflow.config.data import EmbedConfig
from piflow.config.encoder import (
    BertEncoderConfig,
    EncoderConfig,
    TextEncoderConfig,
)
from piflow.config.evaluation import (
    EvaluationConfig,
    NetworkConfig,
    NetworksConfig,
    OtherStudentConfig,
    PromptSetConfig,
)
from piflow.config.family import (
    BUILT_IN,
    Family,
    FamilyEncoder,
    Published,
    find_family,
    require_known,
)
from piflow.config.identity import differences, flatten
from piflow.config.model import Fp8TeacherConfig, LoRAConfig, ModelConfig
from piflow.config.objective import (
    DXPolicyConfig,
    FlowMatchingConfig,
    GMFlowPolicyConfig,
    GuidanceConfig,
    PiIDConfig,
    PolicyConfig,
)
from piflow.config.recipe import Recipe
from piflow.config.registry import Gate, RegistryConfig, parse_gate
from piflow.config.runtime import DeepSpeedConfig, PreflightConfig, RuntimeConfig
from piflow.config.section import RecipeError
from piflow.config.text import load_recipe, parse_recipe
from piflow.config.tracking import TrackingConfig
from piflow.config.training import (
    EMAConfig,
    OptimizerConfig,
    ParameterGroupConfig,
    TrainingConfig,
)
from piflow.config.video import Video

__all__ = [
    "BUILT_IN",
    "BertEncoderConfig",
    "ConditionSizes",
    "DXPolicyConfig",
    "DeepSpeedConfig",
    "EMAConfig",
    "EmbedConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "Family",
    "FamilyEncoder",
    "FlowMatchingConfig",
    "Fp8TeacherConfig",
    "GMFlowPolicyConfig",
    "Gate",
    "GuidanceConfig",
    "LoRAConfig",
    "ModelConfig",
    "NetworkConfig",
    "NetworksConfig",
    "OtherStudentConfig",
    "PromptSetConfig",
    "OptimizerConfig",
    "ParameterGroupConfig",
    "PiIDConfig",
    "PolicyConfig",
    "PreflightConfig",
    "Published",
    "Recipe",
    "RecipeError",
    "RegistryConfig",
    "RuntimeConfig",
    "TextEncoderConfig",
    "TrackingConfig",
    "TrainingConfig",
    "Video",
    "differences",
    "find_family",
    "flatten",
    "load_recipe",
    "parse_gate",
    "parse_recipe",
    "require_known",
]
