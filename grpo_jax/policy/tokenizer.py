"""Tokenizers: text to token ids and back. Only this module of the policy deals with text.

Never derive a mask from ids: a pad token can occur inside a prompt (SmolLM2 pads with its end-of-turn token). Only
lengths tell what is padding. The import of transformers takes a second, so only a tokenizer that needs it imports it.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from grpo_jax.errors import UserError, failure_of, one_line, shown
from grpo_jax.experiment.checked import admits
from grpo_jax.policy.chat_template import ChatTemplate, Messages

# The assistant's text when a template is rendered only to find out what follows an assistant's turn.
_MARK = "GRPOJAXMARK"


class Tokenizer(Protocol):
    """The interface of a tokenizer for the rest of the framework.

    Attributes:
      stop_ids: tokens that end an assistant's turn. The policy samples one of them itself.
      pad_id: fills masked places. It may be a token that also has a meaning.
      bos_id: the token at the beginning of texts; None if the tokenizer has none.
      vocab_size: the number of ids that the tokenizer can produce. The policy's embedding may have more rows.
      has_chat_template: whether prompts should be chat messages.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    bos_id: int | None
    vocab_size: int
    has_chat_template: bool

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens before or after it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        ...

    def render(self, prompt: str | Messages) -> list[int]:
        """Returns the ids of a prompt: a chat up to the assistant's next turn, or a plain text with its begin token."""
        ...

    def reply(self, text: str) -> list[int]:
        """Returns the ids between an assistant's stop token and its next turn if the environment replies `text`."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes the files from which transformers and `from_directory` load this tokenizer."""
        ...


class HuggingFaceTokenizer:
    """A transformers `PreTrainedTokenizerFast` with its chat template.

    Args:
      tokenizer: the transformers tokenizer.
      stop_ids: further stop tokens, such as those of a generation config. The tokenizer's end-of-sequence token and the
        token with which its chat template ends an assistant's turn are always stop tokens.
      rows: the number of rows of the policy's embedding; None for as many as the tokenizer has ids.
      where: where the tokenizer is from, for messages.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: Sequence[int] = (), rows: int | None = None, where: object = "the policy"
    ) -> None:
        self._tokenizer, self._where = tokenizer, where
        self._rows = len(tokenizer) if rows is None else rows
        self.bos_id: int | None = tokenizer.bos_token_id
        self.vocab_size: int = min(len(tokenizer), self._rows)
        self._template = _chat_template(tokenizer, where)
        self.has_chat_template = self._template is not None
        ends = [tokenizer.eos_token_id, *stop_ids, self._end_of_turn()]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))
        if not self.stop_ids:
            raise UserError(f"the tokenizer of {where} has no end-of-sequence token, so a policy could never stop.")
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.stop_ids[0] if pad is None else pad

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens before or after it."""
        ids = self._encode(text, add_special_tokens=False)
        if ids and max(ids) >= self._rows:
            token = self._tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(f"the text has the token {shown(token)}, for which the policy's embedding has no row.")
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        with _one_sentence(f"the tokenizer of {self._where} cannot encode {text[:80]!r}"):
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens and with its white space unchanged."""
        with _one_sentence(f"the tokenizer of {self._where} cannot decode {len(ids)} ids"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render(self, prompt: str | Messages) -> list[int]:
        """Returns the ids of a prompt.

        The chat template renders messages up to the assistant's next turn. If the last message is the assistant's, the
        policy continues that message. A plain text gets the begin token if the tokenizer puts one before texts. An
        empty prompt is the begin token, or the pad token where there is none, as with Qwen: it stands between the
        documents of pretraining.

        Raises:
          UserError: if there are messages and no chat template, or if the template rejects the messages.
        """
        if isinstance(prompt, str):
            before = [i for i in self._encode("") if i == self.bos_id]  # without an end-of-sequence token
            ids = before + self.encode(prompt)
        else:
            ids = self.encode(self._chat(prompt, continues=bool(prompt) and prompt[-1]["role"] == "assistant"))
        return ids or [self.pad_id if self.bos_id is None else self.bos_id]

    def reply(self, text: str) -> list[int]:
        """Returns the ids between an assistant's stop token and its next turn if the environment replies `text`."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        after = self._chat([*turns, {"role": "user", "content": text}]).partition(_MARK)[2]
        for stop in map(self._tokenizer.convert_ids_to_tokens, self.stop_ids):
            if after.lstrip().startswith(stop):  # the policy has sampled this token itself
                after = after.lstrip().removeprefix(stop)
                break
        return self.encode(after)

    def save(self, directory: str | Path) -> None:
        """Writes the files from which transformers and `from_directory` load this tokenizer."""
        self._tokenizer.save_pretrained(directory)

    def _chat(self, messages: Messages, *, open_turn: bool = True, continues: bool = False) -> str:
        if self._template is None:
            raise UserError(
                "this policy's tokenizer has no chat template, so its prompts must be plain texts, not chat messages."
            )
        return self._template.render(messages, open_turn=open_turn, continues=continues)

    def _end_of_turn(self) -> int | None:
        """Returns the special token with which the chat template ends an assistant's turn; None if there is none."""
        if not self.has_chat_template:
            return None
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        ids = self.encode(self._chat(turns, open_turn=False).rpartition(_MARK)[2].lstrip())
        token = self._tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
        return ids[0] if token is not None and token.special else None


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Raises `UserError` for an error of a tokenizer. They are of many kinds, and a panic of Rust is no `Exception`."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {failure_of(error)}.") from None


