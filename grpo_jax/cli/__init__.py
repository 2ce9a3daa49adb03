"""The command `grpo-jax`: one module for each of its commands, and commands.py, which puts them together."""

from grpo_jax.cli.commands import main

__all__ = ["main"]
