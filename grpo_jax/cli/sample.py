"""`grpo-jax sample`: prints what a policy answers."""

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import Flag, OptionalFloat, OptionalInt, OptionalText
from grpo_jax.errors import UserError, printable


def sample(
    source: Annotated[Positional[str], arg(metavar="RUN_OR_POLICY", help="A run, or any source of a policy.")],
    /,
    *,
    prompt: OptionalText = None,
    num: int = 4,
    temperature: OptionalFloat = None,
    max_tokens: OptionalInt = None,
    seed: int = 0,
    plain: Flag = False,
) -> None:
    """Sample completions of a prompt from a run's tuned policy, or from any other policy.

    Args:
        prompt: The prompt. Without it, prompts are read from the terminal until an empty line.
        num: How many completions.
        temperature: Sampling temperature; 0 is greedy. Default: that of the run's training, else 1.
        max_tokens: The most tokens of a completion. Default: that of the run's training, else 128.
        seed: The seed of the sampling noise.
        plain: Give the policy the prompt alone. By default, a run that was trained on chats first gets the turns that
            stand before the question in its first training prompt, such as worked examples.
    """
    if prompt is None and not sys.stdin.isatty():
        raise UserError("there is no terminal to read prompts from: say --prompt TEXT.")
    common.prepare_jax()
    from grpo_jax import api, policy

    speaker = api.load_run(source) if (Path(source) / "run.json").is_file() else policy.load(source)

    def answer(text: str, seed: int) -> None:
        [completions] = api.sample(
            speaker, text, num_samples=num, temperature=temperature, max_tokens=max_tokens, seed=seed, plain=plain
        )
        for number, completion in enumerate(completions, 1):
            print(f"{number}: {printable(completion)}" if num > 1 else printable(completion))

    if prompt is not None:
        answer(prompt, seed)
        return
    while text := _read_line():
        answer(text, seed)
        seed += 1


def _read_line() -> str:
    """A line from the terminal; empty at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
