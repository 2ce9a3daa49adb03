"""The policy's one forward: a decoder-only transformer over groups of completions that share a prompt.

Tokens have the shape [P, G, T]: P prompts, G completions of each, T tokens of each. Every token attends to

* the *prefix*: the keys and values of its prompt, [P, S], computed once per group and differentiable, and
* its *own* past: the other tokens of its row, or the sampler's cache of them.

The prefill is the same forward with no prefix. Layers' parameters are stacked along a leading axis, so that one pytree
can be scanned (training: compile time does not grow with depth) or unrolled (decoding).

Shapes: L layers, D hidden size, H query heads, N key/value heads, K head size, F MLP size, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.experiment import LoRAConfig
from grpo_jax.policy.config import ModelConfig
from grpo_jax.policy.rope import inverse_frequencies

Array = jax.Array
Params = dict[str, Array]  # parameters by dotted path, e.g. "layers.q.kernel": the form in which they travel


class KeyValues(NamedTuple):
    """Keys and values of some tokens, with what a later query must know to attend to them.

    k, v: [L, rows..., N, tokens, K]; positions, valid: [rows..., tokens]. A prefix has rows [P], a cache [P, G].
    For unrolled layers `k` and `v` are tuples of L arrays, so that each is updated in place.
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    positions: Array
    valid: Array


class Linear(nnx.Module):
    """y = x @ kernel + bias, plus the low-rank adapter alpha / rank * (x @ a) @ b where there is one, in float32."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        stack: tuple[int, ...] = (),
        bias: bool = False,
        lora: LoRAConfig | None = None,
    ) -> None:
        normal = jax.nn.initializers.normal(inputs**-0.5)
        self.kernel = nnx.Param(normal(rngs.params(), (*stack, inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, outputs), dtype)) if bias else None
        # Adapters stay float32 whatever the policy's dtype: they are small, and their updates are smaller still.
        self.lora_a = nnx.LoRAParam(normal(rngs.params(), (*stack, inputs, lora.rank), jnp.float32)) if lora else None
        self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, lora.rank, outputs), jnp.float32)) if lora else None
        self.lora_scale = lora.alpha / lora.rank if lora else 0.0

    def __call__(self, x: Array) -> Array:
        rows, kernel = x.shape[:-1], self.kernel[...]
        x = x.reshape(-1, x.shape[-1])  # the adapters' gradients sum over tokens: over one axis far faster than over 3
        y = contract(x.astype(kernel.dtype), kernel)
        if self.bias is not None:
            y = y + self.bias[...]
        if self.lora_a is not None:
            y = y + (x @ self.lora_a[...]) @ (self.lora_b[...] * self.lora_scale)
        return y.reshape(*rows, -1)


class Norm(nnx.Module):
    """Root-mean-square norm in float32 (Zhang & Sennrich 2019, 1910.07467); Gemma's scale is stored less `offset`."""

    def __init__(self, size: int, config: ModelConfig, *, dtype: jnp.dtype, stack: tuple[int, ...] = ()) -> None:
        self.scale = nnx.Param(jnp.full((*stack, size), 1 - config.norm_offset, dtype))
        self.offset, self.eps = config.norm_offset, config.norm_eps

    def __call__(self, x: Array) -> Array:
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return y * (self.offset + self.scale[...].astype(jnp.float32))


