"""The parts of a transformer layer: projections with adapters, norms, rotary embeddings, attention, matrix products.

Shapes are those of `grpo_jax.policy.transformer`: H query heads, N key/value heads, K head size.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.experiment import LoRAConfig
from grpo_jax.policy.config import Activation, ModelConfig
from grpo_jax.sharding import Array


class Linear(nnx.Module):
    """y = x @ kernel + bias, with a float32 result. An adapter adds alpha / rank * (x @ lora_a) @ lora_b."""

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
        # Adapters are float32 for every dtype of the policy: they are small, and their updates are even smaller.
        self.lora_a = nnx.LoRAParam(normal(rngs.params(), (*stack, inputs, lora.rank), jnp.float32)) if lora else None
        self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, lora.rank, outputs), jnp.float32)) if lora else None
        self.lora_scale = lora.alpha / lora.rank if lora else 0.0

    def __call__(self, x: Array) -> Array:
        rows, kernel = x.shape[:-1], self.kernel[...]
        # The gradients of the adapters are sums over tokens: over one axis they are far faster than over three.
        x = x.reshape(-1, x.shape[-1])
        y = matmul_f32(x.astype(kernel.dtype), kernel)
        if self.bias is not None:
            y = y + self.bias[...]
        if self.lora_a is not None and self.lora_b is not None:
            y = y + (x @ self.lora_a[...]) @ (self.lora_b[...] * self.lora_scale)
        return y.reshape(*rows, -1)


class Norm(nnx.Module):
    """RMS norm in float32 (Zhang & Sennrich 2019, 1910.07467). Gemma stores its scale minus an `offset` of 1."""

    def __init__(self, size: int, config: ModelConfig, *, dtype: jnp.dtype, stack: tuple[int, ...] = ()) -> None:
        self.scale = nnx.Param(jnp.full((*stack, size), 1 - config.norm_offset, dtype))
        self.offset, self.eps = config.norm_offset, config.norm_eps

    def __call__(self, x: Array) -> Array:
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return y * (self.offset + self.scale[...].astype(jnp.float32))


class Layer(nnx.Module):
    """Attention and a gated MLP. A norm precedes each of them; in Gemma 2 and 3 another norm follows each of them."""

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
        cache: tuple[Array, Array, Array | int] | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Runs the layer on x [P, G, T, D].

        Args:
          rotation: cosines and sines of the rotary embedding of the tokens' positions, [P, G, T, K / 2] each.
          own_mask: which of the row's own tokens each token attends to, [P, G, T, C] bool.
          prefix: the prompt's keys and values [P, N, S, K], and which of them each token attends to [P, G, T, S].
          cache: the keys and values [P, G, N, C, K] of the row so far, and `cache_length`: how many of the C places are
            filled already. The new tokens are written behind them. Without a cache, the row's own tokens are these
            tokens, and C = T.

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
        # Attention to [batch, head, time, dim] is four times as fast on a CPU as attention to [batch, time, head, dim].
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
        if cache is not None:
            cached_k, cached_v, cache_length = cache
            k = jax.lax.dynamic_update_slice_in_dim(cached_k, k, cache_length, axis=3)
            v = jax.lax.dynamic_update_slice_in_dim(cached_v, v, cache_length, axis=3)
        attended = attend(q, k, v, own_mask, prefix, c)
        x = x + self._maybe(self.post_attention_norm, self.o(attended.reshape(*rows, tokens, -1)))
        h = self.mlp_norm(x)
        h = self.down(ACTIVATIONS[c.activation](self.gate(h)) * self.up(h))
        return x + self._maybe(self.post_mlp_norm, h), (k, v)

    @staticmethod
    def _maybe(norm: Norm | None, x: Array) -> Array:
        return x if norm is None else norm(x)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Applies rotary embeddings (Su et al. 2021, 2104.09864) to x [P, G, T, heads, K].

    The pairs that rotate together are the dimensions i and i + K / 2, as in Hugging Face's checkpoints. `cos` and `sin`
    have the shape [P, G, T, K / 2].
    """
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul_f32(a: Array, b: Array, i: int = 1, j: int = 0) -> jax.Array:
    """Multiplies two matrices over axis i of `a` and axis j of `b`, with a float32 result. The default is a @ b.

    The backward pass rounds the gradient to the operands' dtype before it multiplies. So the backward pass of bfloat16
    matrices multiplies bfloat16 matrices too, which is more than twice as fast, also on a CPU.
    """
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _matmul_f32_forward(a: Array, b: Array, i: int, j: int) -> tuple[jax.Array, tuple[Array, Array]]:
    return matmul_f32(a, b, i, j), (a, b)


def _matmul_f32_backward(i: int, j: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = saved
    g = g.astype(a.dtype)
    da = matmul_f32(g, b, 1, 1 - j) if i == 1 else matmul_f32(b, g, 1 - j, 1)
    db = matmul_f32(a, g, 1 - i, 0) if j == 0 else matmul_f32(g, a, 0, 1 - i)
    return da.astype(a.dtype), db.astype(b.dtype)


matmul_f32.defvjp(_matmul_f32_forward, _matmul_f32_backward)


def einsum_f32(spec: str, a: Array, b: Array) -> jax.Array:
    """`jnp.einsum` of two arrays with a float32 result, also for bfloat16 arrays.

    On a CPU the arrays are converted to float32 first. XLA's CPU backend (jax 0.10 to 0.12) rejects some batched
    bfloat16 products with a float32 result, depending on their shapes.
    """
    if jax.default_backend() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Computes cap * tanh(x / cap), or x if `cap` is None (Gemma 2, 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: Array, k: Array, v: Array, mask: Array, prefix: tuple[Array, Array, Array] | None, config: ModelConfig
) -> Array:
    """Computes softmax attention over a row's own tokens and the shared prefix.

    The two parts are not concatenated: they share one maximum and one denominator. Scores are float32.

    Args:
      q: queries, already rotated and scaled, [P, G, T, H, K].
      k, v: keys and values of the row's own tokens, [P, G, N, C, K].
      mask: which of the row's own tokens each query attends to, [P, G, T, C] bool.
      prefix: keys and values of the prompt, [P, N, S, K], and their mask [P, G, T, S].

    Returns:
      The attended values, [P, G, T, H * K] float32.
    """
    groups = config.num_heads // config.num_kv_heads
    q = q.reshape(*q.shape[:3], config.num_kv_heads, groups, config.head_dim)
    parts = [("pgnck", k, v, mask)]
    if prefix is not None:
        parts.append(("pnck", *prefix))
    scores = []
    for axes, keys, _, visible in parts:
        score = einsum_f32(f"pgtnrk,{axes}->pgnrtc", q, keys)
        score = softcap(score, config.attention_softcap)
        scores.append(jnp.where(visible[:, :, None, None], score, -1e30))
    top = jax.lax.stop_gradient(jnp.stack([score.max(-1) for score in scores]).max(0))[..., None]
    weights = [jnp.exp(score - top) for score in scores]
    total = sum(weight.sum(-1) for weight in weights)  # [P, G, N, R, T]
    attended = sum(
        einsum_f32(f"pgnrtc,{axes}->pgtnrk", weight.astype(values.dtype), values)
        for weight, (axes, _, values, _) in zip(weights, parts, strict=True)
    )
    attended = attended / jnp.moveaxis(total, 4, 2)[..., None]
    return attended.reshape(*q.shape[:3], -1)
