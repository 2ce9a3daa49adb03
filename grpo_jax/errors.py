"""Errors that a user can cause: one sentence each that says what is wrong, where, and what would be right."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in a config, a file or a command. The command line prints it alone and exits with 2."""


class RunError(UserError):
    """A run that was well configured and failed all the same. The command line exits with status 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has come, as from a scheduler at a job's time limit. What handles Ctrl-C handles it too."""


def exit_status(command: Callable[[], object]) -> int:
    """Carries out a command and returns a process's exit status, with what a user did wrong on stderr in one sentence.

    0 for success, 1 for a `RunError`, 2 for another `UserError`, 130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        command()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    return 0


def warn(sentence: str) -> None:
    """Prints on stderr what is probably a mistake, and no reason to stop."""
    print(f"warning: {printable(sentence)}", file=sys.stderr)


def printable(text: str) -> str:
    """What a model says may reach the terminal, its escape sequences may not; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
