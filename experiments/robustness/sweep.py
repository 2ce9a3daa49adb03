"""A sweep that is over in seconds: what `scripts/kill.py` kills, run by run and with all seeds in one program.

grpo-jax sweep experiments/robustness/sweep.py --dir runs/robustness --vectorize
"""

from pathlib import Path

from grpo_jax.experiment import Ablation, load, override

pound = load(Path(__file__).resolve().parents[1] / "wordle" / "pound.py")
small = {
    "policy.scratch.hidden_size": 16,
    "policy.scratch.num_layers": 1,
    "group_size": 16,
    "steps": 60,
    "checkpoint_every": 10,
    "evaluation.num_samples": 16,
    "evaluation.every": 20,
    "warm_start": None,
}
ablation = Ablation(
    base=override(pound, small),
    arms={"as it is": {}, "hotter": {"sampling.temperature": 1.3}},
    seeds=(0, 1),
    metric="success",
)
