#!/usr/bin/env bash
# Runs the linter, the type checker and all tests. Arguments go to pytest, e.g. `scripts/test.sh tests/losses -x`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install test
status=0
.venv/bin/ruff check . || status=1
.venv/bin/ruff format --check . || status=1
.venv/bin/mypy || status=1
.venv/bin/python -m pytest -n 2 --dist loadfile --durations=10 "$@" || status=1 # last, so that its count is the last line
exit $status
