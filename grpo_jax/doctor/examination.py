"""All checks in their order, and what comes of them: a certificate."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from grpo_jax import sharding
from grpo_jax.doctor import data, exported, masks, memory, rewards, text, updates
from grpo_jax.doctor.check import Check, Verdict, not_applicable
from grpo_jax.doctor.subject import Subject
from grpo_jax.errors import UserError, failure_of
from grpo_jax.experiment import Experiment, sources
from grpo_jax.experiment.fingerprint import fingerprint_or_none
from grpo_jax.runs import record
from grpo_jax.runs.display import visible
from grpo_jax.runs.files import write_json

CHECKS: Mapping[str, Callable[[Subject], Check]] = {
    "the splits are disjoint": data.splits_are_disjoint,
    "every prompt fits the context": data.prompts_fit,
    "a prompt has one begin token": text.one_begin_token,
    "the chat template round-trips": text.chat_template_round_trip,
    "a group is one example": data.a_group_is_one_example,
    "completions survive decoding": text.completions_survive_decoding,
    "rewards are deterministic": rewards.rewards_are_deterministic,
    "rewards are finite": rewards.rewards_are_finite,
    "rewards leave their arguments alone": rewards.rewards_leave_arguments_alone,
    "rewards differ within groups": rewards.rewards_differ_within_groups,
    "a seed and a step name the batch": data.seeds_name_the_batch,
    "stop tokens end and are trained on": masks.stop_tokens_end_and_are_trained,
    "only the policy's tokens are trained on": masks.only_the_policys_tokens_are_trained,
    "the sampler and the trainer agree": updates.sampler_and_trainer_agree,
    "gradient accumulation changes nothing": updates.accumulation_changes_nothing,
    "the number of devices changes nothing": updates.devices_change_nothing,
    "padding changes nothing": updates.padding_changes_nothing,
    "the order of the batch changes nothing": updates.order_changes_nothing,
    "the gradient reaches the parameters": updates.gradient_reaches_the_parameters,
    "better completions become likelier": updates.better_completions_become_likelier,
    "the learning rate follows the updates": updates.learning_rate_follows_the_updates,
    "the exported policy is the policy": exported.exported_policy_is_the_policy,
    "the memory is enough": memory.memory_is_enough,
}
"""By what each of them claims. Those that cost least come first, and those that share a program stand together."""

STYLES: Mapping[Verdict, str] = {"proved": "green", "refuted": "bold red", "warning": "yellow", "not applicable": "dim"}


@dataclass(frozen=True)
class Certificate:
    """What an examination came to.

    Attributes:
      checks: in their order.
      seconds: how long all of them took.
      about: what was examined, and on what: the fingerprints of the experiment, versions, the device, the policy.
    """

    checks: Sequence[Check]
    seconds: float
    about: Mapping[str, Any]

    @property
    def refuted(self) -> list[Check]:
        """The claims that do not hold."""
        return [check for check in self.checks if check.verdict == "refuted"]

    @property
    def verdict(self) -> Verdict:
        """`refuted` if a check was, else `warning` if one warned, else `proved`."""
        found = {check.verdict for check in self.checks}
        return "refuted" if "refuted" in found else "warning" if "warning" in found else "proved"


def examine(subject: Subject, *, tell: Callable[[str], None] = lambda name: None) -> Certificate:
    """Makes every check of an experiment; `tell` hears the name of each before it begins.

    A check that cannot be made because something of the user's fails is refuted, with the sentence that training would
    end with. Where the same failure stops further checks, they say so.
    """
    began, checks = time.monotonic(), []
    reported: dict[str, str] = {}
    for name, function in CHECKS.items():
        tell(name)
        start = time.monotonic()
        found = _attempt(function, subject)
        if found.verdict == "refuted" and found.sentence in reported:
            found = not_applicable(f"not checked: see {reported[found.sentence]!r}.")
        elif found.verdict == "refuted":
            reported[found.sentence] = name
        checks.append(replace(found, name=name, seconds=round(time.monotonic() - start, 2)))
    return Certificate(checks, round(time.monotonic() - began, 2), about(subject.experiment))


def _attempt(function: Callable[[Subject], Check], subject: Subject) -> Check:
    try:
        return function(subject)
    except UserError as error:
        return Check("refuted", "failed", sentence=str(error))
    except Exception as error:  # of the device, or of a loss, a method or a template of the user's own
        if "RESOURCE_EXHAUSTED" in str(error):
            why = "not checked: the device's memory is not enough for the further copies of the policy that this needs."
            return not_applicable(why)
        return Check("refuted", "failed", sentence=f"the check could not be made, because of {failure_of(error)}.")


def about(experiment: Experiment) -> dict[str, Any]:
    """The experiment and the machine that a certificate is about, with the keys that run.json has."""
    return {
        "made": record.now(),
        "key": fingerprint_or_none(experiment),
        "config_key": fingerprint_or_none(experiment, files=False),
        "package": sources.package_digest(),
        "versions": record.versions(),
        "device": sharding.describe(),
        "processor": record.processor(),
    }


def save(certificate: Certificate, directory: Path, more: Mapping[str, Any]) -> Path:
    """Writes certificate.json and returns its path."""
    path = directory / record.CERTIFICATE
    content = {
        "verdict": certificate.verdict,
        "seconds": certificate.seconds,
        **more,
        **certificate.about,
        "checks": [asdict(check) for check in certificate.checks],
    }
    write_json(path, content)
    return path


def table(checks: Iterable[Check]) -> Table:
    """All checks with their verdicts and figures."""
    found = Table()
    for column in ("check", "verdict", "measured", "bound"):
        found.add_column(column, overflow="fold")
    for check in checks:
        verdict = Text(check.verdict, style=STYLES[check.verdict])
        found.add_row(check.name, verdict, visible(check.measured), visible(check.bound))
    return found


def sentences(checks: Iterable[Check]) -> list[Text]:
    """What is wrong and what to do, a line for each check that has something to say; the worst first."""
    order = list(STYLES)
    ranked = sorted((c for c in checks if c.sentence), key=lambda c: (1, 2, 0, 3).index(order.index(c.verdict)))
    return [
        Text.assemble((f"{check.verdict}: ", STYLES[check.verdict]), f"{check.name}: ", visible(check.sentence))
        for check in ranked
    ]
