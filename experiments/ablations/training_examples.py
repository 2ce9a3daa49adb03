"""How many training examples does GRPO need? 10, 20, 100 or 500 words, evaluated on 500 words of which it saw none.

The warm start is the same for all: it has seen the careless teacher spell 1,000 words.

    grpo-jax sweep experiments/ablations/training_examples.py --jobs 2
    grpo-jax table experiments/ablations/training_examples.py
"""

from backwards_case import backwards, task_of

from grpo_jax.experiment import Ablation

ablation = Ablation(
    base=backwards,
    arms={f"{n} examples": {"task": task_of(num_train=n)} for n in (1000, 10, 20, 100, 500)},
    seeds=range(10),
)
