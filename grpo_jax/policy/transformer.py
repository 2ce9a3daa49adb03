"""The transformer, and its one forward over groups of completions that share a prompt.

Tokens have the shape [P, G, T]: P prompts, G completions of each prompt, T tokens of each completion. Each attends to

* the *prefix*: the keys and values of its prompt, [P, S]. They are computed once per group and are differentiable;
* its own row: the earlier tokens of its completion. During sampling, their keys and values are in a cache.

The prefill is the same forward without a prefix. The parameters of the layers are stacked along a leading axis, so the
same pytree can be scanned or unrolled (see `run_layers`).

Shapes: L layers, D hidden size, H query heads, N key/value heads, K head size, F MLP size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.experiment import LoRAConfig
from grpo_jax.policy.config import ModelConfig
from grpo_jax.policy.layers import Array, Layer, Linear, Norm, matmul_f32, softcap
from grpo_jax.policy.rope import inverse_frequencies

# Training unrolls the layers of a policy that has at most this many. A loop copies the weights of each layer and stacks
# what the backward pass needs, which can take as long as the arithmetic of a small policy.
UNROLLED_LAYERS = 4

Params = dict[str, Array]
"""Parameters by dotted path, e.g. "layers.q.kernel"."""


class TokenRows(NamedTuple):
    """The tokens that a forward runs: P prompts, G rows of each prompt, T tokens of each row.

    tokens: token ids, [P, G, T] int32.
    positions: the position of each token in its sequence, [P, G, T] int32. Positions rise along a row.
    valid: [P, G, T] bool. No token attends to a token that is not valid; the hidden state of such a token is
        meaningless.
    segments: which packed example each token belongs to, [P, G, T] int32. A token attends only to tokens of its own
        segment. None: each row is one sequence. Cannot be combined with a cache.
    """

    tokens: Array
    positions: Array
    valid: Array
    segments: Array | None = None


class KeyValues(NamedTuple):
    """The keys and values of some tokens, with the positions and the validity that attention to them needs.

    k, v: [L, rows..., N, tokens, K]. For unrolled layers they are tuples of L arrays, so that each array is updated in
        place.
    positions, valid: [rows..., tokens].

    The rows are [P] in a prefix and [P, G] in a cache.
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    positions: Array
    valid: Array


LayerKeyValues = tuple[Array, Array]
"""The keys and the values of one layer."""

RunLayer = Callable[
    [Array, Layer, int | Array, LayerKeyValues | None, LayerKeyValues | None], tuple[Array, LayerKeyValues]
]
"""(x, layer, kind, prefix of the layer, cache of the layer) -> x, keys and values of the rows' own tokens.

The kind is 1 for a sliding layer and 0 for a layer with full attention."""


class AttentionInputs(NamedTuple):
    """What all layers of one kind (full or sliding attention) know about the tokens.

    rotation: cosines and sines of the rotary embedding, [P, G, T, K / 2] each.
    own_mask: which tokens of its own row each token attends to, [P, G, T, C] bool.
    prefix_mask: which tokens of its prompt each token attends to, [P, G, T, S] bool; None without a prefix.
    """

    rotation: tuple[Array, Array]
    own_mask: Array
    prefix_mask: Array | None


class Transformer(nnx.Module):
    """Embedding, stacked layers, final norm, and an output head (none if the head is tied to the embedding)."""

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

    def logits(self, hidden: Array) -> jax.Array:
        """Computes the float32 logits [..., V] of hidden states [..., D]."""
        rows = hidden.reshape(-1, hidden.shape[-1]).astype(self.embed[...].dtype)
        logits = (
            matmul_f32(rows, self.embed[...], 1, 1) if self.head is None else matmul_f32(rows, self.head.kernel[...])
        )
        logits = logits.reshape(*hidden.shape[:-1], -1)
        return softcap(logits, self.config.final_softcap)


def initialise(config: ModelConfig, seed: int, *, dtype: str = "float32", lora: LoRAConfig | None = None) -> Params:
    """Draws random parameters.

    Kernels have the standard deviation 1 / sqrt(inputs), the embedding 0.02; biases are 0, and norms scale by 1. The
    adapters are the identity.
    """
    model = Transformer(config, rngs=nnx.Rngs(seed), dtype=jnp.dtype(dtype), lora=lora)
    return _flat(nnx.state(model))


