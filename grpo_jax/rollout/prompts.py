"""A task's prompts as token ids, padded to few shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.policy.tokenizer import Tokenizer
from grpo_jax.tasks import Task


@dataclass(frozen=True)
class Prompts:
    """A task's prompts as token ids, by split, and how many leading tokens all of them share."""

    ids: Mapping[str, Sequence[Sequence[int]]]
    common: int

    def batch(self, split: str, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded ids [P, S] and lengths [P] of some prompts; S is a bucket, so that few shapes are compiled."""
        return pad_prompts([self.ids[split][i] for i in indices], self.common)


def pad_prompts(rows: Sequence[Sequence[int]], common: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [P, S] and lengths [P] of prompts that share `common` leading tokens; S is a bucket."""
    lengths = np.array([len(row) for row in rows], np.int32)
    size = common + bucket(int(lengths.max()) - common)
    prompts = np.zeros((len(rows), size), np.int32)
    for row, ids in zip(prompts, rows, strict=True):
        row[: len(ids)] = ids
    return prompts, lengths


def encode_prompts(task: Task, tokenizer: Tokenizer, max_positions: int, max_tokens: int) -> Prompts:
    """Tokenises every prompt of a task whose turns have up to `max_tokens` each.

    Raises:
      UserError: if a prompt leaves no room for its completion in the policy's context.
    """
    ids = {
        split: [tokenizer.render(example["prompt"]) for example in getattr(task, split)]
        for split in ("train", "held_out")
    }
    new = task.max_turns * max_tokens
    for split, rows in ids.items():
        for i, row in enumerate(rows):
            if len(row) + new > max_positions:
                raise UserError(
                    f"prompt {i} of {task.name} ({split}) has {len(row)} tokens, which with up to {new} new ones "
                    f"exceed the policy's context of {max_positions}: shorten the prompt or lower max_tokens."
                )
    first, *others = [row for rows in ids.values() for row in rows]
    shared = min(len(first) - 1, *(len(row) - 1 for row in others)) if others else 0
    for row in others:
        shared = next((i for i in range(shared) if row[i] != first[i]), shared)
    return Prompts(ids, shared if shared >= 16 else 0)  # below that, the second pass costs more than it saves


def bucket(n: int) -> int:
    """The next of 4, 6, 8, 12, 16, 24, 32, 48, 64, …: padding stays under a half, and shapes to compile stay few."""
    size = 4
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else 1 << size.bit_length()
    return size
