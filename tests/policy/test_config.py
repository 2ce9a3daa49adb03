"""Reading and writing config.json, and the frequencies of rotary embeddings."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import ScratchConfig
from grpo_jax.policy.config import ModelConfig, RopeConfig, from_hf, from_scratch, inverse_frequencies, to_hf

GOLDEN = Path(__file__).parents[1] / "golden" / "policies"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def read(family: str, **options) -> ModelConfig:
    return from_hf({"model_type": family, **SIZES, **options})


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_a_config_that_is_written_reads_back_as_the_same(name):
    config = from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    assert hash(config) == hash(from_hf(to_hf(config)))


def test_a_scratch_config_reads_back_as_the_same():
    config = from_scratch(ScratchConfig())
    assert from_hf(to_hf(config)) == config
    assert (config.vocab_size, config.head_dim, config.tied) == (29, 16, True)


@pytest.mark.parametrize("scratch", [ScratchConfig("abc", 24, 3, 2), ScratchConfig()])
def test_a_scratch_config_is_a_small_llama_of_its_sizes(scratch):
    head_dim = scratch.hidden_size // scratch.num_heads
    assert from_scratch(scratch) == ModelConfig(
        len(scratch.alphabet) + 3, scratch.hidden_size, 4 * scratch.hidden_size, scratch.num_layers, scratch.num_heads,
        scratch.num_heads, head_dim, 2048, sliding_layers=(False,) * scratch.num_layers, query_scale=head_dim**-0.5,
        tied=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_what_is_written_is_what_was_read(name):
    given = json.loads((GOLDEN / name / "config.json").read_text())
    written = to_hf(from_hf(given))
    other = ("rope_scaling", "rope_parameters", "max_window_layers")  # the same thing said in another way
    known = {key: value for key, value in written.items() if key in given and key not in other}
    assert known == {key: given[key] for key in known} and len(known) > 12
    assert written["architectures"] == given["architectures"]


REQUIRED = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        # Positions, heads of keys and values, size of a head, window, caps, scale of the query, tied.
        ("llama", (2048, 32, 1, None, None, None, 1.0, False)),
        ("mistral", (131072, 8, 1, 4096, None, None, 1.0, False)),
        ("qwen2", (32768, 32, 1, None, None, None, 1.0, False)),
        ("qwen3", (32768, 32, 128, None, None, None, 128**-0.5, False)),
        ("gemma2", (8192, 4, 256, 4096, 50.0, 30.0, 1 / 16, True)),
        ("gemma3_text", (131072, 4, 256, 4096, None, None, 1 / 16, True)),
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_assumes(family, expected):
    given = {"model_type": family, **REQUIRED, "num_attention_heads": 32}
    if family in ("llama", "mistral", "qwen2"):
        given["head_dim"] = 2  # 32 heads of 1 would be odd
        expected = (*expected[:2], 2, *expected[3:6], 2**-0.5, expected[7])
    config = from_hf(given)
    found = (
        config.max_positions, config.num_kv_heads, config.head_dim, config.sliding_window, config.attention_softcap,
        config.final_softcap, config.query_scale, config.tied,
    )  # fmt: skip
    assert found == expected
    assert config.norm_eps == 1e-6 and config.family == family
    gemma = family.startswith("gemma")
    assert config.activation == ("gelu_tanh" if gemma else "silu")
    assert (config.post_norms, config.norm_offset) == (gemma, float(gemma))
    assert config.embed_scale == (32**0.5 if gemma else 1.0)
    assert config.qk_norm == (family in ("qwen3", "gemma3_text"))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (family == "qwen2", False, False)


def test_what_a_config_says_is_read():
    said = {
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "head_dim": 10, "hidden_act": "gelu", "attention_bias": True,
        "num_key_value_heads": None,
    }  # fmt: skip
    config = read("llama", **said)
    assert (config.norm_eps, config.tied, config.head_dim, config.activation) == (1e-5, True, 10, "gelu")
    assert (config.num_kv_heads, config.max_positions, config.query_scale) == (4, 64, 10**-0.5)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers) == (64, 32, 48, 4)
    assert read("qwen3", attention_bias=True).o_bias and read("qwen3", attention_bias=True).qkv_bias
    assert read("gemma2", query_pre_attn_scalar=64).query_scale == 1 / 8
    assert read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=7.0).attention_softcap is None
    assert read("gemma2", final_logit_softcapping=7.0).final_softcap == 7.0
    assert [read("llama", hidden_act=name).activation for name in ("swish", "gelu_new")] == ["silu", "gelu_tanh"]
    with pytest.raises(UserError, match="num_hidden_layers = True: it must be a positive integer"):
        read("llama", num_hidden_layers=True)
    for wrong in (0, -1):
        with pytest.raises(UserError, match=f"config.json of model_type 'llama' has vocab_size = {wrong}"):
            read("llama", vocab_size=wrong)


def test_old_and_new_spelling_of_rotary_embeddings_mean_the_same():
    old = read("llama", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = read("llama", rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    assert old == new
    assert old.rope == RopeConfig(5e5, "linear", 2.0)


def test_old_and_new_spelling_of_gemma3_mean_the_same():
    old = read("gemma3_text", rope_theta=1e5, rope_local_base_freq=100.0, sliding_window_pattern=2)
    new = read(
        "gemma3_text",
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    )
    assert old == new
    assert (old.rope.theta, old.local_rope.theta) == (1e5, 100.0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_null_in_rope_parameters_stands_for_the_default(family):
    nulls = {"full_attention": {"rope_type": "default", "rope_theta": None}, "sliding_attention": None}
    assert read(family, rope_parameters=nulls) == read(family)
    assert read("llama", rope_parameters={"rope_theta": None}, rope_theta=5e5).rope == RopeConfig(5e5)


def test_gemma3_published_config_with_its_gaps_is_read():
    config = from_hf(
        {
            "model_type": "gemma3",
            "vision_config": {"hidden_size": 1152},
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        }
    )
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert (config.rope, config.local_rope) == (RopeConfig(1e6, "linear", 8.0), RopeConfig(1e4))
    assert config.sliding_layers[:7] == (
        True,
        True,
        True,
        True,
        True,
        False,
        True,
    )  # every sixth is full
    assert config.query_scale == 1 / 16 and config.embed_scale == 2560**0.5 and config.tied
    assert to_hf(config)["model_type"] == "gemma3_text"


@pytest.mark.parametrize(
    ("family", "options", "window", "layers"),
    [
        ("llama", {"sliding_window": 8}, None, (False, False, False, False)),
        ("mistral", {"sliding_window": 8}, 8, (True, True, True, True)),
        ("mistral", {"sliding_window": None}, None, (False, False, False, False)),
        ("mistral", {}, 4096, (True, True, True, True)),
        ("qwen2", {"sliding_window": 8}, None, (False, False, False, False)),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, 8, (False,) * 3 + (True,)),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8, (True,) * 4),
        ("gemma2", {"sliding_window": 8}, 8, (True, False, True, False)),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 3}, 8, (True, True, False, True)),
    ],
)
def test_which_layers_slide(family, options, window, layers):
    config = read(family, **options)
    assert (config.sliding_window, config.sliding_layers) == (window, layers)


def test_biases_follow_the_family():
    assert read("qwen2").qkv_bias and not read("qwen2").o_bias
    with_bias = read("llama", attention_bias=True, mlp_bias=True)
    assert with_bias.qkv_bias and with_bias.o_bias and with_bias.mlp_bias
    assert not read("mistral", attention_bias=True).qkv_bias  # as in transformers, whose Mistral has no biases


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "llama", "gemma3_text"]),
        ({}, ["model_type None"]),
        ({"model_type": "llama", **SIZES, "hidden_size": "32"}, ["hidden_size = '32'", "positive integer"]),
        ({"model_type": "llama", **{k: v for k, v in SIZES.items() if k != "vocab_size"}}, ["no vocab_size"]),
        ({"model_type": "llama", **SIZES, "quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"model_type": "llama", **SIZES, "hidden_act": "relu2"}, ["'relu2'", "silu"]),
        ({"model_type": "llama", **SIZES, "rope_scaling": {"type": "dynamic", "factor": 2}}, ["'dynamic'", "yarn"]),
        ({"model_type": "llama", **SIZES, "rope_scaling": {"type": "linear"}}, ["'linear'", "'factor'"]),
        ({"model_type": "llama", **SIZES, "partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"model_type": "llama", **SIZES, "num_key_value_heads": 3}, ["num_key_value_heads = 3"]),
        ({"model_type": "llama", **SIZES, "head_dim": 7}, ["head_dim = 7"]),
        ({"model_type": "gemma2", **SIZES, "layer_types": ["full_attention"]}, ["1 layers", "num_hidden_layers = 4"]),
        ({"model_type": "qwen3", **SIZES, "layer_types": ["chunked_attention"] * 4}, ["'chunked_attention'"]),
        ({"model_type": "qwen3", **SIZES, "layer_types": ["sliding_attention"] * 4}, ["sliding_window = None"]),
        ({"model_type": "gemma3_text", **SIZES, "use_bidirectional_attention": True}, ["causal"]),
        ({"model_type": "gemma3_text", **SIZES, "rope_parameters": {"rope_theta": 1.0}}, ["full_attention"]),
    ],
)
def test_what_cannot_be_read_is_one_clear_sentence(config, words):
    with pytest.raises(UserError) as error:
        from_hf(config)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_default_frequencies_by_hand():
    # head_dim 4, theta 100: 100^0 = 1 and 100^(-2/4) = 1/10
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(100.0), 4), [1.0, 0.1], rtol=1e-6)
    assert inverse_frequencies(RopeConfig(), 64).dtype == np.float32


def test_linear_scaling_divides_every_frequency():
    scaled = inverse_frequencies(RopeConfig(100.0, "linear", 4.0), 4)
    np.testing.assert_allclose(scaled, [0.25, 0.025], rtol=1e-6)


def test_llama3_scaling_by_hand():
    # theta 100, head_dim 8: frequencies 1, 10^-.5, 10^-1, 10^-1.5; in 64 positions they turn 10.2, 3.22, 1.02, 0.322
    # times. From 4 turns on a frequency does not change; up to 1 turn it is divided by 8; 3.22 turns are at
    # (3.22 - 1) / 3 = 0.74 of the way between.
    rope = RopeConfig(100.0, "llama3", 8.0, 1.0, 4.0, original_max_positions=64)
    plain = 10.0 ** -np.arange(0, 2, 0.5)
    turns = 64 * plain / (2 * math.pi)
    blend = [1.0, (turns[1] - 1) / 3, (turns[2] - 1) / 3, 0.0]
    expected = [f * (b + (1 - b) / 8) for f, b in zip(plain, blend, strict=True)]
    np.testing.assert_allclose(inverse_frequencies(rope, 8), expected, rtol=1e-5)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    rope = from_hf(
        {
            "model_type": "qwen2",
            **SIZES,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        }
    ).rope
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)  # equation 22 of the paper
    ratio = inverse_frequencies(rope, 64) / inverse_frequencies(RopeConfig(), 64)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(0.25)
    assert np.all(np.diff(ratio) <= 1e-6)


def test_yarns_ramp_may_end_beyond_the_last_frequency():
    # Dimension d of a head of 8 turns 64 / (2 pi) 100^(-d / 8) times in the original context of 64: twice at
    # d = 8 ln(64 / (4 pi)) / ln 100 / 2 = 1.41, and a quarter of once at 3.22. Rounded outwards the ramp goes from 1 to
    # 4, though the four frequencies end at 3: its shares s are 0, 0, 1/3, 2/3, and 1 - s + s / 4 is left of each.
    rope = RopeConfig(100.0, "yarn", 4.0, original_max_positions=64, beta_fast=2.0, beta_slow=0.25)
    ratio = inverse_frequencies(rope, 8) / inverse_frequencies(RopeConfig(100.0), 8)
    np.testing.assert_allclose(ratio, [1, 1, 0.75, 0.5], rtol=1e-6)
