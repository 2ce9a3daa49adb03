"""Malformed input for the tests that throw it at the commands and the loaders, and the rule that an answer must keep.

The number of examples is small and their choice fixed, so that the tests are quick and repeat. `GRPO_JAX_FUZZ=5000`
tries 5,000 other examples of each.
"""

import copy
import json
import math
import os
import resource
import signal
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from grpo_jax.errors import UserError

ASKED = int(os.environ.get("GRPO_JAX_FUZZ", "0"))
# Of one call: seconds of computing, seconds in which it may wait for a processor too, and what it may allocate beside
# what the process has.
SECONDS, PATIENCE, MEMORY = 20, 120, 3 * 2**30


def fuzz(examples: int) -> Any:
    """The settings of a test: so many examples, always the same, or as many as `GRPO_JAX_FUZZ` asks for."""
    return hypothesis.settings(
        max_examples=ASKED or examples,
        derandomize=not ASKED,
        phases=(Phase.explicit, Phase.generate) if ASKED else tuple(Phase),  # to shrink takes longer than to find
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def answer(call: Callable[[], Any]) -> Any:
    """What a call returns, or the sentence of the `UserError` that it raises. All else, as a hang, is a failure."""

    rung = []

    def ring(*_: object) -> None:
        rung.append(True)
        raise AssertionError(f"no answer within {SECONDS} s")

    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(PATIENCE)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, limits[1]))
        return call()
    except UserError as error:
        sentence = str(error)
        assert not rung, f"no answer within {SECONDS} s, and then: {sentence}"
        assert sentence and "\n" not in sentence and "Traceback" not in sentence, sentence
        assert len(sentence) < 2500, sentence
        return sentence
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


LARGE = [2**31 - 1, 2**31, -(2**31), 2**63, 2**64, 10**400, 1e39, -1e39, 1e308, math.inf, -math.inf, math.nan]
odd_numbers = st.sampled_from([0, -1, 1, 2, 0.0, -0.0, 0.5, 1e-50, *LARGE])
odd_texts = st.text(max_size=8) | st.sampled_from(
    ["", "\0", "a\nb", "../../etc/passwd", "/etc/passwd", "None", "\ud800", "\x1b[31m", "x" * 5000, "[" * 300, "é" * 40]
)
scalars = st.none() | st.booleans() | odd_numbers | odd_texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all parts of nested dictionaries and lists, the whole included."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*path, key))
    return found


@st.composite
def mutated(draw: Any, valid: Any) -> Any:
    """JSON-able data with one to three parts taken away, replaced, doubled or wrapped."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        *owners, last = draw(st.sampled_from(_places(value))) or (None,)
        if last is None:
            if draw(st.integers(0, 9)) == 0:
                value = draw(values)
            continue
        place = value
        for key in owners:
            place = place[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "add"]))
        if kind == "replace":
            place[last] = draw(values)
        elif kind == "remove":
            del place[last]
        elif kind == "wrap":
            place[last] = [place[last]] if draw(st.booleans()) else {"": place[last]}
        elif isinstance(place, dict):
            place[draw(odd_texts)] = draw(values)
        else:
            place.append(draw(values))
    return value


@st.composite
def damaged(draw: Any, valid: bytes) -> bytes:
    """Bytes that are cut short, that have others in some places, or that are others altogether."""
    kind = draw(st.sampled_from(["cut", "cut", "overwrite", "overwrite", "overwrite", "insert", "random"]))
    if kind == "random":
        return draw(st.binary(max_size=200))
    at = draw(st.integers(0, len(valid)))
    if kind == "cut":
        return valid[:at]
    other = draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\n", b'"', b"{"]))
    return valid[:at] + other + valid[at + (len(other) if kind == "overwrite" else 0) :]


def as_json(value: Any) -> bytes:
    """JSON with what Python's parser reads beside the standard: NaN, and halves of surrogate pairs."""
    return json.dumps(value).encode()


def json_files(valid: Any) -> st.SearchStrategy[bytes]:
    """Files of JSON with mutated content or with damaged bytes."""
    return mutated(valid).map(as_json) | damaged(as_json(valid))
