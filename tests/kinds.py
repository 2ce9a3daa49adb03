"""Prints the names of values of many kinds, as JSON: they must be the same in every process, or `refused`."""

import collections
import datetime
import enum
import functools
import io
import itertools
import json
import random
import re
import sys
import threading
import types
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.experiment.fingerprint import fingerprint


class Judge:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def score(self, *, completions, **columns):
        return [0.0 for _ in completions]


class Careful(Judge):
    def __getstate__(self):
        return {name: item for name, item in vars(self).items() if name != "lock"}


class Slots:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


@dataclass
class Holder:
    held: Any


class Level(enum.Enum):
    LOW, HIGH = "low", "high"


def closing(x):
    return lambda *, completions, **columns: [x for _ in completions]


def defaulting(x):
    def reward(*, completions, how=x, **columns):
        return [0.0 for _ in completions]

    return reward


def numbers():
    yield 1


TEXT = np.dtypes.StringDType()
VALUES = {  # for each kind: something that two processes must call the same, and another that has another name
    "Random": (random.Random(0), random.Random(1)),
    "method of Random": (random.Random(0).random, random.Random(1).random),
    "text's method": ("a".join, "b".join),
    "Generator": (np.random.default_rng(0), np.random.default_rng(1)),
    "RandomState": (np.random.RandomState(0), np.random.RandomState(1)),
    "SeedSequence": (np.random.SeedSequence(0), np.random.SeedSequence(1)),
    "jax key": (jax.random.key(0), jax.random.key(1)),
    "old jax key": (jax.random.PRNGKey(0), jax.random.PRNGKey(1)),
    "jax array": (jax.numpy.arange(9000), jax.numpy.arange(9000).at[4000].set(0)),
    "array of texts": (np.array(["a", "b"]), np.array(["a", "c"])),
    "array of objects": (np.array([{"a"}, None]), np.array([{"b"}, None])),
    "array of long texts": (
        np.array(["a" * 99], np.dtypes.StringDType()),
        np.array(["b" * 99], np.dtypes.StringDType()),
    ),
    "set": ({"a", "b", "c"}, {"a", "b", "d"}),
    "keys that are sets": ({frozenset("abc"): 1, frozenset("bcd"): 2}, {frozenset("abc"): 2, frozenset("bcd"): 1}),
    "keys that are classes": ({Judge: 1, Slots: 2}, {Judge: 2, Slots: 1}),
    "instance": (Judge(a={"x", "y"}), Judge(a={"x", "z"})),
    "slots": (Slots(1), Slots(2)),
    "own state": (Careful(lock=threading.Lock(), a=1), Careful(lock=threading.Lock(), a=2)),
    "dataclass": (Holder(random.Random(0)), Holder(random.Random(1))),
    "enum": (Level.LOW, Level.HIGH),
    "partial": (functools.partial(closing, random.Random(0)), functools.partial(closing, random.Random(1))),
    "bound method": (Judge(a=1).score, Judge(a=2).score),
    "closure": (closing(frozenset("abc")), closing(frozenset("abd"))),
    "default": (defaulting({"a", "b"}), defaulting({"a", "c"})),
    "pattern": (re.compile("a"), re.compile("b")),
    "long pattern": (re.compile("a" * 300), re.compile("a" * 300 + "b")),
    "deque": (collections.deque("ab"), collections.deque("ac")),
    "count": (itertools.count(1), itertools.count(2)),
    "namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "time": (datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 2)),
    "StringIO": (io.StringIO("a"), io.StringIO("b")),
    "jit": (jax.jit(closing(1)), jax.jit(closing(2))),
    "list of functions": ([closing(1)], [closing(2)]),
}
REFUSED = {
    "lock": threading.Lock(),
    "event": threading.Event(),
    "generator": numbers(),
    "object": object(),
    "file": sys.stdout,
    "thread": threading.current_thread(),
    "values": {}.values(),
    "memory": memoryview(b"a"),
    "system's generator": random.SystemRandom(),
}
HOLD = (
    lambda x: x,
    closing,
    defaulting,
    lambda x: Judge(a=x).score,
    lambda x: functools.partial(closing, x),
    lambda x: [{"a": x}],
    Holder,
    Slots,
    lambda x: {1: x},
)


def name(value):
    try:
        return fingerprint(value)
    except UserError:
        return "refused"


if __name__ == "__main__":
    named = {kind: [name(hold(value)) for hold in HOLD for value in values] for kind, values in VALUES.items()}
    refused = {kind: [name(hold(value)) for hold in HOLD] for kind, value in REFUSED.items()}
    print(json.dumps([named, refused]))
