#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M-Instruct on sums with GRPO, from nothing but Python 3.11+ and the package index.
# Arguments go to `grpo-jax train`, e.g. `scripts/quickstart.sh --set seed=1`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install gguf
# glibc otherwise gives large temporaries back after every step, and mapping them anew costs 5 to 8 % of it.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184
export MALLOC_TOP_PAD_=268435456
exec .venv/bin/grpo-jax train experiments/quickstart.py "$@"
