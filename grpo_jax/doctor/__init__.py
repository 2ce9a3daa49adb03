"""A certificate before training: what an experiment relies on, proved or refuted on its own task, policy and hardware.

Each check is a small function `(Subject) -> Check`; `examination.CHECKS` lists them in their order.
"""

from grpo_jax.doctor.check import Check, Verdict
from grpo_jax.doctor.examination import CHECKS, Certificate, examine, save, sentences, table
from grpo_jax.doctor.subject import Subject

__all__ = ["CHECKS", "Certificate", "Check", "Subject", "Verdict", "examine", "save", "sentences", "table"]
