"""Temperature, group size and number of training examples on SmolLM2-135M, which learns sums (`quickstart.py`).

Eight steps of 16 prompts instead of thirteen, nothing resampled and no control, so that a run takes two minutes on two
CPU cores. A run sees 128 prompts, so that more than a hundred examples would be no arm of their own.

    grpo-jax sweep experiments/ablations/smollm2.py --jobs 2
    grpo-jax table experiments/ablations/smollm2.py
"""

from pathlib import Path

from grpo_jax.experiment import Ablation, load, override
from grpo_jax.tasks.arithmetic import sums

quickstart = load(Path(__file__).resolve().parents[1] / "quickstart.py")
short = {"steps": 8, "dynamic_sampling_rounds": 0, "control": None, "evaluation.num_prompts": 256}

ablation = Ablation(
    base=override(quickstart, short),
    arms={
        "T = 1, 16 prompts x 8": {},
        "T = 0": {"sampling.temperature": 0.0},
        "T = 0.3": {"sampling.temperature": 0.3},
        "T = 0.7": {"sampling.temperature": 0.7},
        "T = 1.3": {"sampling.temperature": 1.3},
        "64 x 2, equal rollouts": {"prompts_per_step": 64, "group_size": 2},
        "8 x 16, equal rollouts": {"prompts_per_step": 8, "group_size": 16},
        "10 examples": {"task": sums(num_train=10)},
        "20 examples": {"task": sums(num_train=20)},
    },
    seeds=range(10),
)
