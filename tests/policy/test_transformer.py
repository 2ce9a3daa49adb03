"""The forward: a shared prefix is a repeated prompt, and caches, scans, remat and padding change nothing.

The reference is the same forward in its simplest use: every completion is a row that begins with its own copy of the
prompt, without padding on the left, prefix or cache. test_parity.py checks that it computes what transformers computes.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.experiment import LoRAConfig
from grpo_jax.logprobs import Completions, completion_logprobs
from grpo_jax.policy import transformer
from grpo_jax.policy.config import ModelConfig, RopeConfig
from grpo_jax.policy.layers import ACTIVATIONS, matmul_f32
from grpo_jax.policy.transformer import KeyValues, TokenRows, bind, forward, prefill, unstack

LORA = LoRAConfig(rank=3, alpha=6.0, targets=("q", "down"))
LLAMA = ModelConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
    sliding_layers=(False,) * 3,
    query_scale=0.5,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)
# All that Gemma 2 and Gemma 3 add: layers of two kinds, each with its window and its rotation; soft caps; norms.
GEMMA = replace(
    LLAMA,
    sliding_window=4,
    sliding_layers=(True, False, True),
    local_rope=RopeConfig(theta=50.0),
    attention_softcap=2.0,
    final_softcap=3.0,
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    embed_scale=4.0,
    activation="gelu_tanh",
    tied=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
)
CONFIGS = {"llama": LLAMA, "gemma": GEMMA, "mistral": replace(LLAMA, sliding_window=4, sliding_layers=(True,) * 3)}
some_configs = pytest.mark.parametrize("name", ["llama", "gemma"])

# Three prompts of different lengths that share their first four tokens, two completions each, of different lengths too.
SHARED_LENGTH = 4
LENGTHS = np.array([9, 5, 7])
PROMPTS = np.random.default_rng(0).integers(0, 29, (3, 9))
PROMPTS[:, :SHARED_LENGTH] = PROMPTS[0, :SHARED_LENGTH]
TOKENS = np.random.default_rng(1).integers(0, 29, (3, 2, 5))
SIZES = np.array([[5, 2], [1, 5], [3, 4]])
VALID = np.arange(5) < SIZES[..., None]
WEIGHTS = np.random.default_rng(2).normal(size=TOKENS.shape) * VALID  # of the log-probabilities in the loss


@cache
def parameters(name: str) -> dict[str, jax.Array]:
    """Parameters without values that could hide a mistake: biases and lora_b are not 0, and scales are not 1."""
    params = transformer.initialise(CONFIGS[name], 0, lora=LORA)
    noise = np.random.default_rng(3)
    return {path: x + 0.2 * noise.normal(size=x.shape).astype(np.float32) for path, x in sorted(params.items())}


def shared_logprobs(model, prompts=PROMPTS, tokens=TOKENS, **options):
    """[P, G, T], computed as the trainer computes them."""
    completions = Completions(*map(jnp.asarray, (prompts, LENGTHS, tokens, VALID)))
    return completion_logprobs(model, completions, **options)[0]


def repeated_logprobs(model):
    """[P, G, T], with the prompt repeated for every completion and all logits at once."""
    size = LENGTHS.max() + TOKENS.shape[2]
    rows, mask = np.zeros((3, 2, size), int), np.zeros((3, 2, size), bool)
    for p, g in np.ndindex(3, 2):
        row = np.concatenate([PROMPTS[p, : LENGTHS[p]], TOKENS[p, g, : SIZES[p, g]]])
        rows[p, g, : len(row)], mask[p, g, : len(row)] = row, True
    rows, mask = (x.reshape(6, 1, size) for x in (rows, mask))
    positions = jnp.broadcast_to(jnp.arange(size), rows.shape)
    hidden, _ = forward(model, TokenRows(jnp.asarray(rows), positions, jnp.asarray(mask)))
    everything = jax.nn.log_softmax(model.logits(hidden)).reshape(3, 2, size, -1)
    places = LENGTHS[:, None, None] - 1 + np.arange(5) + 0 * TOKENS
    picked = jnp.take_along_axis(everything, places[..., None], axis=2)
    return jnp.take_along_axis(picked, TOKENS[..., None], axis=-1)[..., 0]


@cache
def value_and_gradient(name: str, way: str, unrolled: int = 4):
    """Log-probabilities [P, G, T], 0 where not valid, and the gradient of their weighted sum.

    Policies of more than `unrolled` layers loop over them.
    """
    logprobs_of = {
        "repeated": repeated_logprobs,
        "shared": shared_logprobs,
        "shared_length": partial(shared_logprobs, shared_prefix_length=SHARED_LENGTH, remat=True),
    }[way]

    def loss(params):
        logprobs = logprobs_of(bind(CONFIGS[name], params, LORA))
        return jnp.sum(logprobs * WEIGHTS), jnp.where(VALID, logprobs, 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "UNROLLED_LAYERS", unrolled)
        (_, logprobs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters(name))
    return np.asarray(logprobs), gradient


def assert_same_gradient(actual, expected, tolerance=4e-5):
    # In the gradient of a key's bias, the terms of all keys that a query attends to almost cancel. So its rounding
    # error is the largest: 2.4e-5 with jax 0.12.
    assert actual.keys() == expected.keys()
    for path in expected:
        a, b = np.asarray(actual[path]), np.asarray(expected[path])
        assert np.abs(b).max() > 1e-3, f"{path} is not trained by this test"
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), path


@some_configs
def test_a_shared_prefix_is_a_repeated_prompt_in_values_and_gradients(name):
    expected, expected_gradient = value_and_gradient(name, "repeated")
    logprobs, gradient = value_and_gradient(name, "shared")
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)
    assert_same_gradient(gradient, expected_gradient)
    assert any(path.endswith(".lora_b") for path in gradient)


def test_neither_shared_tokens_nor_remat_nor_a_loop_over_layers_change_values_or_gradients():
    expected, expected_gradient = value_and_gradient("llama", "shared")
    logprobs, gradient = value_and_gradient("llama", "shared_length", unrolled=2)
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)
    assert_same_gradient(gradient, expected_gradient)


@pytest.mark.parametrize(("name", "length"), [("gemma", SHARED_LENGTH), ("mistral", 0), ("mistral", SHARED_LENGTH)])
def test_values_agree_where_gradients_are_not_compared(name, length):
    repeated, shared = (
        np.asarray(jax.jit(lambda params, way=way: way(bind(CONFIGS[name], params, LORA)))(parameters(name)))[VALID]
        for way in (repeated_logprobs, partial(shared_logprobs, shared_prefix_length=length))
    )
    np.testing.assert_allclose(shared, repeated, rtol=0, atol=1e-5)


def test_remat_recomputes_the_layers():
    model = bind(LLAMA, parameters("llama"), LORA)
    with_remat, without = (
        str(jax.make_jaxpr(partial(shared_logprobs, model, remat=remat, chunk=64))().jaxpr).count("prevent_cse")
        for remat in (True, False)
    )
    assert with_remat == without + 2  # the prompt's layers and the completions'


@cache
def compiled(name: str):
    """Log-probabilities of (parameters, prompts, tokens), compiled once for the tests that change the tokens."""
    return jax.jit(lambda params, prompts, tokens: shared_logprobs(bind(CONFIGS[name], params, LORA), prompts, tokens))


@some_configs
def test_the_prompt_reaches_the_completion_through_the_prefix(name):
    # If this failed, agreement with the repeated prompt would mean little.
    changed = PROMPTS.copy()
    changed[:, [0, 3]] = (changed[:, [0, 3]] + 1) % 29
    a, b = (np.asarray(compiled(name)(parameters(name), prompts, TOKENS)) for prompts in (PROMPTS, changed))
    assert np.abs(a - b)[VALID].min() > 1e-6


@some_configs
def test_unrolled_layers_are_the_scanned_ones(name, monkeypatch):
    monkeypatch.setattr(transformer, "UNROLLED_LAYERS", 2)

    @jax.jit
    def both(params):
        model = bind(CONFIGS[name], params, LORA)
        prefix, _ = prefill(model, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS))
        rows = TokenRows(jnp.asarray(TOKENS), LENGTHS[:, None, None] + jnp.arange(5) + 0 * TOKENS, jnp.asarray(VALID))
        scanned = forward(model, rows, prefix=prefix)
        split = prefix._replace(k=tuple(prefix.k), v=tuple(prefix.v))
        unrolled = forward(model, rows, prefix=split, layers=unstack(model))
        return scanned, unrolled

    (scanned, stacked), (unrolled, own) = both(parameters(name))
    assert len(own.k) == len(own.v) == 3
    np.testing.assert_allclose(unrolled, scanned, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.stack(own.k), stacked.k, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.stack(own.v), stacked.v, rtol=0, atol=1e-5)


@some_configs
def test_decoding_token_by_token_through_a_cache_is_one_pass(name):
    c = CONFIGS[name]
    positions = jnp.asarray(LENGTHS[:, None, None] + np.arange(5) + 0 * TOKENS)
    tokens, valid = jnp.asarray(TOKENS), jnp.asarray(VALID)

    @jax.jit
    def at_once(params):
        model = bind(c, params, LORA)
        prefix, _ = prefill(model, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS))
        return prefix, forward(model, TokenRows(tokens, positions, valid), prefix=prefix)[0]

    @jax.jit
    def step(params, prefix, cache, t):
        one = TokenRows(*(jax.lax.dynamic_slice_in_dim(x, t, 1, axis=2) for x in (tokens, positions, valid)))
        return forward(bind(c, params, LORA), one, prefix=prefix, cache=cache, cache_length=t)

    prefix, expected = at_once(parameters(name))
    empty = np.zeros((c.num_layers, 3, 2, c.num_kv_heads, 8, c.head_dim), np.float32)  # three places stay unused
    cache = KeyValues(empty, empty, np.zeros((3, 2, 8), np.int32), np.zeros((3, 2, 8), bool))
    for t in range(5):
        hidden, cache = step(parameters(name), prefix, cache, t)
        where = VALID[:, :, t]
        np.testing.assert_allclose(np.asarray(hidden[:, :, 0])[where], expected[:, :, t][where], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(cache.valid, np.pad(VALID, [(0, 0), (0, 0), (0, 3)]))


@some_configs
def test_padding_changes_nothing(name):
    params = parameters(name)
    expected = np.asarray(compiled(name)(params, PROMPTS, TOKENS))[VALID]

    # No valid token attends to the padding of prompts and completions: results are equal to the last bit.
    other = np.where(np.arange(9) < LENGTHS[:, None], PROMPTS, (PROMPTS + 5) % 29)
    beyond = np.where(VALID, TOKENS, (TOKENS + 7) % 29)
    np.testing.assert_array_equal(np.asarray(compiled(name)(params, other, beyond))[VALID], expected)

    # The amount of padding changes the order of sums, so results are equal up to rounding.
    wider = np.asarray(compiled(name)(params, np.pad(PROMPTS, [(0, 0), (0, 7)]), TOKENS))[VALID]
    np.testing.assert_allclose(wider, expected, rtol=0, atol=1e-5)


def test_a_row_does_not_see_the_other_rows_of_its_group():
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 29
    a, b = (np.asarray(compiled("llama")(parameters("llama"), PROMPTS, tokens)) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(a[:, 1], b[:, 1])
    assert (a[:, 0] != b[:, 0]).all()


@some_configs
def test_bfloat16_weights_give_finite_float32_logits_near_those_of_float32(name):
    exact = parameters(name)
    half = {path: x if "lora_" in path else x.astype(jnp.bfloat16) for path, x in exact.items()}

    @jax.jit
    def logits_of(params):
        model = bind(CONFIGS[name], params, LORA)
        prefix, last = prefill(model, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS))
        return model.logits(last), prefix.k

    logits, keys = logits_of(half)
    assert logits.dtype == jnp.float32 and keys.dtype == jnp.bfloat16
    assert np.isfinite(logits).all()
    expected = np.asarray(logits_of(exact)[0])
    # Eight bits of mantissa over three layers: a difference of a few per cent of the logits' std, and not 0.
    assert 0 < np.abs(logits - expected).max() < 0.15 * expected.std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, inner, columns", [(1, 8, 1), (7, 64, 30), (2, 1, 3)])
@pytest.mark.parametrize("i, j", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_matrix_products_and_their_gradients_are_float32s_to_the_rounding_of_the_dtype(
    i, j, rows, inner, columns, dtype
):
    """For every pair of axes, compared with NumPy's float64 products of the same rounded numbers."""
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(rows, inner) if i else (inner, rows)), dtype)
    b = jnp.asarray(rng.normal(size=(columns, inner) if j else (inner, columns)), dtype)
    weights = jnp.asarray(rng.normal(size=(rows, columns)), jnp.bfloat16).astype(jnp.float32)
    wide_a, wide_b = (np.asarray(x, np.float64) for x in (a, b))
    wide_a, wide_b = wide_a if i else wide_a.T, wide_b.T if j else wide_b
    product = jax.jit(matmul_f32, static_argnums=(2, 3))(a, b, i, j)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, wide_a @ wide_b, rtol=1e-5, atol=1e-5)
    da, db = jax.grad(lambda a, b: (matmul_f32(a, b, i, j) * weights).sum(), (0, 1))(a, b)
    assert (da.dtype, da.shape, db.dtype, db.shape) == (a.dtype, a.shape, b.dtype, b.shape)
    tolerance = {"float32": 1e-5, "bfloat16": 2**-8}[dtype]  # the gradients are rounded once, to the dtype
    expected = weights @ wide_b.T, wide_a.T @ weights
    for found, wanted in zip((da if i else da.T, db.T if j else db), expected, strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=tolerance, atol=1e-5)


