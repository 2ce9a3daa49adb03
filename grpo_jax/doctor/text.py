"""Checks of the tokenizer: its begin token, its chat template, and what decoding keeps of a completion."""

import random
from collections.abc import Sequence
from typing import Any

from grpo_jax.doctor.check import Check, Verdict, count, not_applicable
from grpo_jax.doctor.subject import Subject
from grpo_jax.errors import UserError, shown
from grpo_jax.policy.tokenizer import Messages, Tokenizer
from grpo_jax.rollout import Episode
from grpo_jax.tasks.calls import demonstration_of

TRIED = 8  # prompts
ANSWER, QUESTION = "A short answer.", "And now?"

Difference = tuple[str, bool]
"""What differs between two renderings, and whether that matters in every task; else only where turns follow."""


def one_begin_token(subject: Subject) -> Check:
    """A prompt has its begin token once: not twice, as where a template and a tokenizer both add it, and not never."""
    tokenizer = subject.tokenizer
    if tokenizer.bos_id is None:
        return not_applicable("the tokenizer has no begin token.")
    rendered = [tokenizer.render(prompt) for prompt in _prompts(subject)]
    twice = sum(ids[:2] == [tokenizer.bos_id] * 2 for ids in rendered)
    absent = sum(ids[0] != tokenizer.bos_id for ids in rendered)
    expects = tokenizer.render(tokenizer.decode(rendered[0]))[0] == tokenizer.bos_id
    figures = {"prompts": len(rendered), "twice": twice, "absent": absent, "plain_texts_have_it": expects}
    measured = f"{twice} twice, {absent} without"
    if twice:
        sentence = (
            f"{twice} of {count(len(rendered), 'prompt')} begin with two begin tokens, which the policy has never "
            "seen: take the token out of the chat template or out of the prompts' texts."
        )
        return Check("refuted", measured, "0", sentence, figures)
    if absent and expects:
        sentence = (
            f"{absent} of {count(len(rendered), 'prompt')} lack the begin token that the tokenizer puts before plain "
            "texts: see whether the policy was trained on chats without it."
        )
        return Check("warning", measured, "0", sentence, figures)
    return Check("proved", measured, "0", figures=figures)


def chat_template_round_trip(subject: Subject) -> Check:
    """A prompt and a completion have the ids that the chat template gives to the same messages.

    Three things are compared for each prompt: the ids of the prompt are the first ones of the chat with the answer
    (the generation prompt opens the assistant's turn); the answer follows at once; and after it comes a stop token and
    what `Tokenizer.reply` puts between two turns.
    """
    task, tokenizer = subject.experiment.task, subject.tokenizer
    prompts = _prompts(subject)
    if not tokenizer.has_chat_template:
        return not_applicable("the policy's tokenizer has no chat template, so that prompts are plain texts.")
    chats = [p for p in prompts if not isinstance(p, str) and p[-1]["role"] != "assistant"]
    if not chats:
        if not isinstance(prompts[0], str):
            return not_applicable("the prompts end in the assistant's turn, which the policy goes on with.")
        sentence = (
            "the prompts are plain texts, though the policy has a chat template: if it was tuned on chats, write them "
            'as messages, [{"role": "user", "content": …}].'
        )
        return Check("warning", "plain texts", "chats", sentence)
    example = task.train[0]
    answer = demonstration_of(task, example, random.Random(0))[0].strip() if task.demonstrate else ANSWER
    figures: dict[str, Any] = {"prompts": len(chats)}
    for prompt in chats:
        difference = _open_turn(tokenizer, prompt, answer) or _closed_turn(tokenizer, prompt, answer)
        if difference is not None:
            what, always = difference
            matters = always or task.max_turns > 1
            advice = (
                "the policy is trained on another context than a chat of the same messages gives it; correct the "
                "chat template"
                if matters
                else "this changes nothing here, since what was sampled is never made from text again, but a chat that "
                "goes on after the answer gives the policy another context"
            )
            verdict: Verdict = "refuted" if matters else "warning"
            return Check(verdict, "ids differ", "same ids", f"{what}: {advice}.", {**figures, "matters": matters})
    return Check("proved", f"{count(len(chats), 'prompt')} the same", "same ids", figures=figures)


