"""Makes losses.npz: what TRL's own code says of losses, gradients, metrics and advantages on small random inputs.

    python tests/golden/make_losses.py [OUT.npz SEED]   # needs torch and trl, which nothing else here does; trl 1.16.0

`GRPOTrainer._compute_loss` runs on a stand-in for the trainer that has the attributes which it reads and hands it
given log-probabilities. The advantages, and the correction for a sampler that differs, are each an `if` in the midst of
`_generate_and_score_completions`, which is cut out and run. No formula is written here.
"""

import ast
import inspect
import itertools
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.rewards import get_soft_overlong_punishment
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer

B, T = 6, 7
METRICS = (
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
)
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
DEFAULTS = dict(  # of LossConfig; all but loss_type, use_bias_correction_kl and dr_grpo_length are TRL's too
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    importance_sampling_level="token",
    beta=0.0,
    use_bias_correction_kl=False,
    entropy_coef=0.0,
    top_entropy_quantile=1.0,
    dr_grpo_length=None,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
    importance_sampling_mode=None,
    importance_sampling_clip_max=3.0,
    importance_sampling_clip_min=None,
)
WEIGHTS = (1.0, 0.5, 2.0)  # of three reward functions
SEQUENCE = dict(importance_sampling_level="sequence")


def options_of(loss_type: str) -> list[dict[str, Any]]:
    """The combinations of options that a loss is tried with; what it does not read is not among them."""
    sums = dict(dr_grpo_length=9) if loss_type == "dr_grpo" else {}
    options: list[dict[str, Any]] = [
        {},
        dict(beta=0.04),
        dict(beta=0.04, use_bias_correction_kl=True),
        dict(entropy_coef=0.01),
        dict(top_entropy_quantile=0.5, beta=0.04),
        dict(top_entropy_quantile=0.2, entropy_coef=0.01),
        dict(top_entropy_quantile=0.0),
        dict(importance_sampling_mode="token_truncate", importance_sampling_clip_max=1.2, beta=0.04),
        dict(importance_sampling_mode="token_mask", importance_sampling_clip_max=1.3, importance_sampling_clip_min=0.8),
    ]
    if loss_type != "vespo":
        options += [
            SEQUENCE,
            SEQUENCE | dict(beta=0.04, use_bias_correction_kl=True, top_entropy_quantile=0.5),
            dict(importance_sampling_mode="sequence_mask", importance_sampling_clip_max=1.1),
            dict(importance_sampling_mode="sequence_truncate", importance_sampling_clip_min=0.9) | SEQUENCE,
        ]
    if loss_type in CLIPPED:
        options += [
            dict(epsilon_high=0.28),
            dict(epsilon=0.1, delta=1.5),
            dict(delta=1.1),
            SEQUENCE | dict(epsilon=0.003, epsilon_high=0.004),
            SEQUENCE | dict(epsilon=0.01, delta=1.05),
        ]
    if loss_type == "cispo":
        options += [dict(epsilon_high=5.0), dict(epsilon=1.0), dict(epsilon_high=1.2) | SEQUENCE]
    if loss_type == "sapo":
        options += [dict(sapo_temperature_pos=3.0, sapo_temperature_neg=5.0)]
    if loss_type == "vespo":
        options += [dict(vespo_k_pos=1.0, vespo_lambda_pos=0.5, vespo_k_neg=1.5, vespo_lambda_neg=4.0)]
    return [dict(loss_type=loss_type) | sums | chosen for chosen in options]


def inputs(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (B, T))
    signs = {"mixed": rng.normal(size=B), "positive": rng.uniform(0.1, 2, B), "negative": -rng.uniform(0.1, 2, B)}
    ragged = np.arange(T) < np.array([7, 1, 4, 0, 6, 3])[:, None]  # the fourth completion has nothing to train on
    turns = rng.random((B, T)) < 0.6  # an environment speaks in between
    return dict(
        logprobs=logprobs,
        old_logprobs=logprobs + rng.normal(0, 0.3, (B, T)),
        ref_logprobs=logprobs + rng.normal(0, 0.5, (B, T)),
        sampler_logprobs=logprobs + rng.normal(0, 0.3, (B, T)),
        entropy=rng.uniform(0, 2, (B, T)),
        **{f"mask/{name}": mask for name, mask in {"ragged": ragged, "turns": turns}.items()},
        **{f"advantages/{name}": advantages for name, advantages in signs.items()},
    )


