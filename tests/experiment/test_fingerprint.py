"""Names for configurations: equal for what is equal, in every process, and different for what is different."""

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import experiment
from grpo_jax.errors import UserError
from grpo_jax.experiment import (
    Ablation,
    CheckpointConfig,
    Experiment,
    LoRAConfig,
    LossConfig,
    Method,
    PolicyConfig,
    SamplingConfig,
)
from grpo_jax.experiment.fingerprint import fingerprint, fingerprint_or_none


def scaled(factor):
    return lambda x: factor * x


def doubled(factor):
    return lambda x: factor * x


def recursive(n):
    def again():
        return recursive, again

    return again


class Quiet(Method):
    def needs_rewards(self, experiment):
        return False


class Loud(Method):
    def needs_rewards(self, experiment):
        return True


class Named(Method):
    def __init__(self, name):
        self.name = name


class Plain:
    def __init__(self, x):
        self.x = x

    def method(self):
        return self.x

    def other(self):
        return -self.x


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x

    def __repr__(self):
        return f"Slotted({self.x})"


class Bare:
    """A class without a method of its own: it is found by its module."""


Loud.__qualname__ = Quiet.__qualname__  # so that the code alone tells them apart
DEFAULT_1, DEFAULT_2 = (lambda x=1: x), (lambda x=2: x)
KEYWORD_1, KEYWORD_2 = (lambda *, x=1: x), (lambda *, x=2: x)
ONE, TWO = (lambda x: x + 1), (lambda x: x + 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ("1", 1),
        ((1, 2), [1, 2]),
        ([[1], 2], [[1, 2]]),
        ({"a": 1}, {"a": 2}),
        (LossConfig(beta=0.1), LossConfig(beta=0.2)),
        (LoRAConfig(), None),
        (ONE, TWO),
        (scaled(2), scaled(3)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (np.arange(3), np.arange(3.0)),
        (np.arange(3), np.array([0, 1, 3])),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (DEFAULT_1, DEFAULT_2),
        (KEYWORD_1, KEYWORD_2),
        (Quiet(), Loud()),
        (len, max),
        (functools.partial(max, 1), functools.partial(min, 1)),
        (functools.partial(max, key=1), functools.partial(max, key=2)),
        (functools.partial(max, key=1), functools.partial(max, other=1)),
        ({"a": 1}, {"b": 1}),
        ({1, 2}, {1, 3}),
        ({1, 2}, frozenset({1, 2})),
        (range(3), range(4)),
        (b"a", "a"),
        (1 + 2j, 1 + 3j),
        (np.zeros(2, np.float32), np.zeros(2, np.float64)),
        ((lambda x: x.real), (lambda x: x.imag)),
        ((lambda x: -x), (lambda x: +x)),
        (Plain(1), Plain(2)),
        (Plain, Quiet),
        (Plain(1).method, Plain(2).method),
        (Plain(1).method, Plain(1).other),
        (functools.cache(ONE), functools.cache(TWO)),
        (Named("a"), Named("b")),
        (json, functools),
        (scaled, doubled),
        (Slotted(1), Slotted(2)),
    ],
)
def test_what_is_different_has_another_name(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_what_is_equal_has_the_same_name():
    assert fingerprint(scaled(2)) == fingerprint(scaled(2))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(LossConfig(beta=0.1)) == fingerprint(LossConfig(beta=0.1))
    assert fingerprint({1, 2, 3}) == fingerprint({3, 2, 1})


def test_a_field_that_was_added_later_counts_only_where_it_is_set():
    """The name of the default policy's config is that of the first versions, which had no `perturbation`."""
    assert fingerprint(PolicyConfig()) == "a16a0c14386e"
    assert fingerprint(PolicyConfig(perturbation=1e-6)) != fingerprint(PolicyConfig())


def test_a_docstring_does_not_count():
    def with_one_docstring(x):
        """One."""
        return x

    one = with_one_docstring

    def with_one_docstring(x):
        """Another."""
        return x

    assert one.__doc__ != with_one_docstring.__doc__ and fingerprint(one) == fingerprint(with_one_docstring)


def test_a_function_that_closes_over_itself_has_a_name():
    assert len(fingerprint(recursive(1))) == 12


def test_every_kind_of_value_has_the_same_name_in_every_process_or_none():
    def names(hash_seed):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu"}
        code = [sys.executable, str(Path(__file__).parents[1] / "kinds.py")]
        done = subprocess.run(code, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    named, refused = names("1")
    assert [named, refused] == names("2")
    for kind, found in named.items():
        assert "refused" not in found and len(set(found)) == len(found), kind
    for kind, found in refused.items():
        assert set(found) == {"refused"}, kind


@pytest.mark.parametrize(
    ("hold", "place"),
    [
        (lambda x: x, "rewards['judge']"),
        (lambda x: Plain(x).method, "rewards['judge'].x"),
        (lambda x: functools.partial(max, x), "rewards['judge'] argument[0]"),
        (lambda x: functools.partial(max, key=x), "rewards['judge'] argument['key']"),
        (lambda x: lambda **_: x, "rewards['judge'] variable x"),
        (lambda x: lambda y=x: y, "rewards['judge'] default[0]"),
        (lambda x: Plain([{"a": x}]).method, "rewards['judge'].x[0]['a']"),
    ],
)
def test_what_has_no_name_is_refused_by_its_arm_its_reward_and_its_attribute(hold, place):
    reward = hold(threading.Lock())
    reward = reward if callable(reward) else functools.partial(max, reward)
    base = Experiment(task=None, rewards={"length": len})
    ablation = Ablation(base, {"base": {}, "judged": {"rewards": {"judge": reward}}}, seeds=(0,))
    with pytest.raises(UserError) as refused:
        ablation.runs()
    place = place if hold(1) != 1 else "rewards['judge'] argument[0]"
    assert str(refused.value).startswith(f"arm 'judged': {place} is of type _thread.lock, which would give the run ")
    assert "__getstate__" in str(refused.value) and fingerprint_or_none(ablation.experiment("judged", 0)) is None


def test_what_is_nested_too_deep_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="nested too deep"):
        fingerprint(deep)


def test_the_name_is_the_same_in_another_process():
    code = "from grpo_jax.rewards.wordle import *; from grpo_jax.tasks.wordle import *\n"
    code += "import grpo_jax.experiment.fingerprint as f\n"
    code += "print(f.fingerprint([single_guess(), partial_credit, frozenset('abc')]))"
    names = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(names) == 1


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "3e66c69243de"),
        (3, "0b099e9d8242"),
        (3.5, "d6087831337e"),
        ("three", "380017ea0daa"),
        (b"three", "07d3f1212891"),
        ((1, "a"), "8b6e647e19e5"),
        (range(3), "53db0df29bea"),
        ({"b": 1, "a": [2]}, "e973bc192ee7"),
        ({3, 1, 2}, "ac69538c2ffb"),
        (np.arange(3, dtype=np.int32), "4c47da4f0705"),
        (np.zeros((2, 1)), "2e13116a5b68"),
        (max, "b3ee1e1b2f41"),
        (dict, "56bbe47892cb"),
        (functools.partial(max, 1, key=None), "6000fb40e02f"),
        (SamplingConfig(temperature=0.5), "171173888091"),
        (LoRAConfig(rank=4), "4a9c9b7b6557"),
    ],
    ids=str,
)
def test_the_names_are_those_of_the_first_versions(value, name):
    """They name directories: with other names, the runs that lie there would be made again."""
    assert fingerprint(value) == fingerprint(value, files=False) == name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("SamplingConfig", "5df6d92fe3d4"),
        ("OptimizerConfig", "564d54a43bca"),
        ("LossConfig", "2fd0e420a180"),
        ("EvaluationConfig", "9f0688ec76a3"),
        ("GuardConfig", "be21122724d4"),
        ("RewardConfig", "3b7fd17a5fab"),
        ("AdvantageConfig", "1b8e95f3318f"),
        ("PPOConfig", "3b911dac8749"),
        ("SFTConfig", "bbac28585f04"),
        ("RFTConfig", "b7ca33cab633"),
        ("PreferenceConfig", "66b16816b342"),
        ("DPOConfig", "f29ccb7ed643"),
        ("RewardModelConfig", "e0f2d42a6f6c"),
        ("LoRAConfig", "c918ec8538ac"),
        ("ScratchConfig", "7a4eb81aa029"),
    ],
)
def test_the_defaults_have_the_names_of_the_first_versions(config, name):
    """A default that changes gives every run another name, and its old runs another meaning."""
    assert fingerprint(getattr(experiment, config)()) == name