def test_activations_by_hand():
    # At 1 and -2: x / (1 + exp(-x)) = .731059, -.238406; x times the normal distribution function, of .841345 and
    # .022750, = .841345, -.045500; and with tanh(sqrt(2 / pi) (x + .044715 x^3)) in its place .841192, -.045402.
    expected = {
        "silu": [0.731059, -0.238406],
        "gelu": [0.841345, -0.045500],
        "gelu_tanh": [0.841192, -0.045402],
    }
    assert ACTIVATIONS.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.array([1.0, -2.0])), values, rtol=0, atol=2e-6, err_msg=name)


def test_parameters_are_named_and_shaped_as_the_contract_has_them():
    shapes = {path: leaf.shape for path, leaf in transformer.abstract(LLAMA).items()}
    assert shapes == {
        "embed": (29, 16),
        "layers.attention_norm.scale": (3, 16),
        "layers.q.kernel": (3, 16, 16),
        "layers.q.bias": (3, 16),
        "layers.k.kernel": (3, 16, 8),
        "layers.k.bias": (3, 8),
        "layers.v.kernel": (3, 16, 8),
        "layers.v.bias": (3, 8),
        "layers.o.kernel": (3, 16, 16),
        "layers.o.bias": (3, 16),
        "layers.mlp_norm.scale": (3, 16),
        "layers.gate.kernel": (3, 16, 24),
        "layers.gate.bias": (3, 24),
        "layers.up.kernel": (3, 16, 24),
        "layers.up.bias": (3, 24),
        "layers.down.kernel": (3, 24, 16),
        "layers.down.bias": (3, 16),
        "norm.scale": (16,),
        "head.kernel": (16, 29),
    }
    gemma = transformer.abstract(GEMMA, lora=LORA)
    assert "head.kernel" not in gemma  # tied
    added = {"q_norm", "k_norm", "post_attention_norm", "post_mlp_norm"}
    assert added <= {path.split(".")[1] for path in gemma if path.startswith("layers.")}
    assert gemma["layers.q_norm.scale"].shape == (3, 4)
    assert {path.split(".")[1] for path in gemma if path.endswith("lora_a")} == set(LORA.targets)
    assert gemma["layers.down.lora_a"].shape == (3, 24, 3) and gemma["layers.down.lora_b"].shape == (3, 3, 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initialise_abstract_and_bind_agree(dtype):
    for lora in (None, LORA):
        params = transformer.initialise(LLAMA, 0, dtype=dtype, lora=lora)
        described = {
            path: (x.shape, x.dtype) for path, x in transformer.abstract(LLAMA, dtype=dtype, lora=lora).items()
        }
        assert {path: (x.shape, x.dtype) for path, x in params.items()} == described
        assert {x.dtype for path, x in params.items() if "lora_" in path} <= {jnp.dtype("float32")}
        model = bind(LLAMA, params, lora)
        assert model.layers.q.kernel[...] is params["layers.q.kernel"]
        assert model.norm.scale[...] is params["norm.scale"]
        assert (model.layers.q.lora_a is None) == (lora is None)
        assert model.layers.k.lora_a is None  # not among the targets


def test_initialise_depends_on_the_seed_and_on_nothing_else():
    a, b, c = (transformer.initialise(LLAMA, seed) for seed in (0, 0, 1))
    assert all((a[path] == b[path]).all() for path in a)
    drawn = [path for path in a if not path.endswith((".scale", ".bias"))]
    assert all((a[path] != c[path]).any() for path in drawn)
    assert a["layers.down.kernel"].std() == pytest.approx(24**-0.5, rel=0.1)  # N(0, 1 / inputs)


def test_fresh_adapters_are_the_identity_and_scale_with_alpha_over_rank():
    params = transformer.initialise(LLAMA, 0, lora=LORA)
    logprobs_of = jax.jit(lambda params, lora: shared_logprobs(bind(LLAMA, params, lora)), static_argnums=1)
    plain = np.asarray(logprobs_of(params, None))
    np.testing.assert_array_equal(np.asarray(logprobs_of(params, LORA)), plain)

    # W + alpha / rank * a @ b, merged into the kernel by hand: alpha / rank = 6 / 3 = 2.
    b = 0.1 * jax.random.normal(jax.random.key(0), params["layers.q.lora_b"].shape)
    adapted = np.asarray(logprobs_of({**params, "layers.q.lora_b": b}, LORA))
    kernel = params["layers.q.kernel"] + 2 * jnp.einsum("lir,lro->lio", params["layers.q.lora_a"], b)
    np.testing.assert_allclose(adapted, logprobs_of({**params, "layers.q.kernel": kernel}, None), rtol=0, atol=1e-5)
    assert np.abs(adapted - plain).max() > 1e-2
