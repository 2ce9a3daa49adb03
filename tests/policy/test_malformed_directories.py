"""A Hugging Face directory that is damaged or hostile is loaded or refused in one sentence, before memory is taken."""

import json
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import answer, as_json, damaged, fuzz, json_files, mutated
from safetensors.numpy import load_file, save_file

from grpo_jax import policy
from grpo_jax.errors import UserError
from grpo_jax.experiment import ScratchConfig

TINY = ScratchConfig("abcd", hidden_size=8, num_layers=1, num_heads=2)
TEMPLATE = "{% for m in messages %}a{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}b{% endif %}"
# The sizes and options of every family, so that a mutation finds those that only one of them reads.
FAMILIES = {
    "llama": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "rope_theta": 1e6},
    "qwen3": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}},
    "mistral": {"sliding_window": 4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "gemma2": {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 50.0, "layer_types": ["sliding_attention"]},
    "gemma3_text": {"query_pre_attn_scalar": 4, "sliding_window_pattern": 6, "sliding_window": 4},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A policy in two shards with their index, whose tokenizer is one of transformers and has a chat template."""
    place = tmp_path_factory.mktemp("made") / "policy"
    policy.export(policy.load("scratch", scratch=TINY), place)
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    placed = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in placed if placed[name] == file}, place / file)
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    config = json.loads((place / "tokenizer_config.json").read_text())
    del config["grpo_jax_alphabet"]
    (place / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return place


@pytest.fixture
def directory(made, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("copy") / "policy"
    shutil.copytree(made, place)
    return place


def load(directory: Path) -> policy.Policy:
    """Loads a policy, its tokenizer and a prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of what it does not know
        found = policy.load(directory)
        assert all(np.isfinite(x).all() for x in found.params.values())
        if found.tokenizer is not None:
            rows = found.config.vocab_size
            asked = [found.tokenizer.render("abab"), answer(lambda: found.tokenizer.render(CHAT))]
            asked.append(answer(lambda: found.tokenizer.reply("ba")))
            assert isinstance(answer(lambda: found.tokenizer.decode(range(rows))), str)
            assert all(isinstance(ids, str) or all(0 <= i < rows for i in ids) for ids in asked)
        return found


CHAT = [{"role": "user", "content": "ab"}]


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(directory)
    return str(caught.value)


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_directory_itself_loads(directory):
    assert load(directory).tokenizer.render(CHAT) == [3, 3, 4, 2, 4]  # a, ab, end, b


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_json_file_of_a_directory_is_read_or_refused(made, directory, name):
    @given(json_files(json.loads((made / name).read_text())))
    @fuzz(25 if name != "tokenizer_config.json" else 15)
    def check(content):
        (directory / name).write_bytes(content)
        answer(lambda: load(directory))

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_options_of_a_family_are_read_or_refused(made, directory, family):
    valid = json.loads((made / "config.json").read_text()) | {"model_type": family, **FAMILIES[family]}

    @given(mutated(valid))
    @fuzz(60)
    def check(content):
        (directory / "config.json").write_bytes(as_json(content))
        answer(lambda: policy.weights.read(directory))

    check()


def test_a_tokenizer_file_is_read_or_refused(made, directory):
    @given(json_files(json.loads((made / "tokenizer.json").read_text())))
    @fuzz(25)
    def check(content):
        (directory / "tokenizer.json").write_bytes(content)
        answer(lambda: load(directory))

    check()


@st.composite
def misplaced(draw, header: dict) -> dict:
    """A header some of whose tensors are elsewhere, have another shape, or are of another kind of number."""
    numbers = st.sampled_from([0, 1, 2, 4, 31, 32, 33, 64, 2**31, 2**53, 2**63, 2**64, -1])
    changes = {
        "data_offsets": st.lists(numbers, max_size=3) | st.sampled_from([t["data_offsets"] for t in header.values()]),
        "shape": st.lists(numbers, max_size=4),
        "dtype": st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "C64", "I64", "U8", "BOOL", "F", ""]),
    }  # fmt: skip
    header = {name: dict(tensor) for name, tensor in header.items()}
    for _ in range(draw(st.integers(1, 3))):
        name, key = draw(st.sampled_from(sorted(header))), draw(st.sampled_from(sorted(changes)))
        header[draw(st.sampled_from([name, name, "model.norm.weight"]))] = header[name] | {key: draw(changes[key])}
    return header