def trl_loss(
    arrays: dict[str, np.ndarray], config: dict[str, Any], mask: str, advantages: str
) -> tuple[float, np.ndarray, np.ndarray, list[float]]:
    """TRL's loss, its gradients with respect to the log-probabilities and the entropy, and its metrics."""
    config = DEFAULTS | config
    a = {name: torch.tensor(array.astype(np.float32)) for name, array in arrays.items()}
    logprobs, entropy = a["logprobs"].requires_grad_(), a["entropy"].requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        get_high_entropy_mask=lambda *arguments: GRPOTrainer.get_high_entropy_mask(trainer, *arguments),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=False,
            gather=lambda x: x,
            pad_across_processes=lambda x, **_: x,
            reduce=lambda x, reduction: x,
        ),
        args=SimpleNamespace(steps_per_generation=1, **config),
        loss_type=config["loss_type"],
        beta=config["beta"],
        epsilon_low=config["epsilon"],
        epsilon_high=config["epsilon"] if config["epsilon_high"] is None else config["epsilon_high"],
        entropy_coef=config["entropy_coef"],
        _entropy_bonus_enabled=config["entropy_coef"] != 0,
        use_adaptive_entropy=False,
        max_completion_length=config["dr_grpo_length"],
        current_gradient_accumulation_steps=1,
        importance_sampling_level=config["importance_sampling_level"],
        top_entropy_quantile=config["top_entropy_quantile"],
        off_policy_mask_threshold=None,
        use_vllm=config["importance_sampling_mode"] is not None,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    completion_mask = a[f"mask/{mask}"]
    ids = torch.zeros((B, T), dtype=torch.long)
    correction = (
        {}
        if not trainer.use_vllm
        else dict(
            importance_sampling_ratio=trl_correction(a["old_logprobs"], a["sampler_logprobs"], completion_mask, config)
        )
    )
    value = GRPOTrainer._compute_loss(
        trainer,
        None,
        dict(
            prompt_ids=ids[:, :1],
            prompt_mask=ids[:, :1],
            completion_ids=ids,
            completion_mask=completion_mask,
            advantages=a[f"advantages/{advantages}"],
            old_per_token_logps=a["old_logprobs"],
            ref_per_token_logps=a["ref_logprobs"],
            num_items_in_batch=completion_mask.sum(),
            **correction,
        ),
    )
    gradients = torch.autograd.grad(value, (logprobs, entropy), materialize_grads=True)
    metrics = [trainer._metrics["train"].get(name, [np.nan])[0] for name in METRICS]
    return value.item(), gradients[0].numpy(), gradients[1].numpy(), metrics


def run_branch(test: str, containing: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs the `if` of `_generate_and_score_completions` with this condition and content; returns its variables."""
    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    (branch,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and ast.unparse(node.test) == test and containing in ast.unparse(node)
    ]
    names = vars(grpo_trainer) | names
    exec(compile(ast.Module([branch], []), "trl", "exec"), names)
    return names


def trl_correction(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, mask: torch.Tensor, config: dict[str, Any]
) -> torch.Tensor:
    """TRL's weights for a sampler that differs from the trainer, shape [B, T] or [B, 1]."""
    return run_branch(
        "self.use_vllm and self.vllm_importance_sampling_correction",
        "torch.exp(logps_diff)",
        dict(
            self=SimpleNamespace(
                use_vllm=True,
                vllm_importance_sampling_correction=True,
                **{f"vllm_{name}": config[name] for name in config if name.startswith("importance_sampling_")},
            ),
            old_per_token_logps=old_logprobs,
            sampling_per_token_logps=sampler_logprobs,
            completion_mask=mask,
            tool_mask=None,
        ),
    )["vllm_importance_sampling_ratio"]


def trl_advantages(per_function: np.ndarray, scale: str, aggregation: str, weights: tuple[float, ...]) -> np.ndarray:
    """TRL's advantages of rewards [P, G, functions]; NaN is what it makes of what a function could not score."""
    shape = per_function.shape
    rewards = torch.tensor(per_function.reshape(-1, shape[-1]), dtype=torch.float64)
    names = dict(
        self=SimpleNamespace(
            multi_objective_aggregation=aggregation,
            scale_rewards=scale,
            reward_weights=torch.tensor(weights, dtype=torch.float64),
            reward_funcs=weights,
        ),
        rewards_per_func=rewards,
        unscorable_mask=torch.isnan(rewards).all(dim=1),
        num_generations=shape[1],
        device="cpu",
    )
    advantages = run_branch("self.multi_objective_aggregation == 'sum_then_normalize'", "advantages", names)[
        "advantages"
    ]
    return torch.nan_to_num(advantages, nan=0.0).reshape(shape[:2]).numpy()


def main(path: Path, seed: int) -> None:
    arrays = inputs(seed)
    cases = [
        (config, mask, advantages)
        for loss_type in (*CLIPPED, "cispo", "sapo", "vespo")
        for config in options_of(loss_type)
        for mask, advantages in itertools.product(("ragged", "turns"), ("mixed", "positive", "negative"))
    ]
    losses, gradients, entropy_gradients, metrics = zip(*(trl_loss(arrays, *case) for case in cases), strict=True)
    rng = np.random.default_rng(1)
    rewards = np.round(rng.uniform(0, 1, (5, 8)), 1)
    rewards[1] = 0.8
    rewards[2:4][rng.random((2, 8)) < 0.3] = np.nan
    several = 1e4 * rng.normal(size=(4, 8, 3))  # so large that the 1e-4 which TRL adds to their spread is nothing
    several[1, :, 0] = several[1, 0, 0]
    np.savez_compressed(
        path,
        trl_version=trl.__version__,
        cases=np.array([json.dumps(case) for case in cases]),
        metric_names=np.array(METRICS),
        loss=np.float32(losses),
        gradient=np.float32(gradients),
        entropy_gradient=np.float32(entropy_gradients),
        metrics=np.float32(metrics),
        rewards=rewards,
        **{
            f"advantages_by_scale/{scale}": trl_advantages(rewards[..., None], scale, "sum_then_normalize", (1.0,))
            for scale in ("group", "batch", "none")
        },
        several_rewards=several,
        reward_weights=np.array(WEIGHTS),
        normalize_then_sum=trl_advantages(several, "group", "normalize_then_sum", WEIGHTS),
        overlong=get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=8)([[0] * n for n in range(25)]),
        **{f"inputs/{name}": array for name, array in arrays.items()},
    )
    print(f"{path}: {len(cases)} cases, {path.stat().st_size} bytes, trl {trl.__version__}")


if __name__ == "__main__":
    out, number = sys.argv[1:] or (Path(__file__).with_name("losses.npz"), 0)
    main(Path(out), int(number))
