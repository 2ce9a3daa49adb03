"""Overrides as values: what they change, what they leave, how text becomes a value, and what is wrong with a name."""

from types import SimpleNamespace

import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import (
    AdvantageConfig,
    Experiment,
    LoRAConfig,
    LossConfig,
    Method,
    PolicyConfig,
    RewardConfig,
    SFTConfig,
    override,
    parse_overrides,
    variant_of,
)
from grpo_jax.experiment.overrides import nearest, unread_fields


def toy(**fields) -> Experiment:
    task = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[], demonstrate=lambda example, rng: ["a"])
    return Experiment(**{"task": task, "rewards": {"length": len, "other": max}, **fields})


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=7", 7),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("gradient_checkpointing=true", True),
        ("gradient_checkpointing=FALSE", False),
        ("gradient_checkpointing=True", True),
        ("devices=none", None),
        ("devices=None", None),
        ("policy.source=none", "none"),  # a field of text keeps the text
        ("policy.source=123", "123"),
        ("policy.source=True", "True"),
        ("policy.source=a=b", "a=b"),
        ("policy.source='quoted'", "quoted"),
        ("method=sft", "sft"),
        ("evaluation.splits=('train','held_out')", ("train", "held_out")),
        ("reward.weights.length=2", 2),
        ("reward.weights={'length': 0.5}", {"length": 0.5}),
        ("loss.beta=0", 0),
    ],
)
def test_text_becomes_a_value_that_the_field_admits(assignment, value):
    found = parse_overrides(toy(), [assignment])
    assert found == {assignment.partition("=")[0]: value}
    assert type(next(iter(found.values()))) is type(value)


def test_a_field_of_a_config_that_is_none_switches_it_on():
    config = override(toy(), parse_overrides(toy(), ["policy.lora.targets=('q','v')", "policy.lora.rank=8"]))
    assert config.policy.lora == LoRAConfig(rank=8, targets=("q", "v"))
    assert override(config, {"policy.lora": None}).policy.lora is None


def test_a_later_assignment_of_the_same_field_wins():
    assert parse_overrides(toy(), ["steps=1", "seed=2", "steps=3"]) == {"steps": 3, "seed": 2}


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("steps", "--set 'steps' is not of the form field=value, e.g. loss.beta=0.04."),
        ("steps.more=1", "'steps.more' is not a field: int has no fields of its own."),
        ("policy.lora.rankk=8", "'policy.lora.rankk' is not a field: LoRAConfig has no 'rankk'; did you mean 'rank'?"),
        ("policy.lora.rank=x", "LoRAConfig.rank = 'x' has the wrong type: it must be int."),
        (
            "control.steps=8",
            "'control.steps' cannot be set: control is None here; set it whole, control={'steps': 8}.",
        ),
        ("loss.betta=1", "'loss.betta' is not a field: LossConfig has no 'betta'; did you mean 'beta'?"),
        ("policy.scratch.alphabett=a", "ScratchConfig has no 'alphabett'; did you mean 'alphabet'?"),
        ("policy.scratch.zzz=a", "no 'zzz'; it must be one of alphabet, hidden_size, num_layers, num_heads."),
        ("lose.beta=1", "'lose.beta' is not a field: Experiment has no 'lose'; did you mean 'loss'?"),
        (
            "steps=-1",
            "Experiment.steps = -1 is out of range: it must be 0 or above, or None with epochs, which then say when "
            "training ends.",
        ),
    ],
)
def test_a_wrong_assignment_names_the_whole_field_and_what_has_none_of_it(assignment, says):
    assert says in message(lambda: parse_overrides(toy(), [assignment]))


