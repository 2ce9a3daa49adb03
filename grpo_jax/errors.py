"""Errors that a user can cause: one sentence each that says what is wrong, where, and what would be right."""


class UserError(Exception):
    """A mistake in a config, a file or a command. The command line prints it alone and exits with 2."""


class RunError(UserError):
    """A run that was well configured and failed all the same. The command line exits with status 1."""