def headers(valid: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header: its length, its JSON, or the bytes after it."""
    (size,) = struct.unpack("<Q", valid[:8])
    header, data = json.loads(valid[8 : 8 + size]), valid[8 + size :]
    texts = (mutated(header) | misplaced(header)).map(as_json)
    lengths = st.sampled_from([None, 0, 2**31, 2**63, 2**64 - 1])
    return st.tuples(texts, lengths).map(lambda x: struct.pack("<Q", len(x[0]) if x[1] is None else x[1]) + x[0] + data)


def test_a_file_of_weights_is_read_or_refused(made, directory):
    valid = (made / "part-0.safetensors").read_bytes()

    @given(headers(valid) | damaged(valid))
    @fuzz(60)
    def check(content):
        (directory / "part-0.safetensors").write_bytes(content)
        answer(lambda: policy.weights.read(directory))

    check()


def test_a_file_of_a_template_is_read_or_refused(directory):
    hostile = [
        b"{{ 'x' * 10**10 }}",
        b"{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        b"{{ raise_exception(1) }}",
        b"{% if %}",
    ]

    @given(damaged(TEMPLATE.encode()) | st.sampled_from(hostile))
    @fuzz(30)
    def check(content):
        (directory / "chat_template.jinja").write_bytes(content)
        answer(lambda: load(directory))

    check()


@pytest.mark.parametrize("name", ["../part-0.safetensors", "/etc/passwd", "a/../../x", "..", "", "a\\b", "a\0b"])
def test_an_index_names_files_beside_it_alone(directory, name):
    placed = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    change(directory / "model.safetensors.index.json", weight_map=placed | {"lm_head.weight": name})
    assert "it must be the name of a file beside it." in refusal(directory)


def test_a_name_in_the_index_that_no_file_can_have_is_a_file_that_is_lacking(directory):
    placed = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    change(directory / "model.safetensors.index.json", weight_map=placed | {"lm_head.weight": "x" * 300})
    assert f"{directory} lacks xxx" in refusal(directory)


@pytest.mark.parametrize("size", ["hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "head_dim"])
@pytest.mark.parametrize("value", [2**24, 2**31, 2**63, 10**30])
def test_a_size_that_no_file_has_takes_no_memory(directory, size, value):
    change(directory / "config.json", **{size: value})
    assert isinstance(answer(lambda: load(directory)), str)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(directory, dtype, value):
    tensors = load_file(directory / "part-0.safetensors")
    name = sorted(tensors)[0]
    tensors[name].reshape(-1)[3] = value
    save_file(tensors, directory / "part-0.safetensors")
    with pytest.raises(UserError, match=f"has a NaN or an infinite number in the tensor '{name}'"):
        policy.load(directory, dtype=dtype)


def test_code_in_a_directory_is_neither_run_nor_asked_about(directory, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the terminal was asked"))
    change(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class="Own")
    (directory / "own.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\nclass Own: pass\n")
    answer(lambda: load(directory))
    assert not (directory / "ran").exists()


def test_a_pattern_that_never_ends_is_one_sentence(directory):
    """Oniguruma gives up, and Rust panics."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": both}))
    encoder = load(directory).require_tokenizer()
    found = answer(lambda: encoder.encode("a" * 40 + "b"))
    assert found.startswith(f"the tokenizer of {directory} cannot encode 'aaaa") and found.endswith("-match over.")


def test_a_tokenizer_of_another_model_is_refused(directory):
    vocabulary = json.loads((directory / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["e"] = 7
    (directory / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "has the id 7, but the embedding has 7 rows: the tokenizer belongs to another model." in refusal(directory)


def test_a_special_token_beyond_the_embedding_is_refused_where_a_text_has_it(directory):
    """As Gemma 3's for pictures, which a model of texts has no row for."""
    vocabulary = json.loads((directory / "tokenizer.json").read_text())
    token = {"id": 7, "content": "<picture>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocabulary["added_tokens"].append(token | flags)
    (directory / "tokenizer.json").write_text(json.dumps(vocabulary))
    tokenizer = load(directory).require_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.encode("ab")) == (7, [3, 4])
    with pytest.raises(UserError, match="the text has the token '<picture>', for which the policy's embedding has no"):
        tokenizer.encode("a<picture>")
