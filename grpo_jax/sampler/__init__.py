"""Parameters, prompts and the names of noise to completions and their log-probabilities.

`decode` is the compiled loop over tokens and turns; `choose` is how one token is chosen.
"""

from grpo_jax.sampler.choose import Noise, Settings, choose_token, inverse_cdf, row_keys, truncated
from grpo_jax.sampler.decode import DecodeState, Generation, Observation, continue_generation, generate

__all__ = [
    "DecodeState",
    "Generation",
    "Noise",
    "Observation",
    "Settings",
    "choose_token",
    "continue_generation",
    "generate",
    "inverse_cdf",
    "row_keys",
    "truncated",
]
