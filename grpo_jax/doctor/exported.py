"""The check of the exported policy: written as a Hugging Face directory, read back, and compared."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.doctor.check import Check, not_applicable, within
from grpo_jax.doctor.subject import Subject
from grpo_jax.policy import Policy, export, load
from grpo_jax.rollout import Rollout

ROWS, LONGEST = 2, 256  # completions that are compared, and the most tokens of each with its prompt's
ROUNDING = {"float32": 1e-3, "bfloat16": 0.5}  # nats


def exported_policy_is_the_policy(subject: Subject) -> Check:
    """A checkpoint that was exported, its adapters merged, and loaded again says what the policy says.

    Compared are the log-probabilities of completions: those of the policy with its adapters, those of the loaded one,
    and those that the sampler reported. The adapters are off their start, where they would change nothing.
    """
    policy = subject.moved
    size = sum(x.size * x.dtype.itemsize for x in policy.params.values())
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size > 0.9 * free:
        return not_applicable(
            f"not checked: the export needs {size / 1e9:.1f} GB, and {tempfile.gettempdir()} has {free / 1e9:.1f} free."
        )
    sampled = subject.sample(0, range(subject.small.group_size), moved=True)
    tokens, mask, places, reported = _rows(sampled)
    temperature = subject.small.sampling.temperature or 1.0
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "policy"
        export(policy, directory)
        loaded = load(directory, dtype=subject.dtype)
        own, theirs = (_logprobs(each, tokens, mask, temperature) for each in (policy, loaded))
        same_tokenizer = _same_tokenizer(subject, loaded)
    gap = float(np.max(np.abs(own - theirs)[places]))
    to_sampler = float(np.max(np.abs(theirs[places] - reported)))
    figures = {
        "to_sampler": to_sampler, "same_tokenizer": same_tokenizer, "tokens": int(places.sum()),
        "effect_of_adapters": _effect(policy, own, tokens, mask, temperature),
    }  # fmt: skip
    if not same_tokenizer:
        sentence = (
            "the exported tokenizer gives the first prompt other ids, or has other stop tokens, than the policy's own: "
            "what is exported is asked something else than what was trained."
        )
        return Check("refuted", "another tokenizer", "the same", sentence, figures)
    sentence = (
        f"the exported policy's log-probabilities differ by up to {gap:.2g} nats from the policy's, and by "
        f"{to_sampler:.2g} from the sampler's: what is exported is another policy than what was trained."
    )
    sampled_bound = max(subject.small.sampling.logprob_bound(subject.dtype), ROUNDING[subject.dtype])
    worst = gap if to_sampler <= sampled_bound else float("nan")
    return within(worst, ROUNDING[subject.dtype], " nats", sentence, **figures)


def _rows(sampled: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompts with completions as rows: tokens [B, S], which are there [B, S], which were sampled [B, S - 1] (by the
    place that predicts them), and what the sampler reported for these.
    """
    rows, reported = [], []
    for p in range(min(ROWS, len(sampled.episodes))):
        prompt, episode = sampled.prompts[p, : sampled.lengths[p]].tolist(), sampled.episodes[p][0]
        ids = [*prompt, *episode.ids][:LONGEST]
        trained = [*[False] * len(prompt), *episode.trained][:LONGEST]
        rows.append((ids, trained))
        reported += [x for x, own in zip([*[0.0] * len(prompt), *episode.logprobs], trained, strict=False) if own]
    longest = max(len(ids) for ids, _ in rows)
    tokens, mask, own = (np.zeros((len(rows), longest), kind) for kind in (np.int32, bool, bool))
    for b, (ids, trained) in enumerate(rows):
        tokens[b, : len(ids)], mask[b, : len(ids)], own[b, : len(ids)] = ids, True, trained
    return tokens, mask, own[:, 1:], np.array(reported)


def _logprobs(policy: Policy, tokens: np.ndarray, mask: np.ndarray, temperature: float) -> np.ndarray:
    """The log-probabilities [B, S - 1] of every token but the first, given those before it."""
    logits = policy.logits(tokens, mask)[:, :-1] / temperature
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, 1:, None], axis=-1)
    return np.asarray(chosen[..., 0])


def _effect(policy: Policy, own: np.ndarray, tokens: np.ndarray, mask: np.ndarray, temperature: float) -> float | None:
    """By how many nats the adapters change a log-probability at most; None without adapters."""
    if policy.lora is None:
        return None
    params = {path: x for path, x in policy.params.items() if ".lora_" not in path}
    without = _logprobs(replace(policy, params=params, lora=None), tokens, mask, temperature)
    return float(np.max(np.abs(own - without) * (mask[:, 1:])))


def _same_tokenizer(subject: Subject, loaded: Policy) -> bool:
    """Whether a loaded policy's tokenizer renders the first prompt as the policy's own does, and stops at the same."""
    prompt, own, other = subject.experiment.task.train[0]["prompt"], subject.tokenizer, loaded.require_tokenizer()
    return own.render(prompt) == other.render(prompt) and set(own.stop_ids) == set(other.stop_ids)
