"""Errors a user can act on. Each message says what was got, what was expected and what to do."""


class HpgrError(Exception):
    """Base of every error raised for a user; jobs print its message alone, without a traceback."""


class ConfigError(HpgrError, ValueError):
    """The configuration is not valid; the message lists every fault with its dotted path."""


class DataError(HpgrError, ValueError):
    """The input log cannot be used as configured."""


class ArtifactError(HpgrError, RuntimeError):
    """A run folder, prepared log or checkpoint cannot be read or written."""


class TrainingError(HpgrError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""
