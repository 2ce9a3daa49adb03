"""What each method asks of an experiment: its rewards, the size of its groups, what it lacks and does not read."""

from types import SimpleNamespace

import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import (
    AdvantageConfig,
    Experiment,
    LossConfig,
    PreferenceConfig,
    RewardConfig,
    RFTConfig,
)
from grpo_jax.experiment.requirements import METHODS, Method, method_of

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
COLUMNS = PreferenceConfig(completions="columns")
DEMONSTRATIONS = PreferenceConfig(completions="demonstrations")


def task(**fields) -> SimpleNamespace:
    known = {"name": "toy", "train": [PAIR], "held_out": [PAIR], "demonstrate": lambda example, rng: ["a"]}
    return SimpleNamespace(**known | fields)


def made(method: str, **fields) -> Experiment:
    return Experiment(**{"task": task(), "rewards": {"length": len}, "method": method, "group_size": 2, **fields})


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "fields", "wrong", "right", "wanted"),
    [
        ("grpo", {}, (0, 1), (2, 3),
         "at least 2 for method 'grpo', since a group of one has no relative advantage (1 needs advantages.baseline "
         "'none' with scale 'whiten', 'batch' or 'none')"),
        ("grpo", {"advantages": AdvantageConfig("whiten", "none")}, (0,), (1, 2), "positive"),
        ("grpo", {"advantages": AdvantageConfig("none", "none")}, (0,), (1, 2), "positive"),
        ("ppo", {}, (0, -1), (1, 2), "positive"),
        ("sft", {}, (0,), (1, 3), "positive"),
        ("rft", {}, (0, 1), (2, 3), "at least 2 for method 'rft', which takes the best of a group"),
        ("rft", {"rft": RFTConfig("threshold", 0.5)}, (0,), (1, 2), "positive"),
        ("dpo", {}, (0, 1, 3), (2, 4), "even for method 'dpo', which compares two and two"),
        ("reward_model", {}, (0, 1, 3), (2, 4), "even for method 'reward_model', which compares two and two"),
        ("dpo", {"preferences": DEMONSTRATIONS}, (0, 3), (2, 4), "even for method 'dpo', which compares two and two"),
        ("dpo", {"preferences": COLUMNS}, (1, 3, 4), (2,),
         "2 with preferences.completions 'columns': a chosen and a rejected completion"),
    ],
)  # fmt: skip
def test_the_sizes_of_groups_that_a_method_takes(method, fields, wrong, right, wanted):
    for size in right:
        assert made(method, group_size=size, **fields).group_size == size
    for size in wrong:
        said = message(lambda size=size: made(method, group_size=size, **fields))
        assert said == f"Experiment.group_size = {size} is out of range: it must be {wanted}."


@pytest.mark.parametrize(
    ("method", "fields", "needs"),
    [
        ("grpo", {}, True),
        ("ppo", {}, True),
        ("sft", {}, False),
        ("rft", {}, True),
        ("dpo", {}, True),
        ("dpo", {"preferences": DEMONSTRATIONS}, True),
        ("dpo", {"preferences": COLUMNS}, False),
        ("reward_model", {}, True),
        ("reward_model", {"preferences": COLUMNS}, False),
    ],
)
def test_which_methods_need_rewards(method, fields, needs):
    assert made(method, **fields).is_rewarded is needs
    if needs:
        said = message(lambda: made(method, rewards={}, **fields))
        assert said.endswith(f"is out of range: it must be at least one reward function for method {method!r}.")
    else:
        assert made(method, rewards={}, **fields).rewards == {}


def test_only_imitation_of_demonstrations_is_offline():
    assert {name: each.is_offline for name, each in METHODS.items()} == {
        "grpo": False, "ppo": False, "sft": True, "rft": False, "dpo": False, "reward_model": False,
    }  # fmt: skip


def test_rewards_that_are_normalised_in_their_group_are_not_scaled_by_it_again():
    combined = RewardConfig(combine="normalize_then_sum")
    said = message(lambda: made("grpo", reward=combined))
    assert said.startswith("reward.combine = 'normalize_then_sum' has each reward scaled by its group")
    for scale in ("whiten", "batch", "none"):
        assert made("grpo", reward=combined, advantages=AdvantageConfig(scale=scale)).advantages.scale == scale
    assert made("grpo", advantages=AdvantageConfig(scale="group")).reward.combine == "sum"
    assert made("grpo", reward=combined, advantages=max).advantages is max  # a function of the user's has no scale
    assert made("rft", reward=combined).reward == combined


def test_ppo_says_which_field_of_the_loss_it_does_not_read_and_what_to_do():
    said = message(lambda: made("ppo", loss=LossConfig(beta=0.1)))
    assert said == "loss.beta is set, but method 'ppo' does not read it: its KL is ppo.kl_coef's."
    corrected = LossConfig(importance_sampling_mode="token_truncate")
    assert message(lambda: made("ppo", loss=corrected)) == (
        "loss.importance_sampling_mode is set, but method 'ppo' does not read it: it knows no correction for another "
        "sampler."
    )
    assert made("ppo", loss=LossConfig(epsilon=0.1), num_iterations=2).loss.epsilon == 0.1


@pytest.mark.parametrize(
    ("method", "fields", "what"),
    [
        ("sft", {}, "method 'sft'"),
        ("dpo", {"preferences": DEMONSTRATIONS}, "preferences.completions = 'demonstrations'"),
    ],
)
def test_what_needs_demonstrations_says_so_with_the_tasks_name(method, fields, what):
    assert message(lambda: made(method, task=task(demonstrate=None), **fields)) == (
        f"{what} needs demonstrations, but task 'toy' has no `demonstrate` function."
    )
    assert made("dpo", task=task(demonstrate=None)).preferences.completions == "start"


@pytest.mark.parametrize(
    ("method", "split", "is_read"),
    [("dpo", "train", True), ("dpo", "held_out", False), ("reward_model", "train", True),
     ("reward_model", "held_out", True)],
)  # fmt: skip
@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_labelled_pairs_have_both_columns_in_every_example_of_a_split_that_is_read(method, split, is_read, missing):
    lacking = [PAIR, {name: text for name, text in PAIR.items() if name != missing}]

    def make(**fields):
        return made(method, task=task(**{split: lacking}), **fields)

    if is_read:
        assert message(lambda: make(preferences=COLUMNS)) == (
            "preferences.completions = 'columns' needs the columns 'chosen' and 'rejected', which not every "
            f"{split} example of task 'toy' has."
        )
    else:
        assert make(preferences=COLUMNS).preferences == COLUMNS
    assert make().preferences.completions == "start"


def test_a_method_is_found_by_its_name_or_is_itself():
    mine = Method()
    assert method_of(mine) is mine and method_of("rft") is METHODS["rft"]
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
