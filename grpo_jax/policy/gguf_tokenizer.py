"""Tokenizers of GGUF files: byte-level byte pairs, made from the file's metadata."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError, one_line, shown
from grpo_jax.experiment.checked import admits
from grpo_jax.policy.tokenizer import Tokenizer, fitted, quiet

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


def from_gguf(path: Path, metadata: Mapping[str, Any], rows: int | None = None) -> Callable[[], Tokenizer] | None:
    """Returns a function that makes the tokenizer of a GGUF file from its metadata; None if it has no tokenizer."""
    if "tokenizer.ggml.tokens" not in metadata:
        return None

    def make() -> Tokenizer:
        _check(path, metadata)
        quiet()
        from transformers import PreTrainedTokenizerFast

        def token(kind: str) -> str | None:
            index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
            return None if index is None else metadata["tokenizer.ggml.tokens"][index]

        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_pairs(path, metadata),
            chat_template=metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
            **{f"{role}_token": name for role, key in names.items() if (name := token(key)) is not None},
        )
        end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
        return fitted(tokenizer, [] if end_of_turn is None else [end_of_turn], rows, path)

    return make


_FIELDS: dict[str, Any] = {
    "tokens": list[str],
    "merges": list[str],
    "token_type": list[int],
    "add_space_prefix": bool,
    "add_bos_token": bool,
    **{f"{kind}_token_id": int for kind in ("bos", "eos", "eot", "padding", "unknown")},
}


def _check(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raises `UserError` for metadata of which no tokenizer can be made."""
    tokens = metadata["tokenizer.ggml.tokens"]
    for key, wanted in _FIELDS.items():
        value = metadata.get(f"tokenizer.ggml.{key}")
        if f"tokenizer.ggml.{key}" in metadata and not admits(wanted, value):
            raise UserError(f"{path} has tokenizer.ggml.{key} = {shown(value)}, which must be {wanted}.")
        if key.endswith("_id") and value is not None and not 0 <= value < len(tokens):
            raise UserError(f"{path} has tokenizer.ggml.{key} = {value}, but {len(tokens)} tokens.")
    if len(set(tokens)) != len(tokens) or not tokens:
        raise UserError(f"{path} has {len(tokens)} tokens of which some are the same: each must be there once.")
    if len(metadata.get("tokenizer.ggml.token_type", tokens)) != len(tokens):
        raise UserError(f"{path} has another number of token types than of tokens, {len(tokens)}.")
    if any(merge.count(" ") != 1 for merge in metadata.get("tokenizer.ggml.merges", ())):
        raise UserError(f"{path} has a merge of other than two parts.")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path} has tokenizer.chat_template = {shown(template)}, which must be a text.")


def _byte_pairs(path: Path, metadata: Mapping[str, Any]) -> Any:
    """Makes a `tokenizers.Tokenizer` with byte-level BPE (GGUF's model "gpt2")."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    model, kind = get("model"), get("pre", "default")
    if model != "gpt2" or not isinstance(kind, str) or kind not in _PRE_TOKENIZERS:
        raise UserError(
            f"{path} has a tokenizer of model {shown(model)} and pre-tokenizer {shown(kind)}: from GGUF files only "
            f"byte-level tokenizers ('gpt2') with one of {', '.join(_PRE_TOKENIZERS)} can be read."
        )
    tokens = get("tokens")
    split = _PRE_TOKENIZERS[kind]
    try:
        pairs = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in get("merges", [])],
            ignore_merges=split == _LLAMA3_SPLIT,
        )
    except Exception as error:  # of Rust, such as for a merge whose parts are no tokens
        raise UserError(f"{path} has a tokenizer that cannot be made: {one_line(error)}.") from None
    tokenizer = Tokenizer(pairs)
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
