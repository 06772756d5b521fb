"""Exceptions whose message is meant for people."""


class PsycheError(Exception):
    """A problem that a person can fix; the message is one sentence with the cause and the fix.

    The command line prints it without a traceback and exits with ``exit_code``. Any other exception that reaches it is
    a bug and keeps its traceback.
    """

    exit_code = 1


class ConfigError(PsycheError):
    """An invalid configuration; the message names the key and the reason."""

    exit_code = 2
