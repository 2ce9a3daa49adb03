"""What a saved row says of its example and its episode: plain data, for files, tables and reports."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.rollout.episodes import Episode, Rollout
from grpo_jax.tasks import Example


def example_row(example: Example, index: int | None = None) -> dict[str, Any]:
    """The example of a completion: its place in its split, `example`, its `prompt`, and its other `columns`.

    The columns are under one key, so that none of them can have the name of another part of the row. What JSON cannot
    hold is there as its `repr`. `example` is absent if it is not known.
    """
    place = {} if index is None else {"example": int(index)}
    columns = {key: plain(value) for key, value in example.items() if key != "prompt"}
    return {**place, "prompt": example["prompt"], "columns": columns}


def index_of(rollout: Rollout, p: int) -> int | None:
    """The place of a rollout's example p in its split, if it is known."""
    return rollout.indices[p] if len(rollout.indices) else None


def has_turns(episodes: Sequence[Sequence[Episode]]) -> bool:
    """Whether one of these episodes has several turns."""
    return any(episode.replies or len(episode.turns) > 1 for group in episodes for episode in group)


def transcript(episode: Episode) -> list[dict[str, str]]:
    """The turns of an episode in their order: each with its `role`, "policy" or "environment", and its `text`."""
    turns = []
    for i, text in enumerate(episode.turns):
        turns.append({"role": "policy", "text": text})
        turns += [{"role": "environment", "text": reply} for reply in episode.replies[i : i + 1]]
    return turns


def plain(value: Any) -> Any:
    """A value as JSON can hold it: arrays as lists, and as its `repr` what JSON has no form for."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        return plain(value.tolist())
    return repr(value)
