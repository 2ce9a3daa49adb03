"""Makes losses.npz: what TRL's own code says of losses, gradients, metrics and advantages on small random inputs.

    python tests/golden/make_losses.py        # needs torch and trl, which nothing else here does; made with trl 1.16.0

`GRPOTrainer._compute_loss` runs on a stand-in for the trainer that has the attributes which it reads and hands it
given log-probabilities. The advantages are an `if` in the midst of `_generate_and_score_completions`, which is cut out
and run. No formula is written here.
"""

import ast
import inspect
import itertools
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer

B, T = 6, 7
MAX_COMPLETION_LENGTH = 9
METRICS = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(1.0, (B, T))
    signs = {"mixed": rng.normal(size=B), "positive": rng.uniform(0.1, 2, B), "negative": -rng.uniform(0.1, 2, B)}
    ragged = np.arange(T) < np.array([7, 1, 4, 0, 6, 3])[:, None]  # the fourth completion has nothing to train on
    turns = rng.random((B, T)) < 0.6  # an environment speaks in between
    return dict(
        logprobs=logprobs,
        old_logprobs=logprobs + rng.normal(0, 0.3, (B, T)),
        ref_logprobs=logprobs + rng.normal(0, 0.5, (B, T)),
        entropy=rng.uniform(0, 2, (B, T)),
        **{f"mask/{name}": mask for name, mask in {"ragged": ragged, "turns": turns}.items()},
        **{f"advantages/{name}": advantages for name, advantages in signs.items()},
    )


def trl_loss(
    arrays: dict[str, np.ndarray],
    loss_type: str,
    beta: float,
    epsilon_high: float,
    entropy_coefficient: float,
    mask: str,
    advantages: str,
) -> tuple[float, np.ndarray, np.ndarray, list[float]]:
    """TRL's loss, its gradients with respect to the log-probabilities and the entropy, and its metrics."""
    a = {name: torch.tensor(array.astype(np.float32)) for name, array in arrays.items()}
    logprobs, entropy = a["logprobs"].requires_grad_(), a["entropy"].requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        entropy_coef=entropy_coefficient,
        _entropy_bonus_enabled=entropy_coefficient != 0,
        use_adaptive_entropy=False,
        max_completion_length=MAX_COMPLETION_LENGTH,
        current_gradient_accumulation_steps=1,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    completion_mask = a[f"mask/{mask}"]
    ids = torch.zeros((B, T), dtype=torch.long)
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
        ),
    )
    gradients = torch.autograd.grad(value, (logprobs, entropy), materialize_grads=True)
    metrics = [trainer._metrics["train"].get(name, [np.nan])[0] for name in METRICS]
    return value.item(), gradients[0].numpy(), gradients[1].numpy(), metrics


def trl_advantages(rewards: np.ndarray, scale: str) -> np.ndarray:
    """TRL's advantages of rewards [P, G]; NaN is what it makes of a completion that no reward function could score."""
    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    (branch,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.multi_objective_aggregation == 'sum_then_normalize'"
    ]
    per_function = torch.tensor(rewards.reshape(-1, 1), dtype=torch.float64)
    names = dict(
        vars(grpo_trainer),
        self=SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            scale_rewards=scale,
            reward_weights=torch.ones(1, dtype=torch.float64),
        ),
        rewards_per_func=per_function,
        unscorable_mask=torch.isnan(per_function).all(dim=1),
        num_generations=rewards.shape[1],
        device="cpu",
    )
    exec(compile(ast.Module([branch], []), "trl", "exec"), names)
    return torch.nan_to_num(names["advantages"], nan=0.0).reshape(rewards.shape).numpy()


def main() -> None:
    arrays = inputs()
    cases = list(
        itertools.product(
            ("grpo", "bnpo", "dr_grpo", "dapo"),
            (0.0, 0.04),
            (0.2, 0.28),
            (0.0, 0.01),
            ("ragged", "turns"),
            ("mixed", "positive", "negative"),
        )
    )
    losses, gradients, entropy_gradients, metrics = zip(*(trl_loss(arrays, *case) for case in cases), strict=True)
    rng = np.random.default_rng(1)
    rewards = np.round(rng.uniform(0, 1, (5, 8)), 1)
    rewards[1] = 0.8
    rewards[2:4][rng.random((2, 8)) < 0.3] = np.nan
    path = Path(__file__).with_name("losses.npz")
    np.savez_compressed(
        path,
        trl_version=trl.__version__,
        max_completion_length=MAX_COMPLETION_LENGTH,
        cases=np.array([list(map(str, case)) for case in cases]),
        metric_names=np.array(METRICS),
        loss=np.float32(losses),
        gradient=np.float32(gradients),
        entropy_gradient=np.float32(entropy_gradients),
        metrics=np.float32(metrics),
        rewards=rewards,
        **{f"advantages_by_scale/{scale}": trl_advantages(rewards, scale) for scale in ("group", "batch", "none")},
        **{f"inputs/{name}": array for name, array in arrays.items()},
    )
    print(f"{path}: {len(cases)} cases, {path.stat().st_size} bytes, trl {trl.__version__}")


if __name__ == "__main__":
    main()
