"""Names for configurations: equal for what is equal, in every process, and different for what is different."""

import functools
import subprocess
import sys

import numpy as np
import pytest

from grpo_jax.experiment import LoRAConfig, LossConfig, Method, PolicyConfig
from grpo_jax.experiment.fingerprint import fingerprint


def scaled(factor):
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


def test_the_name_is_the_same_in_another_process():
    code = "from grpo_jax.rewards.wordle import *; from grpo_jax.tasks.wordle import *\n"
    code += "import grpo_jax.experiment.fingerprint as f\n"
    code += "print(f.fingerprint([single_guess(), partial_credit, frozenset('abc')]))"
    names = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(names) == 1
