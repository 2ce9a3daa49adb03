"""Plays episodes: prompts to token sequences, masks and transcripts, in one turn or many.

An episode is one token sequence. What the policy sampled is trained on, its stop tokens included; what the environment
answered is context and never trained on; nothing is ever re-tokenised. Rows whose episode is over leave the batch as
soon as that halves it, and a turn ends when its last row stops.
"""

from grpo_jax.rollout.episodes import (
    Episode,
    Rollout,
    beside,
    completion,
    demonstrations,
    score_rollout,
    shown,
    take_groups,
    take_rows,
)
from grpo_jax.rollout.play import Actor, compaction, make_actor, model_of, rollout, sample_text, single_turn
from grpo_jax.rollout.prompts import Prompts, bucket, encode_prompts

__all__ = [
    "Actor",
    "Episode",
    "Prompts",
    "Rollout",
    "beside",
    "bucket",
    "compaction",
    "completion",
    "demonstrations",
    "encode_prompts",
    "make_actor",
    "model_of",
    "rollout",
    "sample_text",
    "score_rollout",
    "shown",
    "single_turn",
    "take_groups",
    "take_rows",
]