def _open_turn(tokenizer: Tokenizer, prompt: Messages, answer: str) -> Difference | None:
    """What differs between a prompt with an answer and the chat of both."""
    asked, said = tokenizer.render(prompt), tokenizer.encode(answer)
    try:
        chat = tokenizer.render([*prompt, {"role": "assistant", "content": answer}])
    except UserError as error:
        return f"the chat template cannot render an answer ({str(error).rstrip('.')})", False
    rest = chat[len(asked) :]
    if chat[: len(asked)] == asked and rest[len(rest) - len(said) :] == said and len(rest) > len(said):
        between = _shown(tokenizer, rest[: len(rest) - len(said)])
        return f"the prompt does not open the assistant's turn, the template puts {between} before an answer", True
    return _difference(tokenizer, chat, [*asked, *said], "an answer")


def _closed_turn(tokenizer: Tokenizer, prompt: Messages, answer: str) -> Difference | None:
    """The same for a chat that goes on after the answer."""
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": QUESTION}]
    asked, said = tokenizer.render(prompt), tokenizer.encode(answer)
    try:
        chat, reply = tokenizer.render([*prompt, *turns]), tokenizer.reply(QUESTION)
    except UserError as error:
        return f"the chat template cannot render a second question ({str(error).rstrip('.')})", False
    expected = [[*asked, *said, stop, *reply] for stop in tokenizer.stop_ids]
    return None if chat in expected else _difference(tokenizer, chat, expected[-1], "a second question")


def _difference(tokenizer: Tokenizer, chat: Sequence[int], expected: Sequence[int], what: str) -> Difference | None:
    if list(chat) == list(expected):
        return None
    same = [a == b for a, b in zip(chat, expected, strict=False)]
    at = same.index(False) if False in same else len(same)
    one, other = _shown(tokenizer, chat[at : at + 3]), _shown(tokenizer, expected[at : at + 3])
    return f"with {what} the chat has {one} at token {at}, where the policy's context has {other}", False


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Token ids and their text, which lacks special tokens."""
    return f"{list(ids)} ({shown(tokenizer.decode(ids), 40)})" if ids else "nothing"


def completions_survive_decoding(subject: Subject) -> Check:
    """The text of a completion is made of its own ids, and encodes to the same ids."""
    tokenizer, stops = subject.tokenizer, set(subject.tokenizer.stop_ids)
    episodes = [e for rollout in subject.rollouts for group in rollout.episodes for e in group if not e.replies]
    if not episodes:
        return not_applicable("all episodes have several turns.")
    bodies = [[i for i in e.ids if i not in stops] for e in episodes]
    wrong = sum(tokenizer.decode(e.ids) != e.turns[0] for e in episodes)
    lost = [(e, ids) for e, ids in zip(episodes, bodies, strict=True) if not _encodes_to(tokenizer, e, ids)]
    figures = {"completions": len(episodes), "other_texts": wrong, "other_ids": len(lost)}
    measured = f"{len(lost)} of {len(episodes)} change"
    if wrong:
        sentence = f"the texts of {wrong} of {count(len(episodes), 'completion')} are not those of their ids."
        return Check("refuted", measured, "0", sentence, figures)
    if lost:
        text = shown(lost[0][0].turns[0], 60)
        sentence = (
            f"{len(lost)} of {count(len(episodes), 'completion')}, such as {text}, encode to other ids than were "
            "sampled: this changes nothing in training, which keeps the ids, but saved texts are not the same data."
        )
        return Check("warning", measured, "0", sentence, figures)
    return Check("proved", measured, "0", figures=figures)


def _encodes_to(tokenizer: Tokenizer, episode: Episode, ids: Sequence[int]) -> bool:
    try:
        return tokenizer.encode(episode.turns[0]) == list(ids)
    except UserError:  # a character that is in no alphabet
        return False


def _prompts(subject: Subject) -> list[Any]:
    return [example["prompt"] for example in subject.experiment.task.train[:TRIED]]
