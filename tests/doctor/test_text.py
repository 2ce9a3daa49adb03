"""The round trip of the chat template, with templates that hold it and templates that break it."""

from dataclasses import replace
from typing import Any

import letters
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax.doctor import Subject, text
from grpo_jax.experiment import override
from grpo_jax.policy import load
from grpo_jax.policy.tokenizer import HuggingFaceTokenizer

SPECIALS = ["<s>", "<turn>", "<end>"]
CHATML = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant:' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "a question"}]


def tokenizer_of(template: str) -> HuggingFaceTokenizer:
    """One token for each printable character, and three special ones."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"bos_token": "<s>", "eos_token": "<end>"}
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template or None, **names)
    )


def subject_of(template: str, *, prompt: Any = CHAT, max_turns: int = 1) -> Subject:
    task = replace(
        letters.task,
        train=[{"prompt": prompt}],
        held_out=[{"prompt": prompt}],
        max_turns=max_turns,
        reply=lambda example, turns: "x",
        demonstrate=lambda example, rng: ["an answer"],
    )
    policy = replace(load("scratch"), make_tokenizer=lambda: tokenizer_of(template))
    return Subject(override(letters.config, {"task": task}), policy)


@pytest.mark.parametrize("max_turns", [1, 3])
def test_a_template_that_writes_every_turn_the_same_way_round_trips(max_turns):
    check = text.chat_template_round_trip(subject_of(CHATML, max_turns=max_turns))
    assert check.verdict == "proved", check


def test_a_template_that_opens_no_turn_for_the_assistant_is_refuted():
    check = text.chat_template_round_trip(
        subject_of(CHATML.replace("{% if add_generation_prompt %}", "{% if false %}"))
    )
    assert check.verdict == "refuted" and "does not open the assistant's turn" in check.sentence
    assert "'assistant:'" in check.sentence


DROPS_THOUGHTS = CHATML.replace("'<turn>assistant:'", "'<turn>assistant:(thinks)'")
DROPS_ANSWERS = CHATML.replace(
    "m['content']", "(m['content'] if loop.last or m['role'] != 'assistant' else m['content'][1:])"
)


@pytest.mark.parametrize(
    ("template", "what"),
    [(DROPS_THOUGHTS, "with an answer the chat has"), (DROPS_ANSWERS, "with a second question the chat has")],
)
def test_a_template_that_drops_tokens_matters_where_turns_follow(template, what):
    check = text.chat_template_round_trip(subject_of(template, max_turns=3))
    assert check.verdict == "refuted" and what in check.sentence
    check = text.chat_template_round_trip(subject_of(template))
    assert check.verdict == "warning" and what in check.sentence and "this changes nothing here" in check.sentence


def test_a_template_that_refuses_a_second_question_is_a_warning():
    single = "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + CHATML
    check = text.chat_template_round_trip(subject_of(single))
    assert check.verdict == "warning" and "one question" in check.sentence


def test_plain_prompts_for_a_policy_that_knows_chats_are_a_warning():
    check = text.chat_template_round_trip(subject_of(CHATML, prompt="a question"))
    assert check.verdict == "warning" and "plain texts" in check.sentence


def test_a_prompt_that_the_policy_goes_on_with_has_no_turn_to_open():
    begun = [*CHAT, {"role": "assistant", "content": "The answer is"}]
    assert text.chat_template_round_trip(subject_of(CHATML, prompt=begun)).verdict == "not applicable"


@pytest.mark.parametrize(("begin", "verdict"), [("<s>", "proved"), ("<s><s>", "refuted"), ("", "proved")])
def test_a_begin_token_stands_once(begin, verdict):
    check = text.one_begin_token(subject_of("{{ '" + begin + "' }}" + CHATML))
    assert check.verdict == verdict
