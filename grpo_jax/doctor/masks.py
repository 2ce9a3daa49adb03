"""Checks of which tokens are trained on: those that the policy wrote, the stop tokens included."""

from collections.abc import Iterator

import numpy as np

from grpo_jax.doctor.check import Check, count, not_applicable, verified
from grpo_jax.doctor.subject import Subject
from grpo_jax.rollout import Episode


def stop_tokens_end_and_are_trained(subject: Subject) -> Check:
    """A stop token ends its turn, a completion counts as ended if its last token is one, and the loss reads it.

    A policy that is never trained on its stop token does not learn to stop.
    """
    stops = set(subject.tokenizer.stop_ids)
    episodes = [e for rollout in subject.rollouts for group in rollout.episodes for e in group]
    beyond = sum(any(i in stops for i in turn[:-1]) for e in episodes for turn in _turns(e) if _is_whole(e))
    mistaken = sum(e.ended != (_turns(e)[-1][-1] in stops) for e in episodes)
    ended = sum(e.ended for e in episodes)
    closing, untrained = _stops_of_batch(subject, stops)
    figures = {
        "completions": len(episodes), "ended": ended, "turns_that_go_on": beyond, "mistaken_for_ended": mistaken,
        "stop_tokens_of_a_batch": closing, "untrained": untrained,
    }  # fmt: skip
    measured, bound = f"{ended} of {len(episodes)} end, {untrained} untrained", "0 untrained"
    if beyond or mistaken:
        sentence = (
            f"the sampled completions have {count(beyond, 'turn')} that goes on after a stop token, and "
            f"{count(mistaken, 'completion')} wrongly taken for ended or cut off: the generator does not obey "
            "Tokenizer.stop_ids."
        )
        return Check("refuted", measured, bound, sentence, figures)
    if untrained:
        sentence = (
            f"{untrained} of the {count(closing, 'stop token')} of a batch are not trained on, so that the policy "
            "does not learn to stop: the method's mask must cover them."
        )
        return Check("refuted", measured, bound, sentence, figures)
    if not ended and not subject.before_warm_start and not closing:
        sentence = (
            f"no completion ended within sampling.max_tokens = {subject.experiment.sampling.max_tokens}, so that "
            "nothing shows that completions can end: raise it, unless that is what training is for."
        )
        return Check("warning", measured, bound, sentence, figures)
    return Check("proved", measured, bound, figures=figures)


def only_the_policys_tokens_are_trained(subject: Subject) -> Check:
    """The arrays of a batch hold the tokens of its episodes, and its mask those that the policy wrote.

    A method may leave out whole completions, such as those that were cut off.
    """
    batch, rollout = subject.train_batch.batch, subject.train_batch.rollout
    if rollout is None:
        return not_applicable("rows of this method hold whole examples, prompts included.")
    wrong = {"tokens": 0, "valid": 0, "mask": 0}
    for p, group in enumerate(rollout.episodes):
        for g, episode in enumerate(group):
            size = len(episode.ids)
            wrong["tokens"] += batch.tokens[p, g, :size].tolist() != episode.ids
            wrong["valid"] += not _is_prefix(np.asarray(batch.valid[p, g]), size)
            mask = np.asarray(batch.mask[p, g])
            own = np.pad(np.array(episode.trained, bool), (0, len(mask) - size))
            wrong["mask"] += bool(mask.any()) and not np.array_equal(mask, own)
    rows = batch.mask.shape[0] * batch.mask.shape[1]
    bad = sum(wrong.values())
    figures = {"rows": rows, "wrong": wrong, "trained_tokens": int(batch.mask.sum())}
    sentence = (
        f"of {count(rows, 'row')} of a batch, {wrong['mask']} train on tokens that the policy did not write or leave "
        f"out some that it did, and {wrong['tokens'] + wrong['valid']} hold other tokens than their episodes."
    )
    return verified(not bad, f"{bad} rows differ", "0", sentence, figures)


def _turns(episode: Episode) -> list[list[int]]:
    """The ids of the policy's turns: the runs of trained tokens."""
    turns: list[list[int]] = []
    last = False
    for i, trained in zip(episode.ids, episode.trained, strict=True):
        if trained and not last:
            turns.append([])
        if trained:
            turns[-1].append(i)
        last = trained
    return turns


def _is_whole(episode: Episode) -> bool:
    """Whether the policy's turns can be told apart; an environment may answer with nothing."""
    return len(_turns(episode)) == len(episode.turns)


def _stops_of_batch(subject: Subject, stops: set[int]) -> tuple[int, int]:
    """How many turns and examples of a batch end in a stop token, and how many of these tokens are not trained on."""
    closing = [(token, is_trained) for token, is_trained in _ends(subject) if token in stops]
    return len(closing), sum(not is_trained for _, is_trained in closing)


def _ends(subject: Subject) -> Iterator[tuple[int, bool]]:
    """The last token of each of the policy's turns in a batch, or of each packed example, and whether it is trained on.

    Completions that the method leaves out as a whole, such as those that were cut off, have none.
    """
    batch, rollout = subject.train_batch.batch, subject.train_batch.rollout
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    if batch.segments is not None:
        segments = np.asarray(batch.segments)
        after = np.concatenate([segments[..., 1:], np.zeros_like(segments[..., :1])], axis=-1)
        for place in np.argwhere((segments > 0) & (after != segments)):
            yield int(tokens[tuple(place)]), bool(mask[tuple(place)])
        return
    if rollout is None:
        return
    for p, group in enumerate(rollout.episodes):
        for g, episode in enumerate(group):
            if not mask[p, g].any():
                continue
            follows = [*episode.trained[1:], False]
            for t, (is_own, goes_on) in enumerate(zip(episode.trained, follows, strict=True)):
                if is_own and not goes_on:
                    yield int(tokens[p, g, t]), bool(mask[p, g, t])


def _is_prefix(valid: np.ndarray, size: int) -> bool:
    return bool(valid[:size].all()) and not valid[size:].any()