def _chat_template(tokenizer: Any, where: object) -> ChatTemplate | None:
    """The chat template of a tokenizer of transformers; None if it has none."""
    if not tokenizer.chat_template:
        return None
    source = tokenizer.get_chat_template()  # of several, the default one
    if not isinstance(source, str):
        raise UserError(f"{where} has the chat template {shown(source)}, which must be a text.")
    return ChatTemplate(source, tokenizer.special_tokens_map, str(where))


class CharacterTokenizer:
    """One token per character of `alphabet`, after pad (0), begin (1) and end (2)."""

    SPECIALS = ("<|pad|>", "<|begin|>", "<|end|>")

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.pad_id = 0
        self.bos_id: int | None = 1
        self.has_chat_template = False
        self.stop_ids: tuple[int, ...] = (2,)
        self._ids = {character: i for i, character in enumerate(alphabet, len(self.SPECIALS))}
        self.vocab_size = len(self.SPECIALS) + len(alphabet)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the characters. Raises `UserError` for a character that is not in the alphabet."""
        for character in text:
            if character not in self._ids:
                raise UserError(
                    f"the character {character!r} of {text[:40]!r} is not in the policy's alphabet {self.alphabet!r}."
                )
        return [self._ids[character] for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the characters of the ids, without pad, begin and end."""
        first = len(self.SPECIALS)
        return "".join(self.alphabet[i - first] for i in map(int, ids) if i >= first)

    def render(self, prompt: str | Messages) -> list[int]:
        """Returns begin and the characters of the prompt. The contents of messages are concatenated."""
        text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        assert self.bos_id is not None
        return [self.bos_id, *self.encode(text)]

    def reply(self, text: str) -> list[int]:
        """Returns the ids of the characters of `text`. The assistant's next turn starts right after them."""
        return self.encode(text)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers can load too."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

        pad, begin, end = self.SPECIALS
        vocab = {token: i for i, token in enumerate((*self.SPECIALS, *self.alphabet))}
        tokenizer = Tokenizer(models.WordLevel(vocab))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.SPECIALS])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, self.bos_id)])
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(Path(directory) / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
            _ALPHABET_KEY: self.alphabet,
        }
        text = json.dumps(config, indent=2) + "\n"
        (Path(directory) / "tokenizer_config.json").write_text(text, encoding="utf-8")


_ALPHABET_KEY = "grpo_jax_alphabet"  # in tokenizer_config.json: the directory's tokenizer is a CharacterTokenizer
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def from_directory(directory: Path, rows: int | None = None) -> Callable[[], Tokenizer] | None:
    """Returns a function that makes the tokenizer of a Hugging Face directory; None if it has no tokenizer.

    `rows` is the number of rows of the policy's embedding, which no id may be beyond. Code in the directory is not run.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None

    def make() -> Tokenizer:
        config, generation = _json(directory / "tokenizer_config.json"), _json(directory / "generation_config.json")
        if _ALPHABET_KEY in config:
            return _character_tokenizer(config[_ALPHABET_KEY], directory, rows)
        quiet()
        from transformers import AutoTokenizer

        with _one_sentence(f"transformers cannot load the tokenizer of {directory}"):
            # Without trust_remote_code=False, transformers asks at the terminal about a tokenizer with code of its own.
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        stops = generation.get("eos_token_id") or []
        stops = stops if isinstance(stops, list) else [stops]
        if not admits(list[int], stops):
            raise UserError(f"{directory / 'generation_config.json'} has eos_token_id = {shown(stops)}: that is no id.")
        return fitted(tokenizer, stops, rows, directory)

    return make


def _character_tokenizer(alphabet: Any, directory: Path, rows: int | None) -> CharacterTokenizer:
    if not isinstance(alphabet, str) or not alphabet or len(set(alphabet)) < len(alphabet):
        raise UserError(f"the tokenizer of {directory} has the alphabet {shown(alphabet)}: it must be letters.")
    tokenizer = CharacterTokenizer(alphabet)
    if rows is not None and tokenizer.vocab_size > rows:
        raise UserError(f"the tokenizer of {directory} has {tokenizer.vocab_size} ids, but its embedding {rows} rows.")
    return tokenizer


def fitted(tokenizer: Any, stops: Sequence[int], rows: int | None, where: Path) -> HuggingFaceTokenizer:
    """The tokenizer of transformers as ours. Raises `UserError` if it does not fit the embedding, or does not work.

    Special tokens beyond the embedding are allowed, as Gemma 3's for pictures: a text with one of them is refused.
    """
    with _one_sentence(f"the tokenizer of {where} cannot be used"):
        made = HuggingFaceTokenizer(tokenizer, stops, rows, where)
        vocabulary = tokenizer.get_vocab()
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = [i for i in vocabulary.values() if rows is not None and i >= rows and i not in special]
    needed = [i for i in (*made.stop_ids, made.pad_id, made.bos_id) if i is not None]
    if beyond or not all(0 <= i < (len(vocabulary) if rows is None else rows) for i in needed):
        raise UserError(
            f"the tokenizer of {where} has the id {max([*beyond, *needed])}, but the embedding has {rows} rows: "
            "the tokenizer belongs to another model."
        )
    return made


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a JSON object.")
    return content


def quiet() -> None:
    """Suppresses the message of transformers that torch is not installed."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
