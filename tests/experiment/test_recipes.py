"""Recipes: each makes an experiment with the numbers of its paper."""

from typing import Any

import letters
import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import AdvantageConfig, Experiment, LossConfig, override, recipes

TABLE: dict[str, tuple[dict[str, Any], LossConfig, AdvantageConfig]] = {
    # recipe: (group_size, num_minibatches, dynamic_sampling_rounds), loss, advantages
    "grpo": (dict(group_size=64), LossConfig("grpo", beta=0.04), AdvantageConfig("group")),
    "dr_grpo": (
        dict(group_size=8, num_minibatches=8), LossConfig("dr_grpo", dr_grpo_length=3), AdvantageConfig("none"),
    ),
    "dapo": (
        dict(group_size=16, num_minibatches=16, dynamic_sampling_rounds=9),
        LossConfig("dapo", epsilon=0.2, epsilon_high=0.28), AdvantageConfig("group"),
    ),
    "gspo": (
        dict(group_size=16, num_minibatches=4),
        LossConfig("grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
        AdvantageConfig("group"),
    ),
    "cispo": (
        dict(group_size=16, num_minibatches=16), LossConfig("cispo", epsilon_high=5.0), AdvantageConfig("group"),
    ),
    "rloo": (
        dict(group_size=4), LossConfig("reinforce"),
        AdvantageConfig("none", "leave_one_out", kl_coef=0.03),
    ),
    "reinforce_pp": (
        dict(group_size=1, num_minibatches=8), LossConfig("dapo"),
        AdvantageConfig("whiten", "none", kl_coef=0.01, kl_level="token"),
    ),
    "reinforce_pp_baseline": (
        dict(group_size=8, num_minibatches=8), LossConfig("dapo", beta=1e-3, kl_estimator="k2"),
        AdvantageConfig("whiten"),
    ),
    "lite_ppo": (dict(group_size=8, num_minibatches=8), LossConfig("dapo"), AdvantageConfig("batch")),
}  # fmt: skip


def make(name: str, **changes: Any) -> Experiment:
    recipe = getattr(recipes, name)(**({"max_tokens": 3} if name == "dr_grpo" else {}))
    return Experiment(task=letters.task, rewards=letters.config.rewards, **{**recipe, **changes})


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_its_papers_numbers(name):
    counts, loss, advantages = TABLE[name]
    config = make(name, prompts_per_step=16)
    expected = {"num_iterations": 1, "num_minibatches": 1, "dynamic_sampling_rounds": 0, "method": "grpo", **counts}
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.loss, config.advantages) == (loss, advantages)


def test_every_recipe_is_in_the_table():
    public = {name for name, value in vars(recipes).items() if callable(value) and value.__module__ == recipes.__name__}
    assert public == set(TABLE)


def test_a_recipe_is_changed_as_any_experiment_is():
    assert make("gspo", group_size=4).group_size == 4
    assert override(make("dapo", prompts_per_step=16), {"loss.epsilon_high": 0.3}).loss.epsilon_high == 0.3
    # Fewer completions than mini-batches cannot be shared out, and that is said.
    with pytest.raises(UserError, match="num_minibatches = 8, divides the 2 groups of 1 completions"):
        make("reinforce_pp", prompts_per_step=2)
