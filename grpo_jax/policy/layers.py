"""What a transformer's layers are made of: projections with adapters, norms, rotations, attention, matrix products.

Shapes are those of `grpo_jax.policy.transformer`: H query heads, N key/value heads, K head size.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.experiment import LoRAConfig
from grpo_jax.policy.config import ModelConfig

Array = jax.Array


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
        y = matmul_f32(x.astype(kernel.dtype), kernel)
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


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions (Su et al. 2021, 2104.09864) of x [P, G, T, heads, K], in Hugging Face's half-split layout."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul_f32(a: Array, b: Array, i: int = 1, j: int = 0) -> Array:
    """Sums the product of two matrices over axis i of `a` and axis j of `b`, with a float32 result.

    By default a @ b. The gradient is rounded to the operands' dtype before it is multiplied, so that bfloat16 matrices
    meet bfloat16 matrices in the backward pass too: those products are more than twice as fast, on a CPU as well.
    """
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _matmul_f32_forward(a: Array, b: Array, i: int, j: int) -> tuple[Array, tuple[Array, Array]]:
    return matmul_f32(a, b, i, j), (a, b)


def _matmul_f32_backward(i: int, j: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = saved
    g = g.astype(a.dtype)
    da = matmul_f32(g, b, 1, 1 - j) if i == 1 else matmul_f32(b, g, 1 - j, 1)
    db = matmul_f32(a, g, 1 - i, 0) if j == 0 else matmul_f32(g, a, 0, 1 - i)
    return da.astype(a.dtype), db.astype(b.dtype)


matmul_f32.defvjp(_matmul_f32_forward, _matmul_f32_backward)


def einsum_f32(spec: str, a: Array, b: Array) -> Array:
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
