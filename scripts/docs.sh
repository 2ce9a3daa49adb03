#!/usr/bin/env bash
# Builds the documentation from docs/ and the docstrings in site/. A link that leads nowhere is an error. Arguments go to
# `mkdocs build`. Open site/index.html in a browser. Neither the build nor the pages nor the search need a network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install docs
export NO_MKDOCS_2_WARNING=1 # otherwise each build prints a note about the successor of the theme
exec .venv/bin/mkdocs build --strict --clean "$@"
