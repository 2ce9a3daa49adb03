"""A GGUF file that is damaged or hostile is read or refused in one sentence, before memory is taken for it."""

import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from malformed import answer, damaged, fuzz, mutated

from grpo_jax import policy
from grpo_jax.policy.gguf_tokenizer import from_gguf

gguf = pytest.importorskip("gguf")
METADATA = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{% for m in messages %}a{{ m['content'] }}<|end|>{% endfor %}",
}
CHAT = [{"role": "user", "content": "ab"}]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file_of(fields: dict[str, tuple[int, bytes]], tensors: list[bytes] = ()) -> bytes:
    """A GGUF file with these fields, each a kind and its bytes, and these descriptions of tensors."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    return header + b"".join(text(k) + struct.pack("<I", n) + b for k, (n, b) in fields.items()) + b"".join(tensors)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> bytes:
    """A whole file: a policy of one layer, without a tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 16, "embedding_length": 8, "feed_forward_length": 8}
    for name, size in (sizes | {"attention.head_count": 2, "attention.head_count_kv": 2}).items():
        writer.add_uint32(f"llama.{name}", size)
    np = pytest.importorskip("numpy")
    layer = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{name}.weight": (8, 8) for name in layer} | {"token_embd.weight": (5, 8)}
    shapes |= {name: (8,) for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_the_file_itself_loads(made, tmp_path):
    (tmp_path / "x.gguf").write_bytes(made)
    assert policy.load(tmp_path / "x.gguf").config.hidden_size == 8


def test_a_damaged_file_is_read_or_refused(made, tmp_path):
    header = made[: made.index(b"output_norm") + 400]
    places = st.integers(0, len(header))
    numbers = st.sampled_from([0, 1, 2**31, 10**8, 2**62, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n))
    overwritten = st.tuples(places, numbers).map(lambda x: made[: x[0]] + x[1] + made[x[0] + 8 :])

    @given(damaged(made) | overwritten)
    @fuzz(120)
    def check(content):
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        answer(lambda: policy.weights.read(path))

    check()


HOSTILE = {
    "a text of 2**63 bytes": file_of({"a": (8, struct.pack("<Q", 2**63))}),
    "an array of 10**8 texts": file_of({"a": (9, struct.pack("<IQ", 8, 10**8))}),
    "an array of 10**8 arrays": file_of({"a": (9, struct.pack("<IQ", 9, 10**8))}),
    "an array of 2**62 numbers": file_of({"a": (9, struct.pack("<IQ", 10, 2**62))}),
    "arrays in arrays": file_of({"a": (9, struct.pack("<IQ", 9, 1) * 5000)}),
    "an unknown kind": file_of({"a": (99, b"")}),
    "2**60 fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "2**60 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
    "no axis": file_of({}, [tensor("a.b", ())]),
    "2**31 axes": file_of({}, [text("a.b") + struct.pack("<I", 2**31)]),
    "a tensor of 2**64 numbers": file_of({}, [tensor("a.b", (2**32, 2**32))]),
    "a tensor whose place overflows": file_of({}, [tensor("a.b", (1,), offset=2**64 - 1)]),
    "an alignment of 0": file_of({"general.alignment": (4, struct.pack("<I", 0))}),
    "no more than the letters": b"GGUF",
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_refused_at_once(tmp_path, what):
    (tmp_path / "x.gguf").write_bytes(HOSTILE[what])
    assert isinstance(answer(lambda: policy.weights.read(tmp_path / "x.gguf")), str)


def test_the_number_of_layers_is_bounded_by_what_a_model_has(made, tmp_path):
    key = text("llama.block_count") + struct.pack("<I", 4)
    at = made.index(key) + len(key)
    (tmp_path / "x.gguf").write_bytes(made[:at] + struct.pack("<I", 10**8) + made[at + 4 :])
    assert "at most 4096" in answer(lambda: policy.weights.read(tmp_path / "x.gguf"))


@given(mutated(METADATA))
@example({**METADATA, "tokenizer.ggml.eos_token_id": 2**31})
@example({**METADATA, "tokenizer.ggml.merges": ["a c", "b"]})
@fuzz(80)
def test_any_tokenizer_of_a_file_is_made_or_refused(metadata):
    if not isinstance(metadata, dict) or (make := from_gguf(Path("x.gguf"), metadata)) is None:
        return
    answer(lambda: [make().render(prompt) for prompt in ("ab", CHAT)])


def test_the_tokenizer_itself_is_made():
    tokenizer = from_gguf(Path("x.gguf"), METADATA)()
    assert (tokenizer.render("ab"), tokenizer.render(CHAT)) == ([0, 3], [1, 3, 0])
