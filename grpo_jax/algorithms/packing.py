"""Several whole examples in one row, so that hardly any token is padding."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.algorithms.batch import Batch
from grpo_jax.errors import UserError
from grpo_jax.rollout import bucket


def pack(examples: Sequence[tuple[Sequence[int], Sequence[bool]]], max_length: int | None, multiple: int = 1) -> Batch:
    """Packs (ids, which of them are learned) into rows.

    Args:
      max_length: tokens in a row; None for one example in each row, whose length is that of the longest.
      multiple: the number of rows becomes a multiple of this (the last rows may be empty).

    Returns:
      A batch of [rows, 1, length] whose `segments` tell the examples of a row apart.

    Raises:
      UserError: if an example is longer than a row.
    """
    sizes = [len(ids) for ids, _ in examples]
    if max_length is not None and max(sizes) > max_length:
        raise UserError(
            f"sft.max_length = {max_length} is less than an example's {max(sizes)} tokens: examples are packed whole."
        )
    length = bucket(max(sizes)) if max_length is None else max_length
    bins = [[i] for i in range(len(sizes))] if max_length is None else first_fit(sizes, max_length)
    num_rows = -(-bucket(len(bins)) // multiple) * multiple  # a bucket, so that few shapes are compiled
    tokens, segments = np.zeros((num_rows, 1, length), np.int32), np.zeros((num_rows, 1, length), np.int32)
    mask = np.zeros((num_rows, 1, length), bool)
    for row, members in enumerate(bins):
        at = 0
        for number, i in enumerate(members, 1):
            ids, learned = examples[i]
            place = row, 0, slice(at, at + len(ids))
            tokens[place], mask[place], segments[place] = ids, learned, number
            at += len(ids)
    nothing = np.zeros((num_rows, 1), np.int32)
    return Batch(
        prompts=nothing,
        lengths=nothing[:, 0],
        tokens=tokens,
        valid=segments > 0,
        mask=mask,
        logprobs=np.zeros(mask.shape, np.float32),
        rewards=np.zeros((num_rows, 1), np.float32),
        sample_mask=np.ones((num_rows, 1), bool),
        segments=segments,
    )


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of sizes in bins, the largest first, each into the first bin that has room (first-fit decreasing).

    Never more than 11/9 of the fewest possible bins, plus one (Johnson 1973).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((b for b, left in enumerate(room) if left >= sizes[i]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(i)
        room[place] -= sizes[i]
    return bins
