"""Fine-tune language models with GRPO in pure JAX, and know with confidence intervals whether the reward was any good.

    import grpo_jax as gj

    result = gj.train(gj.Experiment(task=…, rewards={…}), "runs/mine")
    gj.evaluate("runs/mine", num_prompts=500)
    gj.sample("runs/mine", "41 + 86", num_samples=4)
    gj.load_run("runs/mine").metrics

Each name is imported when it is first used (PEP 562), so that this takes no time and needs no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.api import evaluate, load_run, sample, train
    from grpo_jax.errors import RunError, UserError
    from grpo_jax.evaluation import Evaluation
    from grpo_jax.experiment import (
        Ablation,
        AdvantageConfig,
        CheckpointConfig,
        DPOConfig,
        EvaluationConfig,
        Experiment,
        GuardConfig,
        LoRAConfig,
        LossConfig,
        OptimizerConfig,
        PolicyConfig,
        PPOConfig,
        PreferenceConfig,
        RewardConfig,
        RewardModelConfig,
        RFTConfig,
        SamplingConfig,
        ScratchConfig,
        SFTConfig,
        load_ablation,
        override,
        recipes,
    )
    from grpo_jax.experiment import load as load_experiment
    from grpo_jax.policy import Policy
    from grpo_jax.runs.callbacks import Callback, EndEvent, EvaluationEvent, StartEvent, StepEvent, StopTraining
    from grpo_jax.runs.result import Result
    from grpo_jax.runs.run import Run
    from grpo_jax.runs.trackers import Trackio, Wandb
    from grpo_jax.tasks import Task

    __version__: str

__all__ = [
    "Ablation",
    "AdvantageConfig",
    "Callback",
    "CheckpointConfig",
    "DPOConfig",
    "EndEvent",
    "Evaluation",
    "EvaluationConfig",
    "EvaluationEvent",
    "Experiment",
    "GuardConfig",
    "LoRAConfig",
    "LossConfig",
    "OptimizerConfig",
    "PPOConfig",
    "Policy",
    "PolicyConfig",
    "PreferenceConfig",
    "RFTConfig",
    "Result",
    "RewardConfig",
    "RewardModelConfig",
    "Run",
    "RunError",
    "SFTConfig",
    "SamplingConfig",
    "ScratchConfig",
    "StartEvent",
    "StepEvent",
    "StopTraining",
    "Task",
    "Trackio",
    "UserError",
    "Wandb",
    "__version__",
    "evaluate",
    "load_ablation",
    "load_experiment",
    "load_run",
    "override",
    "recipes",
    "sample",
    "train",
]

# Where the names come from that are not in `grpo_jax.experiment`.
_HOMES = {
    "api": ("evaluate", "load_run", "sample", "train"),
    "errors": ("RunError", "UserError"),
    "evaluation": ("Evaluation",),
    "policy": ("Policy",),
    "runs.callbacks": ("Callback", "EndEvent", "EvaluationEvent", "StartEvent", "StepEvent", "StopTraining"),
    "runs.result": ("Result",),
    "runs.run": ("Run",),
    "runs.trackers": ("Trackio", "Wandb"),
    "tasks": ("Task",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("grpo_jax")
    if name not in __all__:
        raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")
    if name == "recipes":
        return import_module("grpo_jax.experiment.recipes")
    home = next((module for module, names in _HOMES.items() if name in names), "experiment")
    found = getattr(import_module(f"grpo_jax.{home}"), "load" if name == "load_experiment" else name)
    globals()[name] = found  # so that it is looked up once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
