#!/usr/bin/env bash
# Checks a change in about a minute: the linter, the type checker and the fast tests. scripts/test.sh runs all tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Tests of text, of files, and of functions of small arrays. Those of losses and advantages compile small programs, which
# are kept for the next call.
fast=(
    tests/test_floors.py
    tests/experiment
    tests/rewards
    tests/tasks
    tests/statistics
    tests/losses
    tests/test_advantages.py
)

install test
status=0
.venv/bin/ruff check . || status=1
.venv/bin/ruff format --check . || status=1
.venv/bin/mypy || status=1
.venv/bin/python -m pytest -n 2 --dist loadfile "${fast[@]}" "$@" || status=1
exit $status
