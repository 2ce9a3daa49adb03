"""Rotary position embeddings: their options in a `config.json`, and the frequencies that the options give.

The formulas are those of transformers' `modeling_rope_utils`, in its float32 arithmetic. At position 8000, one rounding
error in a frequency is an error of a thousandth of a radian in the angle.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from grpo_jax.errors import UserError

RopeKind = Literal["default", "linear", "llama3", "yarn"]
_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embeddings (Su et al. 2021, 2104.09864) and their scaling to longer contexts.

    Attributes:
      theta: the base of the frequencies `theta ** (-2 i / head_dim)`.
      kind: `default` does not scale; `linear` divides every frequency by `factor`; `llama3` divides only low
        frequencies (Llama 3.1); `yarn` interpolates by the number of rotations (Peng et al. 2023, 2309.00071).
      factor: the divisor of the frequencies; for `linear`, `llama3` and `yarn`.
      low_freq_factor, high_freq_factor: for `llama3`, in rotations over the original context: frequencies at or below
        the first are divided by the whole factor, and those at or above the second are not changed.
      original_max_positions: the context length before the scaling; for `llama3` and `yarn`.
      attention_factor: factor of the cosines and sines; for `yarn`, and 1 for every other kind.
      beta_fast, beta_slow: for `yarn`, in rotations over the original context: the two ends of the ramp between kept
        and divided frequencies.
      truncate: for `yarn`, whether the ends of the ramp are rounded outwards to whole dimensions.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Computes the frequency of each pair of a head's dimensions, in radians per position: [head_dim / 2] float32."""
    powers = np.power(np.float32(rope.theta), np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    frequencies = (np.float32(1) / powers).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, head_dim)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Divides low frequencies by `factor`, keeps high frequencies, and interpolates between them."""
    rotations = rope.original_max_positions * frequencies / (2 * math.pi)  # in the original context
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1).astype(np.float32)
    return (1 - blend) * frequencies / np.float32(rope.factor) + blend * frequencies


def _yarn(rope: RopeConfig, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
    """Keeps high frequencies, divides low ones by `factor`, and interpolates linearly over dimensions between them."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # transformers uses this width if the ramp has none
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1).astype(np.float32)
    return frequencies / np.float32(rope.factor) * ramp + frequencies * (1 - ramp)


def rope_from_hf(config: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """Reads the rotary embeddings of a `config.json`: those of all layers, and those of sliding layers if they differ.

    Reads `rope_parameters` (transformers 5; flat, or one entry for each layer type), and `rope_theta`, `rope_scaling`
    and `rope_local_base_freq` (older versions). Raises `UserError` for a kind that is not implemented.
    """
    positions = config["max_position_embeddings"]
    if (factor := config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"config.json has partial_rotary_factor = {factor!r}: only whole heads can be rotated.")
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    per_type = [key for key in ("full_attention", "sliding_attention") if key in parameters]
    if config["model_type"] == "gemma3_text":
        if parameters and not per_type:
            raise UserError(
                "config.json has rope_parameters without layer types: for gemma3 they must have the entries "
                "'full_attention' and 'sliding_attention'."
            )
        whole, local = (parameters.get(key) or {} for key in ("full_attention", "sliding_attention"))
        return (
            _rope({**whole, **scaling}, config.get("rope_theta", 1_000_000.0), positions),
            _rope(local, config.get("rope_local_base_freq", 10_000.0), positions),
        )
    theta = config.get("rope_theta", 10_000.0)
    if per_type:
        ropes = [_rope(parameters[key] or {}, theta, positions) for key in per_type]
        if len(set(ropes)) > 1:
            raise UserError(
                f"config.json has rope_parameters that differ by layer type, which model_type {config['model_type']!r} "
                "does not allow: only gemma3 does."
            )
        return ropes[0], None
    return _rope(scaling or parameters, theta, positions), None


def _rope(parameters: Mapping[str, Any], theta: float, positions: int) -> RopeConfig:
    """The rotary embedding of these parameters. `theta` is the base where they have none, or null."""
    parameters = {key: value for key, value in parameters.items() if value is not None}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _KINDS:
        raise UserError(f"config.json has rope type {kind!r}, which is none of {', '.join(_KINDS)}.")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json has a partial_rotary_factor: only whole heads can be rotated.")
    theta = float(parameters.get("rope_theta", theta))
    if kind == "default":
        return RopeConfig(theta)
    original = parameters.get("original_max_position_embeddings", positions)
    wanted = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (),
    }[kind]
    missing = [key for key in wanted if key not in parameters]
    if missing:
        raise UserError(f"config.json has rope type {kind!r} without {missing[0]!r}, which this type needs.")
    factor = float(parameters.get("factor", positions / original))
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    if kind == "llama3":
        low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
        if not low < high:
            raise UserError(f"config.json has low_freq_factor = {low:g}, not below high_freq_factor = {high:g}.")
        return RopeConfig(theta, "llama3", factor, low, high, original_max_positions=original)
    if theta <= 1:
        raise UserError(f"config.json has rope_theta = {theta:g}: with rope type 'yarn' it must be above 1.")
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        attention_factor=_attention_factor(parameters, factor),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
    )


def _attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """Returns YaRN's temperature: the given one, or the one that follows from the factor (eq. 22 of the paper)."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(parameters["mscale"]) / mscale(parameters["mscale_all_dim"])
    return mscale(1.0)


def rope_to_hf(rope: RopeConfig, local: RopeConfig | None, *, per_layer_type: bool) -> dict[str, Any]:
    """Returns `rope` and `local` as entries of a `config.json` for `rope_from_hf` and transformers 4 and 5."""
    scaling = _parameters(rope)
    old = {"rope_theta": rope.theta} | ({"rope_scaling": scaling} if rope.kind != "default" else {})
    if not per_layer_type:
        return {"rope_parameters": {**scaling, "rope_theta": rope.theta}, **old}
    local = local or RopeConfig()  # if no layer slides, no layer uses it
    return {
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": rope.theta},
            "sliding_attention": {**_parameters(local), "rope_theta": local.theta},
        },
        "rope_local_base_freq": local.theta,
        **old,
    }


def _parameters(rope: RopeConfig) -> dict[str, Any]:
    if rope.kind == "default":
        return {"rope_type": "default"}
    written: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind != "linear":
        written["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        written |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        written |= {
            "attention_factor": rope.attention_factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
    return written