def abstract(
    config: ModelConfig, *, dtype: str = "float32", lora: LoRAConfig | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of `initialise` as `jax.ShapeDtypeStruct`s, without computing anything."""
    return _flat(nnx.split(_skeleton(config, dtype, lora))[1])


def bind(config: ModelConfig, params: Params, lora: LoRAConfig | None = None) -> Transformer:
    """Returns the module with these parameters. Pure and cheap: call it inside a jitted function."""
    graph, state = nnx.split(_skeleton(config, "float32", lora))
    state = nnx.State.from_flat_path(
        {path: leaf.replace(params[".".join(map(str, path))]) for path, leaf in state.flat_state()}
    )
    return nnx.merge(graph, state)


def _flat(state: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in state.flat_state()}


@lru_cache(maxsize=32)
def _skeleton(config: ModelConfig, dtype: str, lora: LoRAConfig | None) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), lora=lora))


def forward(
    model: Transformer,
    rows: TokenRows,
    *,
    prefix: KeyValues | None = None,
    cache: KeyValues | None = None,
    cache_length: Array | int = 0,
    layers: Sequence[Layer] | None = None,
    remat: bool = False,
) -> tuple[Array, KeyValues]:
    """Runs tokens [P, G, T] through the model.

    Args:
      rows: the tokens, their positions, and which of them are valid.
      prefix: the keys and values of the prompts, rows [P].
      cache: the keys and values of the rows so far, rows [P, G], with room for C tokens.
      cache_length: how many places of the cache are filled already. The tokens are written to the T places behind them.
      layers: the layers of the model, from `unstack`, to run them one by one (see `run_layers`). The `k` and `v` of
        prefix and cache must then be tuples.
      remat: recompute each layer in the backward pass instead of storing its activations.

    Returns:
      The hidden states after the final norm, [P, G, T, D]; and the keys and values of the rows' own tokens: the updated
      cache, or those of these tokens if no cache was given.
    """
    tokens, positions, valid, _ = rows
    chex.assert_rank(tokens, 3)
    chex.assert_equal_shape([tokens, positions, valid])
    c = model.config
    own_positions, own_valid = positions, valid
    if cache is not None:
        own_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, cache_length, axis=2)
        own_valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, cache_length, axis=2)

    x: Array = model.embed[...][tokens].astype(jnp.float32) * c.embed_scale

    # A sliding layer differs from a full one in its mask and (Gemma 3) in its rotation. The inputs of both kinds are
    # computed once, and each layer chooses between them.
    kinds = (False, True) if any(c.sliding_layers) and not all(c.sliding_layers) else c.sliding_layers[:1]
    inputs = [_attention_inputs(c, rows, own_positions, own_valid, prefix, sliding) for sliding in kinds]

    def run_layer(
        x: Array,
        layer: Layer,
        kind: int | Array,
        layer_prefix: LayerKeyValues | None,
        layer_cache: LayerKeyValues | None,
    ) -> tuple[Array, LayerKeyValues]:
        rotation, own_mask, prefix_mask = _of_kind(inputs, kind)
        return layer(
            x,
            rotation,
            own_mask,
            None if layer_prefix is None or prefix_mask is None else (*layer_prefix, prefix_mask),
            None if layer_cache is None else (*layer_cache, cache_length),
        )

    x, (k, v) = run_layers(model, x, run_layer, prefix=prefix, cache=cache, layers=layers, remat=remat)
    return model.norm(x), KeyValues(k, v, own_positions, own_valid)


def _attention_inputs(
    config: ModelConfig,
    rows: TokenRows,
    own_positions: Array,
    own_valid: Array,
    prefix: KeyValues | None,
    sliding: bool,
) -> AttentionInputs:
    """Computes rotations and masks for the layers that slide, or for those that do not."""
    rope = config.local_rope if sliding and config.local_rope is not None else config.rope
    angles = rows.positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, config.head_dim)
    rotation = (jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor)
    window = config.sliding_window if sliding else None
    own_mask = causal_mask(rows.positions, own_positions, own_valid, window)
    if rows.segments is not None:
        own_mask &= rows.segments[..., :, None] == rows.segments[..., None, :]
    prefix_mask = None
    if prefix is not None:
        prefix_mask = causal_mask(rows.positions, prefix.positions[:, None, :], prefix.valid[:, None, :], window)
    return AttentionInputs(rotation, own_mask, prefix_mask)


def _of_kind(inputs: Sequence[AttentionInputs], kind: int | Array) -> AttentionInputs:
    """Returns the inputs of a layer's kind. Inside a scan the kind is a traced array, so they are selected by value."""
    if len(inputs) == 1:
        return inputs[0]
    if isinstance(kind, int):
        return inputs[kind]
    return jax.tree.map(lambda full, sliding: jnp.where(kind == 0, full, sliding), *inputs)


def run_layers(
    model: Transformer,
    x: Array,
    run_layer: RunLayer,
    *,
    prefix: KeyValues | None = None,
    cache: KeyValues | None = None,
    layers: Sequence[Layer] | None = None,
    remat: bool = False,
) -> tuple[Array, tuple[Array | tuple[Array, ...], Array | tuple[Array, ...]]]:
    """Applies every layer of the model to x [P, G, T, D], in order.

    There are three ways to run the layers, which give the same result up to rounding. This is the rule:

    1. `layers` is given (decoding): a Python loop over these layers. On a CPU it was measured a third faster than a
       scan. Each layer's part of the cache is an array of its own and is updated in place. `remat` has no effect here.
    2. The model has at most `UNROLLED_LAYERS` layers (training of a small policy): a fully unrolled `jax.lax.scan`.
    3. Otherwise: a `jax.lax.scan` that stays a loop, so compile time does not grow with the number of layers.

    Args:
      run_layer: runs one layer.
      prefix, cache: as in `forward`; each layer receives its own part of them.
      layers, remat: as in `forward`.

    Returns:
      x after the last layer; and the keys and the values of the rows' own tokens, in the form of `KeyValues`: stacked
      over layers, or as tuples of L arrays if `layers` is given.
    """
    prefix_kv = None if prefix is None else (prefix.k, prefix.v)
    cache_kv = None if cache is None else (cache.k, cache.v)
    kinds = [int(sliding) for sliding in model.config.sliding_layers]
    if layers is not None:
        ks, vs = [], []
        for i, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
            layer_prefix = None if prefix_kv is None else (prefix_kv[0][i], prefix_kv[1][i])
            layer_cache = None if cache_kv is None else (cache_kv[0][i], cache_kv[1][i])
            x, (k, v) = run_layer(x, layer, kind, layer_prefix, layer_cache)
            ks.append(k)
            vs.append(v)
        return x, (tuple(ks), tuple(vs))

    graph, stacked = nnx.split(model.layers)

    def body(x: Array, xs: tuple) -> tuple[Array, LayerKeyValues]:
        state, kind, layer_prefix, layer_cache = xs
        return run_layer(x, nnx.merge(graph, state), kind, layer_prefix, layer_cache)

    xs = (stacked, jnp.asarray(kinds), prefix_kv, cache_kv)
    unroll = model.config.num_layers <= UNROLLED_LAYERS
    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, xs, unroll=unroll)