class Layer(nnx.Module):
    """Attention and a gated MLP, each behind a norm (and before one, in Gemma 2 and 3)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        stack: tuple[int, ...],
        lora: LoRAConfig | None,
    ) -> None:
        c = config
        query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def linear(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
            adapter = lora if lora is not None and name in lora.targets else None
            return Linear(inputs, outputs, rngs=rngs, dtype=dtype, stack=stack, bias=bias, lora=adapter)

        def norm(size: int) -> Norm:
            return Norm(size, c, dtype=dtype, stack=stack)

        self.config = config
        self.attention_norm = norm(c.hidden_size)
        self.q = linear("q", c.hidden_size, query, c.qkv_bias)
        self.k = linear("k", c.hidden_size, key, c.qkv_bias)
        self.v = linear("v", c.hidden_size, key, c.qkv_bias)
        self.o = linear("o", query, c.hidden_size, c.o_bias)
        self.q_norm = norm(c.head_dim) if c.qk_norm else None
        self.k_norm = norm(c.head_dim) if c.qk_norm else None
        self.post_attention_norm = norm(c.hidden_size) if c.post_norms else None
        self.mlp_norm = norm(c.hidden_size)
        self.gate = linear("gate", c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up = linear("up", c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down = linear("down", c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.post_mlp_norm = norm(c.hidden_size) if c.post_norms else None

    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array],
        own_mask: Array,
        prefix: tuple[Array, Array, Array] | None,
        cache: tuple[Array, Array, Array] | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """One layer over x [P, G, T, D].

        Args:
          rotation: cos and sin of the tokens' positions, [P, G, T, K / 2] each.
          own_mask: [P, G, T, C], which of the row's own tokens each token sees.
          prefix: keys and values [P, N, S, K] and the mask [P, G, T, S] of the prompt.
          cache: keys and values [P, G, N, C, K] of the row so far, and the slot that these tokens are written to.
            Without one, the row's own tokens are these tokens and C = T.

        Returns:
          x after the layer, and the keys and values [P, G, N, C, K] of the row's own tokens.
        """
        c = self.config
        rows, tokens = x.shape[:2], x.shape[2]
        h = self.attention_norm(x)
        q = self.q(h).reshape(*rows, tokens, c.num_heads, c.head_dim)
        k = self.k(h).reshape(*rows, tokens, c.num_kv_heads, c.head_dim)
        v = self.v(h).reshape(*rows, tokens, c.num_kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotation) * c.query_scale, rotate(k, *rotation)
        q, k, v = (heads.astype(self.q.kernel[...].dtype) for heads in (q, k, v))
        # [batch, head, time, dim]: on a CPU four times as fast to attend to as [batch, time, head, dim].
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
        if cache is not None:
            cached_k, cached_v, slot = cache
            k = jax.lax.dynamic_update_slice_in_dim(cached_k, k, slot, axis=3)
            v = jax.lax.dynamic_update_slice_in_dim(cached_v, v, slot, axis=3)
        attended = attend(q, k, v, own_mask, prefix, c)
        x = x + self._maybe(self.post_attention_norm, self.o(attended.reshape(*rows, tokens, -1)))
        h = self.mlp_norm(x)
        h = self.down(ACTIVATIONS[c.activation](self.gate(h)) * self.up(h))
        return x + self._maybe(self.post_mlp_norm, h), (k, v)

    @staticmethod
    def _maybe(norm: Norm | None, x: Array) -> Array:
        return x if norm is None else norm(x)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Transformer(nnx.Module):
    """Embedding, stacked layers, final norm, and an output head unless it is tied to the embedding."""

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32, lora: LoRAConfig | None = None
    ) -> None:
        c = config
        self.config = config
        normal = jax.nn.initializers.normal(0.02)
        self.embed = nnx.Param(normal(rngs.params(), (c.vocab_size, c.hidden_size), dtype))
        self.layers = Layer(c, rngs=rngs, dtype=dtype, stack=(c.num_layers,), lora=lora)
        self.norm = Norm(c.hidden_size, c, dtype=dtype)
        self.head = None if c.tied else Linear(c.hidden_size, c.vocab_size, rngs=rngs, dtype=dtype)

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] to float32 logits [..., V]."""
        rows = hidden.reshape(-1, hidden.shape[-1]).astype(self.embed[...].dtype)
        logits = contract(rows, self.embed[...], 1, 1) if self.head is None else contract(rows, self.head.kernel[...])
        logits = logits.reshape(*hidden.shape[:-1], -1)
        return softcap(logits, self.config.final_softcap)


def initialise(config: ModelConfig, seed: int, *, dtype: str = "float32", lora: LoRAConfig | None = None) -> Params:
    """Random parameters: N(0, 1 / inputs) kernels, zero biases, unit norms; adapters start as the identity."""
    model = Transformer(config, rngs=nnx.Rngs(seed), dtype=jnp.dtype(dtype), lora=lora)
    return _flat(nnx.state(model))


def abstract(config: ModelConfig, *, dtype: str = "float32", lora: LoRAConfig | None = None) -> dict[str, Array]:
    """The shapes and dtypes of `initialise`, as `jax.ShapeDtypeStruct`s: nothing is computed."""
    return _flat(nnx.split(_skeleton(config, dtype, lora))[1])


def bind(config: ModelConfig, params: Params, lora: LoRAConfig | None = None) -> Transformer:
    """The module with these parameters in it. Pure and cheap: call it inside a jitted function."""
    graph, state = nnx.split(_skeleton(config, "float32", lora))
    state = nnx.State.from_flat_path(
        {path: leaf.replace(params[".".join(map(str, path))]) for path, leaf in state.flat_state()}
    )
    return nnx.merge(graph, state)


def _flat(state: nnx.State) -> Params:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in state.flat_state()}