def test_the_default_experiment_has_the_name_of_the_first_versions():
    assert fingerprint(Experiment(task=None, rewards={"length": len})) == "929edd82149b"


def test_which_checkpoints_are_kept_counts_in_no_name():
    config = Experiment(task=None, rewards={"length": len}, checkpoints=CheckpointConfig(last=5, every=10))
    assert fingerprint(config) == "929edd82149b"


@pytest.mark.parametrize(
    "hold",
    [
        lambda f: f,
        lambda f: [f],
        lambda f: {f},
        lambda f: {"reward": f},
        lambda f: functools.partial(f, 1),
        lambda f: functools.cache(f),
        lambda f: scaled(f),
        lambda f: Plain(0).method,
        lambda f: Plain(0),
        lambda f: Plain,
        lambda f: Quiet(),
        lambda f: Bare,
        lambda f: Bare(),
    ],
)
def test_the_files_of_a_function_count_wherever_it_stands(hold):
    assert fingerprint(hold(ONE)) != fingerprint(hold(ONE), files=False)


def test_the_files_of_libraries_and_of_this_package_do_not_count():
    for value in (functools.cache, json.JSONEncoder, json, LossConfig(), fingerprint, np.random.default_rng):
        assert fingerprint(value) == fingerprint(value, files=False)


def test_a_list_that_holds_itself_has_a_name_of_its_own():
    loop: list = [1]
    loop.append(loop)
    assert len({fingerprint(loop), fingerprint([1, [1]]), fingerprint([1])}) == 3


def test_only_a_docstring_is_left_out_of_a_function():
    """Where there is none, the first constant is one that the function uses."""
    first, second = (lambda: "one"), (lambda: "two")
    first.__qualname__ = second.__qualname__ = "same"
    assert fingerprint(first, files=False) != fingerprint(second, files=False)

    def documented():
        """One."""
        return "one"

    def other():
        """One."""
        return "two"

    other.__qualname__ = documented.__qualname__
    assert fingerprint(documented, files=False) != fingerprint(other, files=False)
