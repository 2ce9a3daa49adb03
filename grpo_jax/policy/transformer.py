"""The policy's one forward: a decoder-only transformer over groups of completions that share a prompt.

Tokens have the shape [P, G, T]: P prompts, G completions of each, T tokens of each. Every token attends to

* the *prefix*: the keys and values of its prompt, [P, S], computed once per group and differentiable, and
* its *own* past: the other tokens of its row, or the sampler's cache of them.

The prefill is the same forward with no prefix. Layers' parameters are stacked along a leading axis, so that one pytree
can be scanned (training a deep policy: compile time does not grow with depth) or unrolled (decoding).

Shapes: L layers, D hidden size, H query heads, N key/value heads, K head size, F MLP size, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.experiment import LoRAConfig
from grpo_jax.policy.config import ModelConfig
from grpo_jax.policy.layers import Array, Layer, Linear, Norm, matmul_f32, softcap
from grpo_jax.policy.rope import inverse_frequencies

# Up to so many layers training unrolls too: a loop copies each one's weights and stacks what the backward pass needs,
# which can take as long as a small policy's arithmetic.
UNROLLED_LAYERS = 4

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
        logits = (
            matmul_f32(rows, self.embed[...], 1, 1) if self.head is None else matmul_f32(rows, self.head.kernel[...])
        )
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
        own_mask = causal_mask(positions, own_positions, own_valid, window)
        if segments is not None:
            own_mask &= segments[..., :, None] == segments[..., None, :]
        own_masks.append(own_mask)
        if prefix is not None:
            prefix_masks.append(causal_mask(positions, prefix.positions[:, None, :], prefix.valid[:, None, :], window))

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
        few = c.num_layers <= UNROLLED_LAYERS
        x, own = jax.lax.scan(jax.checkpoint(body) if remat else body, x, xs, unroll=few)
    return model.norm(x), KeyValues(*own, own_positions, own_valid)


def unstack(model: Transformer) -> list[Layer]:
    """The layers one by one. Do it outside a decoding loop: inside, every step would copy the weights anew."""
    graph, stacked = nnx.split(model.layers)
    layers = range(model.config.num_layers)
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in layers]


def causal_mask(queries: Array, keys: Array, valid: Array, window: int | None) -> Array:
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