@lru_cache(maxsize=32)
def _skeleton(config: ModelConfig, dtype: str, lora: LoRAConfig | None) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), lora=lora))


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions (Su et al. 2021, 2104.09864) of x [P, G, T, heads, K], in Hugging Face's half-split layout."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(a: Array, b: Array, i: int = 1, j: int = 0) -> Array:
    """Sums the product of two matrices over axis i of `a` and axis j of `b`, with a float32 result.

    By default a @ b. The gradient is rounded to the operands' dtype before it is multiplied, so that bfloat16 matrices
    meet bfloat16 matrices in the backward pass too: those products are more than twice as fast, on a CPU as well.
    """
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _contract_forward(a: Array, b: Array, i: int, j: int) -> tuple[Array, tuple[Array, Array]]:
    return contract(a, b, i, j), (a, b)


def _contract_backward(i: int, j: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = saved
    g = g.astype(a.dtype)
    da = contract(g, b, 1, 1 - j) if i == 1 else contract(b, g, 1 - j, 1)
    db = contract(a, g, 1 - i, 0) if j == 0 else contract(g, a, 0, 1 - i)
    return da.astype(a.dtype), db.astype(b.dtype)


contract.defvjp(_contract_forward, _contract_backward)


def product(spec: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays with a float32 result, also for bfloat16 arrays.

    On a CPU they are widened first: XLA's CPU backend (jax 0.10 to 0.12) refuses some batched bfloat16 products with a
    float32 result, depending on their shapes.
    """
    if jax.default_backend() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def softcap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap) (Gemma 2, 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: Array, k: Array, v: Array, mask: Array, prefix: tuple[Array, Array, Array] | None, config: ModelConfig
) -> Array:
    """Softmax attention of q [P, G, T, H, K] over a row's own k, v [P, G, N, C, K] and the shared prefix [P, N, S, K].

    The two parts are never concatenated: they share one maximum and one denominator. Scores are float32.
    """
    groups = config.num_heads // config.num_kv_heads
    q = q.reshape(*q.shape[:3], config.num_kv_heads, groups, config.head_dim)
    parts = [("pgnck", k, v, mask)]
    if prefix is not None:
        parts.append(("pnck", *prefix))
    scores = []
    for axes, keys, _, visible in parts:
        score = product(f"pgtnrk,{axes}->pgnrtc", q, keys)
        score = softcap(score, config.attention_softcap)
        scores.append(jnp.where(visible[:, :, None, None], score, -1e30))
    top = jax.lax.stop_gradient(jnp.stack([score.max(-1) for score in scores]).max(0))[..., None]
    weights = [jnp.exp(score - top) for score in scores]
    total = sum(weight.sum(-1) for weight in weights)  # [P, G, N, R, T]
    attended = sum(
        product(f"pgnrtc,{axes}->pgtnrk", weight.astype(values.dtype), values)
        for weight, (axes, _, values, _) in zip(weights, parts, strict=True)
    )
    attended = attended / jnp.moveaxis(total, 4, 2)[..., None]
    return attended.reshape(*q.shape[:3], -1)


def forward(
    model: Transformer,
    tokens: Array,
    positions: Array,
    valid: Array,
    *,
    prefix: KeyValues | None = None,
    cache: KeyValues | None = None,
    slot: Array | int = 0,
    segments: Array | None = None,
    layers: Sequence[Layer] | None = None,
    remat: bool = False,
) -> tuple[Array, KeyValues]:
    """Runs tokens [P, G, T] through the model.

    Args:
      positions, valid: [P, G, T] int32 and bool. Positions rise along a row; tokens that are not valid are seen by
        nobody, and what they themselves compute is meaningless.
      prefix: the keys and values of the prompts, rows [P].
      cache: those of the rows so far, rows [P, G] with C slots; these tokens are written to slots [slot, slot + T).
      segments: [P, G, T] int32, without a cache: tokens see those of their own segment alone (packed examples).
      layers: the model's layers, from `unstack`, to run them unrolled instead of scanned; then the k and v of prefix
        and cache are tuples.
      remat: recompute each layer in the backward pass instead of keeping its activations.

    Returns:
      The hidden states after the final norm, [P, G, T, D], and the keys and values of the rows' own tokens (the
      updated cache, where one was given).
    """
    chex.assert_rank(tokens, 3)
    chex.assert_equal_shape([tokens, positions, valid])
    c = model.config
    if cache is not None:
        own_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=2)
        own_valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, slot, axis=2)
    else:
        own_positions, own_valid = positions, valid

    x = model.embed[...][tokens].astype(jnp.float32) * c.embed_scale

    # A sliding layer differs in its mask and (Gemma 3) in its rotation: make both kinds once, and let layers choose.
    kinds = (False, True) if any(c.sliding_layers) and not all(c.sliding_layers) else c.sliding_layers[:1]
    rotations, own_masks, prefix_masks = [], [], []
    for sliding in kinds:
        rope = c.local_rope if sliding and c.local_rope is not None else c.rope
        angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, c.head_dim)
        rotations.append((jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor))
        window = c.sliding_window if sliding else None
        own_mask = sees(positions, own_positions, own_valid, window)
        if segments is not None:
            own_mask &= segments[..., :, None] == segments[..., None, :]
        own_masks.append(own_mask)
        if prefix is not None:
            prefix_masks.append(sees(positions, prefix.positions[:, None, :], prefix.valid[:, None, :], window))

    def layer_step(x: Array, layer: Layer, kind: int | Array, prefix_kv: tuple | None, cache_kv: tuple | None) -> tuple:
        def choose(options: list) -> Array | tuple:
            if len(options) == 1 or isinstance(kind, int):
                return options[kind if len(options) > 1 else 0]
            return jax.tree.map(lambda a, b: jnp.where(kind == 0, a, b), *options)

        return layer(
            x,
            choose(rotations),
            choose(own_masks),
            None if prefix_kv is None else (*prefix_kv, choose(prefix_masks)),
            None if cache_kv is None else (*cache_kv, slot),
        )

    prefix_kv = None if prefix is None else (prefix.k, prefix.v)
    cache_kv = None if cache is None else (cache.k, cache.v)
    layer_kinds = [int(sliding) for sliding in c.sliding_layers]
    if layers is not None:
        ks, vs = [], []
        for i, (layer, kind) in enumerate(zip(layers, layer_kinds, strict=True)):
            prefix_i = None if prefix_kv is None else (prefix_kv[0][i], prefix_kv[1][i])
            cache_i = None if cache_kv is None else (cache_kv[0][i], cache_kv[1][i])
            x, (k, v) = layer_step(x, layer, kind, prefix_i, cache_i)
            ks.append(k)
            vs.append(v)
        own = (tuple(ks), tuple(vs))
    else:
        graph, stacked = nnx.split(model.layers)

        def body(x: Array, xs: tuple) -> tuple:
            state, kind, prefix_kv, cache_kv = xs
            return layer_step(x, nnx.merge(graph, state), kind, prefix_kv, cache_kv)

        xs = (stacked, jnp.asarray(layer_kinds), prefix_kv, cache_kv)
        x, own = jax.lax.scan(jax.checkpoint(body) if remat else body, x, xs)
    return model.norm(x), KeyValues(*own, own_positions, own_valid)


def unstack(model: Transformer) -> list[Layer]:
    """The layers one by one. Do it outside a decoding loop: inside, every step would copy the weights anew."""
    graph, stacked = nnx.split(model.layers)
    layers = range(model.config.num_layers)
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in layers]


def sees(queries: Array, keys: Array, valid: Array, window: int | None) -> Array:
    """Causal visibility [..., T, C] of keys at positions [..., C] for queries at [..., T], within `window` if given."""
    distance = queries[..., :, None] - keys[..., None, :]
    visible = (distance >= 0) & valid[..., None, :]
    return visible if window is None else visible & (distance < window)


def prefill(
    model: Transformer, prompts: Array, lengths: Array, *, common: int = 0, remat: bool = False
) -> tuple[KeyValues, Array]:
    """Makes the prefix of right-padded prompts [P, S] of the given lengths [P].

    The first `common` tokens, which every prompt of the batch must share (a system prompt, worked examples), are
    computed once for all prompts: the rest attends to them as a group does to its prompt.

    Returns:
      The prefix (rows [P], S tokens), and the hidden state [P, D] that predicts the first completion token.
    """
    chex.assert_rank([prompts, lengths], [2, 1])
    num_prompts, size = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(size), prompts.shape)
    valid = positions < lengths[:, None]
    shared = None
    if common:
        one = (prompts[:1, None, :common], positions[:1, None, :common], valid[:1, None, :common])
        shared = _prefix_rows(forward(model, *one, remat=remat)[1])
    rest = (prompts[None, :, common:], positions[None, :, common:], valid[None, :, common:])
    # One "prompt" (what is shared) with a "group" of P: the rows come back as [L, 1, P, N, S - common, K].
    hidden, own = forward(model, *rest, prefix=shared, remat=remat)
    k, v = own.k[:, 0], own.v[:, 0]
    if shared is not None:
        k, v = (
            jnp.concatenate([jnp.broadcast_to(s, (s.shape[0], num_prompts, *s.shape[2:])), o], axis=3)
            for s, o in ((shared.k, k), (shared.v, v))
        )
    last = jnp.take_along_axis(hidden[0], (lengths - 1 - common)[:, None, None], axis=1)[:, 0]
    return KeyValues(k, v, positions, valid), last


def _prefix_rows(own: KeyValues) -> KeyValues:
    """Rows [P, 1] as a prefix with rows [P]."""
    return KeyValues(own.k[:, :, 0], own.v[:, :, 0], own.positions[:, 0], own.valid[:, 0])
