"""What these ablations vary: the article's Wordle case (`experiments/wordle/pound.py`), as it is and as first tried.

`first_try` has no entropy bonus and groups of 64: with it some seeds collapse onto non-words, so arms can differ.
"""

from pathlib import Path

from grpo_jax.experiment import load, override

pound = load(Path(__file__).resolve().parents[1] / "wordle" / "pound.py")
first_try = override(pound, {"loss.entropy_coef": 0.0, "group_size": 64})
