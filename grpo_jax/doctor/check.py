"""`Check`: what one check of an experiment has found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["proved", "refuted", "warning", "not applicable"]


@dataclass(frozen=True)
class Check:
    """What a check has found.

    Attributes:
      verdict: `proved` if the claim held wherever it was tried, `refuted` if it did not; `warning` for what may be
        meant, or could not be shown; `not applicable` where there is nothing to check.
      measured, bound: the figure and what it had to be, as texts.
      sentence: what is wrong and what to do, or why there was nothing to check; empty for a claim that was proved.
      figures: the numbers behind it.
      name: the claim.
      seconds: how long the check took.
    """

    verdict: Verdict
    measured: str = ""
    bound: str = ""
    sentence: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    seconds: float = 0.0


def not_applicable(why: str) -> Check:
    """A check for which there is nothing to look at."""
    return Check("not applicable", sentence=why)


def verified(holds: bool, measured: str, bound: str, sentence: str, figures: Mapping[str, Any]) -> Check:
    """A claim that is proved if it holds and else refuted; `sentence` says then what is wrong and what to do."""
    return Check("proved" if holds else "refuted", measured, bound, "" if holds else sentence, figures)


def within(value: float, limit: float, unit: str, sentence: str, **figures: Any) -> Check:
    """Whether a number is at most its limit; NaN is not. `sentence` says what to do if it is not."""
    figures = {"value": value, "limit": limit, **figures}
    return verified(value <= limit, f"{value:.1e}{unit}", f"{limit:.0e}{unit}", sentence, figures)


def count(number: int, thing: str) -> str:
    """A number of things, such as "1 prompt" and "1,200 prompts"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