def test_an_override_sets_its_field_and_keeps_its_neighbours():
    base = toy(policy=PolicyConfig(lora=LoRAConfig(rank=4, alpha=8.0)), reward=RewardConfig(weights={"length": 0.5}))
    found = override(base, {"policy.lora.rank": 2, "reward.weights.other": 3.0, "policy.dtype": "bfloat16"})
    assert found.policy == PolicyConfig(lora=LoRAConfig(rank=2, alpha=8.0), dtype="bfloat16")
    assert found.reward.weights == {"length": 0.5, "other": 3.0}
    assert override(base, {"reward.weights.length": 2.0}).reward.weights == {"length": 2.0}
    assert base.policy.lora.rank == 4 and override(base, {}) == base


def test_a_whole_config_and_a_field_of_it_are_set_whatever_comes_first():
    new = LoRAConfig(rank=8, alpha=1.0)
    for names in (("policy.lora", "policy.lora.alpha"), ("policy.lora.alpha", "policy.lora")):
        values = {"policy.lora": new, "policy.lora.alpha": 2.0}
        assert override(toy(), {name: values[name] for name in names}).policy.lora == LoRAConfig(rank=8, alpha=2.0)


def test_another_method_leaves_behind_what_it_does_not_read_unless_that_is_given():
    base = toy(loss=LossConfig(beta=0.1), advantages=AdvantageConfig(scale="batch"), dynamic_sampling_rounds=2)
    imitation = override(base, {"method": "sft"})
    assert (imitation.loss, imitation.advantages) == (LossConfig(), AdvantageConfig())
    assert imitation.dynamic_sampling_rounds == 0
    same = override(base, {"method": "grpo", "steps": 3})
    assert (same.loss.beta, same.dynamic_sampling_rounds, same.steps) == (0.1, 2, 3)
    said = message(lambda: override(base, {"method": "sft", "loss.beta": 0.2}))
    assert said == "Experiment.loss is set, but method 'sft' does not read it."
    back = override(toy(method="sft", sft=SFTConfig(completion_only_loss=False)), {"method": "grpo", "loss.beta": 0.3})
    assert back.sft == SFTConfig() and back.loss.beta == 0.3


def test_a_method_of_the_users_own_leaves_behind_what_it_does_not_read():
    class Mine(Method):
        name = "mine"
        reads = ("loss",)

    mine = Mine()
    found = override(toy(loss=LossConfig(beta=0.1), dynamic_sampling_rounds=2), {"method": mine})
    assert (found.method, found.loss.beta, found.dynamic_sampling_rounds) == (mine, 0.1, 0)


@pytest.mark.parametrize(
    ("method", "unread"),
    [
        ("grpo", "ppo sft rft preferences dpo reward_model"),
        ("ppo", "dynamic_sampling_rounds advantages sft rft preferences dpo reward_model"),
        ("sft", "dynamic_sampling_rounds advantages loss ppo rft preferences dpo reward_model"),
        ("rft", "dynamic_sampling_rounds advantages loss ppo sft preferences dpo reward_model"),
        ("dpo", "dynamic_sampling_rounds advantages loss ppo sft rft reward_model"),
        ("reward_model", "dynamic_sampling_rounds advantages loss ppo sft rft dpo"),
        (Method(), "dynamic_sampling_rounds advantages loss ppo sft rft preferences dpo reward_model"),
    ],
    ids=["grpo", "ppo", "sft", "rft", "dpo", "reward_model", "one of the user's own"],
)
def test_what_a_method_does_not_read(method, unread):
    assert [field.name for field in unread_fields(Experiment, method)] == unread.split()


def test_a_variant_has_a_warm_start_or_a_control_only_if_it_is_given_one():
    base = toy(warm_start={"steps": 3}, control={"steps": 4}, seed=5)
    found = variant_of(base, {"steps": 6})
    assert (found.warm_start, found.control, found.steps, found.seed) == (None, None, 6, 5)
    assert variant_of(base, {"control": {"steps": 7}}).control == {"steps": 7}


def test_the_nearest_name_is_suggested_or_all_are_named():
    assert nearest("stepps", ["seed", "steps"]) == "; did you mean 'steps'?"
    assert nearest("xyz", ["seed", "steps"]) == "; it must be one of seed, steps."
