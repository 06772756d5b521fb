"""The one exception type a person is meant to read."""


class PsycheError(Exception):
    """Something a person can mend: the message is one sentence naming the cause and the mend.

    The command line prints it without a traceback and exits with ``exit_code``. Anything else
    that escapes is a bug and keeps its traceback.
    """

    exit_code = 1


class ConfigError(PsycheError):
    """A configuration was refused; the message names the field's path and the reason."""

    exit_code = 2