def unstack(model: Transformer) -> list[Layer]:
    """Returns the layers as a list. Call it before a decoding loop: in the loop, every step would copy the weights."""
    graph, stacked = nnx.split(model.layers)
    layers = range(model.config.num_layers)
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in layers]


def causal_mask(queries: Array, keys: Array, valid: Array, window: int | None) -> Array:
    """Computes which keys each query may attend to.

    A query attends to the valid keys at its own position and at earlier positions. With a window it attends only to the
    last `window` of these positions, its own included.

    Args:
      queries: positions of the queries, [..., T].
      keys: positions of the keys, [..., C].
      valid: which keys are valid, [..., C] bool.
      window: the size of the sliding window; None for none.

    Returns:
      [..., T, C] bool, true where query t may attend to key c.
    """
    distance = queries[..., :, None] - keys[..., None, :]
    visible = (distance >= 0) & valid[..., None, :]
    return visible if window is None else visible & (distance < window)


def prefill(
    model: Transformer, prompts: Array, lengths: Array, *, shared_prefix_length: int = 0, remat: bool = False
) -> tuple[KeyValues, Array]:
    """Computes the prefix of right-padded prompts [P, S] of the given lengths [P].

    All prompts of the batch must begin with the same `shared_prefix_length` tokens (a system prompt, worked examples).
    These tokens are computed once for all prompts. The rest of each prompt attends to them as a completion attends to
    its prompt.

    Returns:
      The prefix (rows [P], S tokens), and the hidden state [P, D] that predicts the first token of a completion.
    """
    chex.assert_rank([prompts, lengths], [2, 1])
    num_prompts, size = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(size), prompts.shape)
    valid = positions < lengths[:, None]
    shared = None
    if shared_prefix_length:
        first = TokenRows(*(x[:1, None, :shared_prefix_length] for x in (prompts, positions, valid)))
        _, own = forward(model, first, remat=remat)
        k, v = _stacked(own.k), _stacked(own.v)
        shared = KeyValues(k[:, :, 0], v[:, :, 0], own.positions[:, 0], own.valid[:, 0])  # rows [1, 1] -> [1]
    rest = TokenRows(*(x[None, :, shared_prefix_length:] for x in (prompts, positions, valid)))
    # The shared tokens are one "prompt" with a "group" of P rows, so the keys are [L, 1, P, N, S - shared length, K].
    hidden, own = forward(model, rest, prefix=shared, remat=remat)
    k, v = _stacked(own.k)[:, 0], _stacked(own.v)[:, 0]
    if shared is not None:
        k, v = (
            jnp.concatenate([jnp.broadcast_to(s, (s.shape[0], num_prompts, *s.shape[2:])), o], axis=3)
            for s, o in ((_stacked(shared.k), k), (_stacked(shared.v), v))
        )
    last = jnp.take_along_axis(hidden[0], (lengths - 1 - shared_prefix_length)[:, None, None], axis=1)[:, 0]
    return KeyValues(k, v, positions, valid), last


def _stacked(x: Array | tuple[Array, ...]) -> Array:
    """The keys or the values of a forward without `layers`, which are stacked over layers (see `run_layers`)."""
    assert not isinstance(x, tuple)
    return x
