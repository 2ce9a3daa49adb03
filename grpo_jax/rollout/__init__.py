"""Prompts to episodes: token sequences, masks and transcripts, in one turn or many.

An episode is one token sequence. What the policy sampled is trained on, its stop tokens included; what the environment
answered is context and never trained on; nothing is ever re-tokenised.
"""

from grpo_jax.rollout.episodes import (
    Episode,
    Rollout,
    completion,
    demonstrations,
    from_completions,
    join_groups,
    score_rollout,
    single_turn,
    take_groups,
    take_rows,
)
from grpo_jax.rollout.generator import Actor, Generator, make_actor, model_of, name_noise, settings_of
from grpo_jax.rollout.play import rollout, sample_episodes, sample_text
from grpo_jax.rollout.prompts import PromptBatch, Prompts, Split, bucket, encode_prompts
from grpo_jax.rollout.rows import example_row, has_turns, index_of, plain, transcript

__all__ = [
    "Actor",
    "Episode",
    "Generator",
    "PromptBatch",
    "Prompts",
    "Rollout",
    "Split",
    "bucket",
    "completion",
    "demonstrations",
    "encode_prompts",
    "example_row",
    "from_completions",
    "has_turns",
    "index_of",
    "join_groups",
    "make_actor",
    "model_of",
    "name_noise",
    "plain",
    "rollout",
    "sample_episodes",
    "sample_text",
    "score_rollout",
    "settings_of",
    "single_turn",
    "take_groups",
    "take_rows",
    "transcript",
]
