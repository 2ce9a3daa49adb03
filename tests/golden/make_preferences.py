"""Makes preferences.npz: what TRL's own code says of DPO's and the reward model's losses on small random inputs.

    python tests/golden/make_preferences.py [OUT.npz SEED]   # needs torch and trl 1.16.0, which nothing else here does

`DPOTrainer._compute_loss` and `RewardTrainer.compute_loss` run on stand-ins that have the attributes which they read
and hand them given log-probabilities or scores. No formula is written here. TRL 1.16 has cDPO (label smoothing of the
plain loss) within `aot` alone, which first sorts the margins of the batch: one pair at a time that changes nothing.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

N, T = 5, 7
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen")
CASES: list[dict[str, Any]] = [
    *(dict(loss_type="sigmoid", beta=beta, label_smoothing=noise) for beta in (0.1, 0.5) for noise in (0.0, 0.1, 0.5)),
    *(dict(loss_type="robust", beta=beta, label_smoothing=noise) for beta in (0.1, 0.5) for noise in (0.0, 0.1, 0.4)),
    *(dict(loss_type="ipo", beta=beta, label_smoothing=0.0) for beta in (0.05, 0.1, 1.0)),
]


def trl_dpo(logprobs: np.ndarray, ref_logprobs: np.ndarray, mask: np.ndarray, case: dict[str, Any]) -> tuple:
    """TRL's loss, gradient and metrics of pairs [N, 2, T], chosen first."""
    if case["loss_type"] == "sigmoid" and case["label_smoothing"]:
        parts = [
            _trl_dpo(*(x[i : i + 1] for x in (logprobs, ref_logprobs, mask)), case | {"loss_type": "aot"})
            for i in range(len(mask))
        ]
        losses, gradients, metrics = zip(*parts, strict=True)
        return np.mean(losses), np.concatenate(gradients) / len(mask), np.mean(metrics, axis=0)
    return _trl_dpo(logprobs, ref_logprobs, mask, case)


def _trl_dpo(logprobs: np.ndarray, ref_logprobs: np.ndarray, mask: np.ndarray, case: dict[str, Any]) -> tuple:
    own = torch.tensor(np.float32(logprobs), requires_grad=True)
    counted = torch.tensor(mask)

    def model_of(x: torch.Tensor) -> torch.nn.Module:
        rows = (x * counted).swapaxes(0, 1).reshape(-1, T)  # all chosen, then all rejected; 0 where nothing counts
        idle = torch.zeros_like(rows)
        model = torch.nn.Module()
        model.is_gradient_checkpointing = False
        model.forward = lambda **_: SimpleNamespace(log_probs=rows, entropy=idle, mean_logits=idle, is_top1=idle.bool())
        return model

    same = dict(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    completion_mask = torch.nn.functional.pad(counted.swapaxes(0, 1).reshape(-1, T).long(), (1, 0))
    trainer = SimpleNamespace(
        model=model_of(own),
        ref_model=model_of(torch.tensor(np.float32(ref_logprobs))),
        accelerator=SimpleNamespace(**same),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=[case["loss_type"]],
        loss_weights=[1.0],
        beta=case["beta"],
        label_smoothing=case["label_smoothing"],
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    inputs = dict(input_ids=completion_mask, attention_mask=completion_mask, completion_mask=completion_mask)
    value = DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    (gradient,) = torch.autograd.grad(value, own)
    return value.item(), gradient.numpy(), [trainer._metrics["train"][name][0] for name in METRICS]


def trl_reward_model(rewards: np.ndarray, coefficient: float) -> tuple[float, np.ndarray, list[float]]:
    """TRL's loss, gradient, accuracy and margin of scores [N, 2], chosen first; a coefficient of 0 is TRL's None."""
    scores = torch.tensor(np.float32(rewards), requires_grad=True)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(center_rewards_coefficient=coefficient or None),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=scores.T.reshape(-1, 1))

    value = RewardTrainer.compute_loss(trainer, model, dict(attention_mask=torch.ones(1)))
    (gradient,) = torch.autograd.grad(value, scores)
    return value.item(), gradient.numpy(), [trainer._metrics["train"][name][0] for name in ("accuracy", "margin")]


def main(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (N, 2, T))
    ref_logprobs = logprobs + rng.normal(0, 0.8, logprobs.shape)
    mask = np.arange(T) < rng.integers(1, T + 1, (N, 2, 1))
    mask[0] &= rng.random((2, T)) < 0.7  # an environment speaks in between
    rewards = rng.normal(0, 2, (N, 2))
    dpo = [trl_dpo(logprobs, ref_logprobs, mask, case) for case in CASES]
    coefficients = (0.0, 0.01, 0.5)
    reward_model = [trl_reward_model(rewards, coefficient) for coefficient in coefficients]
    arrays = {
        f"{name}/{kind}": np.float32(values)
        for name, results in (("dpo", dpo), ("reward_model", reward_model))
        for kind, values in zip(("loss", "gradient", "metrics"), zip(*results, strict=True), strict=True)
    }
    np.savez_compressed(
        path,
        trl_version=trl.__version__,
        cases=np.array([json.dumps(case) for case in CASES]),
        metric_names=np.array(METRICS),
        coefficients=np.array(coefficients),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        rewards=rewards,
        **arrays,
    )
    print(f"{path}: {len(CASES)} cases, {path.stat().st_size} bytes, trl {trl.__version__}")


if __name__ == "__main__":
    out, number = sys.argv[1:] or (Path(__file__).with_name("preferences.npz"), 0)
    main(Path(out), int(number))
