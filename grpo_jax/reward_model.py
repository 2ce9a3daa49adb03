"""A reward model as an ordinary reward function, for any method and for `grpo-jax evaluate`.

    rewards={"learned": learned_reward("runs/reward_model")}

Training then optimises what the model believes. `task.success` still says what is true, so a growing gap between the
two can be seen (Gao et al. 2022, "Scaling laws for reward model overoptimization", https://arxiv.org/abs/2210.10760).
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.rewards import Completion, RewardFunction, text, turns


def learned_reward(run_dir: str | Path) -> RewardFunction:
    """The reward model of a run (method `reward_model`), read when it is first called, as a reward function.

    The tokens that it scores are those that were sampled, if its tokenizer is the policy's.

    Raises:
      UserError: when called: if there is no such run, if it has trained no reward model, or for a completion of several
        turns.
    """

    def learned(
        *, prompts: Sequence[Any], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        if any(len(turns(completion)) > 1 for completion in completions):
            raise UserError("a reward model scores completions of one turn, but these have several.")
        return _scorer_of(str(run_dir))(prompts, [text(completion) for completion in completions], completion_ids)

    learned.__qualname__ = f"learned_reward({str(run_dir)!r})"  # so that a run's config names the model
    return learned


Scorer = Callable[[Sequence[Any], Sequence[str], Sequence[Sequence[int]]], list[float]]


@cache
def _scorer_of(run_dir: str) -> Scorer:
    # Imported here, so that an experiment's file that names a reward model still loads at once.
    import jax.numpy as jnp

    from grpo_jax.algorithms.batches import batch_of
    from grpo_jax.algorithms.reward_model import scorer
    from grpo_jax.rollout import bucket, from_completions, make_actor
    from grpo_jax.runs.restore import method_of_run, restore_with_head
    from grpo_jax.sharding import Replicas

    policy, head = restore_with_head(run_dir)
    if method_of_run(run_dir) != "reward_model":
        raise UserError(
            f"the run {run_dir!r} has trained a policy (method {method_of_run(run_dir)!r}), no reward model."
        )
    replicas = Replicas(1)
    actor = make_actor(policy, replicas)
    tokenizer = actor.tokenizer
    trainable = {**actor.trainable, **replicas.replicate({k: jnp.asarray(v) for k, v in head.items()})}
    score = scorer(actor.model, 0, replicas)

    def ids_of(completion: str, ids: Sequence[int]) -> list[int]:
        if ids and tokenizer.decode(list(ids)) == completion:
            return list(ids)
        return [*tokenizer.encode(completion), tokenizer.stop_ids[0]]

    def scores(
        prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        rows = [ids_of(*row) for row in zip(completions, completion_ids, strict=True)]
        asked = [tokenizer.render(prompt) for prompt in prompts]
        # Buckets in both directions, so that few shapes are compiled.
        more = bucket(len(rows)) - len(rows)
        rollout = from_completions(asked + asked[:1] * more, rows + rows[:1] * more)
        found = replicas.gather(score(trainable, actor.frozen, replicas.split(batch_of(rollout))))
        return found.reshape(-1)[: len(rows)].tolist()

    return scores
