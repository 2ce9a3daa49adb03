"""Runs the tests on 8 simulated CPU devices and keeps what XLA compiles, so that a second run is quick.

Both are set in the environment, so that tests which start a process of their own have them too.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from private import private_folder

# Devices that wait for one another hold a thread each, and XLA makes no more threads than devices unless NPROC says so.
# It aborts the process when one has waited 40 s for the others, as has happened in CI.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("NPROC", "16")

# What JAX finds there it runs, so nobody else may write there.
_cache = private_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_jax" / "tests")
if _cache is not None:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    """Frees a module's executables, lest XLA's CPU backend run out of memory mappings, and abort.

    The gradient of a dozen small products holds 33 mappings until it is freed, and Linux gives a process 65,530.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
