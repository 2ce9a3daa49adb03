#!/usr/bin/env bash
# Builds the documentation from docs/ and the docstrings in site/. A link that leads nowhere is an error. Arguments go to
# `mkdocs build`. Open site/index.html in a browser; neither the build nor the pages need a network. The search needs a
# server: `.venv/bin/mkdocs serve`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install docs
exec .venv/bin/mkdocs build --strict --clean "$@"
