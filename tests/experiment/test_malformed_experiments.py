"""Malformed overrides, values and experiment files are answered by a config or by one sentence."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import get_args, get_type_hints

import letters
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from malformed import answer, fuzz, odd_texts, scalars, values

from grpo_jax import experiment
from grpo_jax.cli.fields import sections
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, load, override, parse_overrides

CONFIGS = {f"{name}." if name else "": config for name, config in sections()}
PATHS = sorted(f"{name}{field.name}" for name, config in CONFIGS.items() for field in dataclasses.fields(config))
FLOATS = sorted(
    (config.__name__, name)
    for config in CONFIGS.values()
    for name, hint in get_type_hints(config).items()
    if float in (hint, *get_args(hint)) and hint != Mapping[str, float]
)
paths = st.sampled_from(PATHS) | odd_texts | st.tuples(st.sampled_from(PATHS), odd_texts).map(".".join)
texts = odd_texts | values.map(repr) | st.text("[](){}'\",:.0123456789eE+-_nNoOtTrR\\ x", max_size=40)
unhashable = st.sampled_from(["{[]: 1}", "{{}}", "-'a'", "{1: 2}", "9" * 5000, "-" * 20000 + "1", "(" * 5000, "'\\d'"])


@given(st.lists(st.tuples(paths, texts | unhashable).map("=".join) | texts, min_size=1, max_size=3))
@fuzz(150)
def test_any_assignment_is_taken_or_refused_in_one_sentence(assignments):
    answer(lambda: override(letters.config, parse_overrides(letters.config, assignments)))


def circular():
    itself = []
    itself.append(itself)
    return itself


objects = values | st.sampled_from([object(), len, b"\xff", 1j, range(10**9), set(), Experiment, circular(), Ellipsis])


@given(st.dictionaries(st.sampled_from(PATHS), objects, min_size=1, max_size=3))
@example({"method": []})
@fuzz(150)
def test_any_value_of_any_field_is_taken_or_refused_in_one_sentence(overrides):
    answer(lambda: override(letters.config, overrides))


@pytest.mark.parametrize(("config", "field"), FLOATS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e39, 10**400, 1e-50])
def test_a_number_that_float32_does_not_hold_is_refused(config, field, value):
    with pytest.raises(UserError, match=f"{config}.{field} = .* is out of range: it must be "):
        if config == "Experiment":
            override(letters.config, {field: value, "steps": None})
        else:
            getattr(experiment, config)(**{field: value})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"reward.weights": {"share_of_a": 1.0, "b": "2"}}, "RewardConfig.weights = .* has the wrong type"),
        ({"reward.weights": {"share_of_a": float("inf")}}, "RewardConfig.weights = .* finite in float32"),
        ({"policy.lora.targets": ("q", 1)}, "LoRAConfig.targets = .* has the wrong type"),
        ({"rewards": {"share_of_a": len, "b": 1}}, "Experiment.rewards = .* has the wrong type"),
        ({"warm_start": {"steps": 1, 2: 3}}, "Experiment.warm_start = .* has the wrong type"),
        ({"steps": True}, "Experiment.steps = True has the wrong type: it must be int"),
        ({"policy.scratch.hidden_size": 2**31}, "not so large that there are more than"),
        ({"sampling.top_k": 2**40}, "SamplingConfig.top_k = .* it must be at most 2147483647"),
    ],
)
def test_every_entry_of_a_field_is_checked(overrides, says):
    with pytest.raises(UserError, match=says):
        override(letters.config, overrides)


def test_an_ablation_with_a_billion_seeds_is_refused_at_once():
    with pytest.raises(UserError, match=r"Ablation.seeds has 1000000000 seeds: it must have at most 10,000\."):
        experiment.Ablation(letters.config, {"base": {}}, range(10**9))


FAILING = [
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "raise GeneratorExit('a\\nb')",
    "raise BaseException('two\\nlines')",
    "class E(Exception):\n    def __str__(self): return 1\nraise E()",
    "from grpo_jax.errors import UserError\nraise UserError('two\\nlines')",
    "def f(): f()\nf()",
    "x = " + "(" * 1000,
    "config = 1",
    "config = ablation = None",
    "\0",
    "import a_module_that_nobody_has",
]
VALID = Path(letters.__file__).read_bytes()


@given(
    st.sampled_from(FAILING).map(str.encode)
    | st.binary(max_size=60)
    | st.integers(0, len(VALID)).map(lambda at: VALID[:at])
    | st.tuples(st.integers(0, len(VALID)), scalars).map(lambda x: VALID[: x[0]] + repr(x[1]).encode() + VALID[x[0] :])
)
@fuzz(100)
def test_any_experiment_file_is_loaded_or_refused_in_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "strange.py"
    path.write_bytes(content)
    before = list(sys.path)
    answer(lambda: load(path))
    sys.path[:] = before


@pytest.mark.parametrize("content", FAILING)
def test_a_file_that_fails_in_any_way_is_named(tmp_path, content):
    path = tmp_path / "failing.py"
    path.write_text(content)
    assert answer(lambda: load(path)).startswith(str(path))
