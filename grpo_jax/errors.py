"""Errors that a user can cause: one sentence each that says what is wrong, where, and what would be right."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in a config, a file or a command. The command line prints it alone and exits with 2."""


class RunError(UserError):
    """A run that was well configured and failed all the same. The command line exits with status 1."""


class Terminated(SystemExit, KeyboardInterrupt):
    """SIGTERM has come, as from a scheduler at a job's time limit. What handles Ctrl-C handles it too.

    It is an exit as well, so that a script that does not handle it ends without a traceback, with the status 143.
    """

    def __init__(self) -> None:
        super().__init__(143)


def exit_status(command: Callable[[], object]) -> int:
    """Carries out a command and returns a process's exit status, with what a user did wrong on stderr in one sentence.

    0 for success, 1 for a `RunError`, 2 for another `UserError`, 130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        command()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except BrokenPipeError:  # of `grpo-jax list | head`: nobody reads on, and nothing went wrong
        sys.stdout = None  # or Python complains when it ends
        return 0
    except OSError as error:  # a name that is too long, a folder that may not be read
        print(f"error: {printable(_refusal(error))}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory: {printable(one_line(error, 200))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    return 0


def _refusal(error: OSError) -> str:
    """What the operating system refused, in one sentence."""
    where = "" if error.filename is None else f"{shown(str(error.filename))}: "
    return f"{where}{error.strerror or one_line(error)}."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on the host or (an error of XLA, which is a RuntimeError) on a device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def warn(sentence: str) -> None:
    """Prints on stderr what is probably a mistake, and no reason to stop."""
    print(f"warning: {printable(sentence)}", file=sys.stderr)


def one_line(text: object, limit: int = 500) -> str:
    """The text of a value, such as another program's error, on one line and cut to `limit` characters."""
    try:
        line = " ".join(str(text).split())
    except Exception:  # a user's class may have a __str__ that fails
        line = type(text).__name__
    return line if len(line) <= limit else f"{line[: limit - 2]} …"


def shown(value: object, limit: int = 200) -> str:
    """A value as a sentence shows it: its `repr` on one line, cut to `limit` characters; else the name of its type."""
    try:
        return one_line(repr(value), limit)
    except Exception:  # a number of more than 4,300 digits, a list that holds itself too deep, a user's own __repr__
        return f"a value of type {type(value).__name__}"


def failure_of(error: BaseException) -> str:
    """What went wrong in code of the user, on one line: the name of the exception and what it says."""
    return f"{type(error).__name__}: {one_line(error, 200)}".removesuffix(": ")


def printable(text: str) -> str:
    """What a model says may reach the terminal, its escape sequences may not; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
