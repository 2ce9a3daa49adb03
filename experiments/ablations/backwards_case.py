"""What these ablations vary: words spelt backwards (`experiments/methods/backwards.py`), judged on held-out words."""

from pathlib import Path

from grpo_jax.experiment import load, override, run_file

_FILE = Path(__file__).resolve().parents[1] / "methods" / "backwards.py"
task_of = run_file(_FILE).backwards
# Whatever an arm changes, its warm start is that of all the others.
_file = load(_FILE)
backwards = override(_file, {"warm_start.task": _file.task})
