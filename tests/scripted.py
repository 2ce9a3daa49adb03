"""A generator of scripted answers, for tests of what is made of completions: nothing is compiled."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.algorithms import StepContext
from grpo_jax.experiment import Experiment, SamplingConfig
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.rollout import PromptBatch, encode_prompts
from grpo_jax.sampler import Generation, Noise, Observation


@dataclass
class Scripted:
    """Answers with `answer(prompt, sample)`, cut off at the limit of tokens; notes how it was called."""

    answer: Callable[[str, int], str]
    alphabet: str = "abcd"
    max_positions: int = 64
    batch_multiple: int = 1
    calls: list[tuple[PromptBatch, Noise, SamplingConfig]] = field(default_factory=list)

    @property
    def tokenizer(self) -> CharacterTokenizer:
        return CharacterTokenizer(self.alphabet)

    def generate(self, prompts: PromptBatch, noise: Noise, sampling: SamplingConfig) -> tuple[Generation, None]:
        self.calls.append((prompts, noise, sampling))
        shape = (*noise.samples.shape, sampling.max_tokens)
        tokens, mask, stopped = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[:2], bool)
        for p, example in enumerate(prompts.examples):
            for g, sample in enumerate(noise.samples[p]):
                said = self.tokenizer.encode(self.answer(example["prompt"], int(sample)))
                ids = [*said, self.tokenizer.stop_ids[0]][: sampling.max_tokens]
                tokens[p, g, : len(ids)], mask[p, g, : len(ids)] = ids, True
                stopped[p, g] = ids[-1] in self.tokenizer.stop_ids
        return Generation(tokens, mask, np.where(mask, -1.0, 0.0).astype(np.float32), stopped), None

    def continue_generation(self, *_: Any) -> tuple[Generation, Any]:
        raise AssertionError("scripted answers have one turn")


@dataclass
class Talker(Scripted):
    """Answers in its turn k + 1 with `answer(prompt, sample + 10 * k)`, and notes what it was told before each."""

    told: list[tuple[Observation, int]] = field(default_factory=list)

    def generate(self, prompts: PromptBatch, noise: Noise, sampling: SamplingConfig) -> tuple[Generation, Any]:
        self.told.clear()
        return super().generate(prompts, noise, sampling)[0], (prompts, 1)

    def continue_generation(
        self, state: Any, observation: Observation, noise: Noise, sampling: SamplingConfig, turns_left: int
    ) -> tuple[Generation, Any]:
        self.told.append((observation, turns_left))
        prompts, turn = state
        later = Scripted(lambda prompt, sample: self.answer(prompt, sample + 10 * turn), self.alphabet)
        said, _ = later.generate(prompts, noise, sampling)
        live = observation.active
        arrays = [np.where(live[..., None], x, np.zeros_like(x)) for x in said[:3]]
        return Generation(*arrays, said.stopped & live), (prompts, turn + 1)


def context_of(experiment: Experiment, generator: Scripted) -> StepContext:
    """A step's context in which the policy, now and at the start, is the generator."""
    prompts = encode_prompts(experiment.task, generator.tokenizer, 64, experiment.sampling.max_tokens)
    return StepContext(experiment, prompts, generator, generator)
