"""Which temperature explores: 0, 0.3, 0.7, 1.0 or 1.3, without an entropy bonus to help?

The article finds 0 without diversity and 1.3 too much. A study with two seeds saw 0.7 collapse onto non-words where 1.0
and 1.3 solved the task. Evaluation is at temperature 1 for every arm. A run ends near 0 or near 1, and which it is can
turn on rounding, so this takes twenty seeds.

    grpo-jax sweep experiments/ablations/temperature.py --vectorize
    grpo-jax table experiments/ablations/temperature.py
"""

from pound_case import first_try

from grpo_jax.experiment import Ablation

ablation = Ablation(
    base=first_try,
    arms={f"temperature {t}": {"sampling.temperature": t} for t in (1.0, 0.0, 0.3, 0.7, 1.3)},
    seeds=range(20),
)
