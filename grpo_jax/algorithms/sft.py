"""SFT: imitation of the task's demonstrations, `group_size` of each prompt."""

import numpy as np

from grpo_jax.algorithms.base import Algorithm, Objective, Setup, StepContext, TrainBatch
from grpo_jax.algorithms.batch import Batch
from grpo_jax.algorithms.batches import batch_of, schedule, tokens_of
from grpo_jax.algorithms.imitation import imitation_objective
from grpo_jax.algorithms.packing import pack
from grpo_jax.experiment import requirements
from grpo_jax.rollout import Rollout, demonstrations, name_noise


class SFT(requirements.SFT, Algorithm):
    """Supervised fine-tuning on `task.demonstrate`."""

    def make_batch(self, context: StepContext, step: int) -> TrainBatch:
        config = context.experiment
        indices, prompt_ids = schedule(config.seed, step, config.prompts_per_step, len(config.task.train))
        noise = name_noise(config.seed, step, prompt_ids, range(config.group_size))
        prompts = context.prompts.batch("train", indices)
        shown = demonstrations(config.task, prompts, noise, context.generator.tokenizer, config.reward.time_limit)
        tokens, new_tokens = tokens_of(shown), int(shown.mask.sum())
        if not config.sft.packing and config.sft.completion_only_loss:
            return TrainBatch(batch_of(shown), shown, tokens, new_tokens)
        batch = _whole_examples(context, shown)
        return TrainBatch(batch, None, tokens, new_tokens, {"packing/efficiency": float(np.mean(batch.valid))})

    def make_objective(self, setup: Setup) -> Objective:
        return imitation_objective(setup)


def _whole_examples(context: StepContext, shown: Rollout) -> Batch:
    """Prompts and completions in one row each, or several to a row, so that the prompt can be learned as well."""
    config = context.experiment.sft
    examples = []
    for p, group in enumerate(shown.episodes):
        prompt = shown.prompts[p, : shown.lengths[p]].tolist()
        # Nothing predicts an example's first token.
        learned = [False] + [not config.completion_only_loss] * (len(prompt) - 1)
        examples += [([*prompt, *e.ids], [*learned, *e.trained]) for e in group]
    # Each device, mini-batch and micro-batch has the same number of rows.
    pieces = context.experiment.num_minibatches * context.experiment.gradient_accumulation_steps
    multiple = context.generator.batch_multiple * pieces
    return pack(examples, config.max_length if config.packing else None, multiple)
