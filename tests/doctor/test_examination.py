"""What is made of the checks: a certificate, a table, sentences, and a file."""

import json
from dataclasses import replace

import letters
import pytest
from rich.console import Console

from grpo_jax.doctor import CHECKS, Check, Subject, examination, examine, save, sentences, table
from grpo_jax.doctor.check import within
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment.fingerprint import fingerprint
from grpo_jax.policy import load
from grpo_jax.runs import record

SUBJECT = Subject(letters.config, load("scratch", scratch=letters.config.policy.scratch))


def with_checks(monkeypatch, **checks):
    monkeypatch.setattr(examination, "CHECKS", {name.replace("_", " "): check for name, check in checks.items()})


def failing(error):
    def check(subject):
        raise error

    return check


def good(subject):
    return Check("proved", "0", "1", figures={"value": 0.0})


def test_every_check_says_what_it_claims():
    assert len(CHECKS) == 23 and all(name == name.lower() and check.__doc__ for name, check in CHECKS.items())


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ((), "proved"),
        ((Check("not applicable"),), "proved"),
        ((Check("warning"),), "warning"),
        ((Check("warning"), Check("refuted")), "refuted"),
    ],
)
def test_the_worst_verdict_is_that_of_the_certificate(monkeypatch, others, verdict):
    checks = {f"check_{i}": lambda subject, check=check: check for i, check in enumerate(others)}
    with_checks(monkeypatch, first=good, **checks)
    told = []
    certificate = examine(SUBJECT, tell=told.append)
    assert certificate.verdict == verdict and len(certificate.refuted) == (verdict == "refuted")
    assert told == [check.name for check in certificate.checks]


def test_what_fails_is_refuted_once_with_its_sentence(monkeypatch):
    failure = failing(RunError("reward 'mine' raised ValueError."))
    with_checks(
        monkeypatch, good=good, rewards=failure, groups=failure, config=failing(UserError("no room.")), bug=failing(
            ZeroDivisionError("by\n\x1b[31mzero")
        )
    )  # fmt: skip
    found = examine(SUBJECT).checks
    assert [check.verdict for check in found] == ["proved", "refuted", "not applicable", "refuted", "refuted"]
    assert found[1].sentence == "reward 'mine' raised ValueError."
    assert found[2].sentence == "not checked: see 'rewards'."
    assert "ZeroDivisionError: by \x1b[31mzero" in found[4].sentence
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(table(found))
        for sentence in sentences(found):
            console.print(sentence, soft_wrap=True)
    printed = capture.get()
    assert "\x1b[31m" not in printed and "\\x1b[31mzero" in printed
    lines = [line for line in printed.splitlines() if ": " in line]
    assert lines[0].startswith("refuted: rewards: reward 'mine'") and lines[-1].startswith("not applicable: groups")


def test_a_certificate_names_what_it_is_about(monkeypatch, tmp_path):
    with_checks(monkeypatch, good=good)
    path = save(examine(SUBJECT), tmp_path, {"experiment": tmp_path / "letters.py"})
    content = json.loads(path.read_text())
    assert path.name == "certificate.json" and content["verdict"] == "proved"
    assert content["key"] == fingerprint(letters.config)
    assert content["key"] != fingerprint(replace(letters.config, seed=1))
    assert content["versions"] == record.versions() and content["device"]["platform"] == "cpu"
    [check] = content["checks"]
    assert check["seconds"] >= 0
    assert {**check, "seconds": 0} == {
        "name": "good", "verdict": "proved", "measured": "0", "bound": "1", "sentence": "", "seconds": 0,
        "figures": {"value": 0.0},
    }  # fmt: skip


def test_a_number_that_is_none_is_within_no_bound():
    assert within(0.5, 1.0, "", "too large").verdict == "proved"
    assert within(1.5, 1.0, "", "too large").sentence == "too large"
    assert within(float("nan"), 1.0, "", "too large").verdict == "refuted"
