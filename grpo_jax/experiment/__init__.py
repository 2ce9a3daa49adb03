"""What an experiment is: frozen dataclasses, loading one from a Python file, and typed overrides.

An experiment file exports `config = Experiment(...)`. Nothing here imports JAX, so a file loads at once and a typing
error in it costs nothing. Every value is checked against its annotation when the dataclass is made, so a config that
loads is a config whose fields have the types and ranges that they claim.
"""

from grpo_jax.experiment.ablation import Ablation, Budget, PlannedRun
from grpo_jax.experiment.configs import (
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    LoRAConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    SamplingConfig,
    ScratchConfig,
)
from grpo_jax.experiment.experiment import Experiment
from grpo_jax.experiment.files import (
    NotWhileLoading,
    all_overrides,
    code_folder,
    code_of,
    info_at,
    load,
    load_ablation,
    load_by_config,
    load_run,
    read_config,
    read_run,
    run_file,
    source_of,
)
from grpo_jax.experiment.methods import (
    AdvantageConfig,
    DPOConfig,
    LossConfig,
    PPOConfig,
    PreferenceConfig,
    RewardModelConfig,
    RFTConfig,
    SFTConfig,
)
from grpo_jax.experiment.overrides import override, parse_overrides, variant_of
from grpo_jax.experiment.recorded import to_dict
from grpo_jax.experiment.requirements import METHODS, Method, group_parts, method_of

__all__ = [
    "METHODS",
    "Ablation",
    "AdvantageConfig",
    "Budget",
    "CheckpointConfig",
    "DPOConfig",
    "EvaluationConfig",
    "Experiment",
    "GuardConfig",
    "LoRAConfig",
    "LossConfig",
    "Method",
    "NotWhileLoading",
    "OptimizerConfig",
    "PPOConfig",
    "PlannedRun",
    "PolicyConfig",
    "PreferenceConfig",
    "RFTConfig",
    "RewardConfig",
    "RewardModelConfig",
    "SFTConfig",
    "SamplingConfig",
    "ScratchConfig",
    "all_overrides",
    "code_folder",
    "code_of",
    "group_parts",
    "info_at",
    "load",
    "load_ablation",
    "load_by_config",
    "load_run",
    "method_of",
    "override",
    "parse_overrides",
    "read_config",
    "read_run",
    "run_file",
    "source_of",
    "to_dict",
    "variant_of",
]
