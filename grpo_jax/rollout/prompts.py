"""A task's prompts as token ids, padded to few shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.policy.tokenizer import Tokenizer
from grpo_jax.tasks import Example, Task

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class PromptBatch:
    """Some of a task's prompts as arrays.

    Attributes:
      examples: the P examples that the prompts are from.
      ids: right-padded token ids [P, S] int32.
      lengths: [P] int32.
      shared_prefix_length: how many leading tokens all prompts share.
      indices: the places of the P examples in their split; empty for prompts that no task has.
    """

    examples: Sequence[Example]
    ids: np.ndarray
    lengths: np.ndarray
    shared_prefix_length: int = 0
    indices: Sequence[int] = ()


@dataclass(frozen=True)
class Prompts:
    """All of a task's prompts as token ids, by split, and how many leading tokens all of them share."""

    task: Task
    ids: Mapping[str, Sequence[Sequence[int]]]
    shared_prefix_length: int = 0

    def batch(self, split: str, indices: Sequence[int]) -> PromptBatch:
        """Some prompts of a split; S is a bucket, so that few shapes are compiled."""
        examples = getattr(self.task, split)
        ids, lengths = pad_prompts([self.ids[split][i] for i in indices], self.shared_prefix_length)
        return PromptBatch([examples[i] for i in indices], ids, lengths, self.shared_prefix_length, list(indices))


def pad_prompts(rows: Sequence[Sequence[int]], shared_prefix_length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [P, S] and lengths [P]. S is the shared prefix and a bucket for the rest."""
    lengths = np.array([len(row) for row in rows], np.int32)
    size = shared_prefix_length + bucket(int(lengths.max()) - shared_prefix_length)
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
    # The last token of a prompt is never shared, because it predicts the first sampled one.
    shared = min(len(first) - 1, *(len(row) - 1 for row in others)) if others else 0
    for row in others:
        shared = next((i for i in range(shared) if row[i] != first[i]), shared)
    return Prompts(task, ids, shared if shared >= 16 else 0)  # a shorter one costs a second pass and saves less


def bucket(n: int) -> int:
    """The next of 4, 6, 8, 12, 16, 24, 32, 48, 64, …: padding stays under a half, and shapes to compile stay few."""
    size = 4
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else 1 << size.bit_length()
    return size
