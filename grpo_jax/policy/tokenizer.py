"""Tokenizers: text to token ids and back. Only this module of the policy deals with text.

Never derive a mask from ids: a pad token can occur inside a prompt (SmolLM2 pads with its end-of-turn token). Only
lengths tell what is padding. The import of transformers takes a second, so only a tokenizer that needs it imports it.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_jax.errors import UserError

Messages = Sequence[Mapping[str, str]]
"""Chat messages with the keys "role" and "content"."""

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
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.vocab_size: int = len(tokenizer)
        self.has_chat_template = bool(tokenizer.chat_template)
        ends = [tokenizer.eos_token_id, *stop_ids, self._end_of_turn()]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))
        if not self.stop_ids:
            raise UserError("the tokenizer has no end-of-sequence token, so a policy could never stop.")
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.stop_ids[0] if pad is None else pad

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens before or after it."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens and with its white space unchanged."""
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
            before = [i for i in self._tokenizer.encode("") if i == self.bos_id]  # without an end-of-sequence token
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
        """Renders the chat. `open_turn` begins an assistant turn at the end; `continues` keeps the last turn open."""
        if not self.has_chat_template:
            raise UserError(
                "this policy's tokenizer has no chat template, so its prompts must be plain texts, not chat messages."
            )
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=open_turn and not continues,
                continue_final_message=continues,
            )
        except TemplateError as error:  # an unknown role, or an order of roles that is not allowed
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template does not accept messages of the roles {roles}: {error}.") from None

    def _end_of_turn(self) -> int | None:
        """Returns the special token with which the chat template ends an assistant's turn; None if there is none."""
        if not self.has_chat_template:
            return None
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        ids = self.encode(self._chat(turns, open_turn=False).rpartition(_MARK)[2].lstrip())
        token = self._tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
        return ids[0] if token is not None and token.special else None


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


def from_directory(directory: Path) -> Callable[[], Tokenizer] | None:
    """Returns a function that makes the tokenizer of a Hugging Face directory; None if it has no tokenizer."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None

    def make() -> Tokenizer:
        config, generation = _json(directory / "tokenizer_config.json"), _json(directory / "generation_config.json")
        if _ALPHABET_KEY in config:
            return CharacterTokenizer(config[_ALPHABET_KEY])
        _quiet()
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # the exceptions differ from tokenizer to tokenizer
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"transformers cannot load the tokenizer of {directory}: {reason}") from None
        stops = generation.get("eos_token_id") or []
        return HuggingFaceTokenizer(tokenizer, [stops] if isinstance(stops, int) else stops)

    return make


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def _quiet() -> None:
    """Suppresses the message of transformers that torch is not installed."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


# Pre-tokenizers by their GGUF name. The regular expressions are those of the models' own tokenizer.json files.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "smollm": "digits",
    "default": "gpt2",
    "gpt-2": "gpt2",
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}
_CONTROL, _USER_DEFINED = 3, 4


def from_gguf(path: Path, metadata: Mapping[str, Any]) -> Callable[[], Tokenizer] | None:
    """Returns a function that makes the tokenizer of a GGUF file from its metadata; None if it has no tokenizer."""
    if "tokenizer.ggml.tokens" not in metadata:
        return None

    def make() -> Tokenizer:
        _quiet()
        from transformers import PreTrainedTokenizerFast

        def token(kind: str) -> str | None:
            index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
            return None if index is None else metadata["tokenizer.ggml.tokens"][index]

        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_pairs(path, metadata),
            chat_template=metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length"),
            **{f"{role}_token": name for role, key in names.items() if (name := token(key)) is not None},
        )
        end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
        return HuggingFaceTokenizer(tokenizer, [] if end_of_turn is None else [end_of_turn])

    return make


def _byte_pairs(path: Path, metadata: Mapping[str, Any]) -> Any:
    """Makes a `tokenizers.Tokenizer` with byte-level BPE (GGUF's model "gpt2")."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    model, kind = get("model"), get("pre", "default")
    if model != "gpt2" or kind not in _PRE_TOKENIZERS:
        raise UserError(
            f"{path} has a tokenizer of model {model!r} and pre-tokenizer {kind!r}: from GGUF files only "
            f"byte-level tokenizers ('gpt2') with one of {', '.join(_PRE_TOKENIZERS)} can be read."
        )
    tokens = get("tokens")
    split = _PRE_TOKENIZERS[kind]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in get("merges")],
            ignore_merges=split == _LLAMA3_SPLIT,
        )
    )
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=bool(get("add_space_prefix", False)), use_regex=True)
    if split == "gpt2":
        tokenizer.pre_tokenizer = by_words
    elif split == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_words])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    for token, role in zip(tokens, get("token_type", [1] * len(tokens)), strict=True):
        if role in (_CONTROL, _USER_DEFINED):
            added = [AddedToken(token, special=role == _CONTROL, normalized=False)]
            (tokenizer.add_special_tokens if role == _CONTROL else tokenizer.add_tokens)(added)
    bos = get("bos_token_id")
    if get("add_bos_token", False) and bos is not None:
        special = [(tokens[bos], bos)]
        tokenizer.post_processor = processors.TemplateProcessing(f"{tokens[bos]} $A", special_tokens=special)
    return tokenizer
