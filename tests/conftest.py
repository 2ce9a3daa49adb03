"""Runs the tests on 8 simulated CPU devices and keeps what XLA compiles, so that a second run is quick.

Both are set in the environment, so that tests which start a process of their own have them too.
"""

import getpass
import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

_cache = Path(tempfile.gettempdir()) / f"grpo_jax-tests-{getpass.getuser()}"
_cache.mkdir(mode=0o700, exist_ok=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
