"""Errors a user can act on. Each message says what was got, what was expected and what to do."""

from typing import ClassVar


class HpgrError(Exception):
    """Base of every error raised for a user; jobs print its message alone, without a traceback."""

    goes_on: ClassVar[bool] = True
    """Whether the same job can go on once the cause is gone: what failed is a cluster, a disk, a store."""


class ConfigError(HpgrError, ValueError):
    """The configuration is not valid; the message lists every fault with its dotted path."""

    goes_on = False


class DataError(HpgrError, ValueError):
    """The input log cannot be used as configured."""

    goes_on = False


class ArtifactError(HpgrError, RuntimeError):
    """A run folder, prepared log or checkpoint is not there, not whole, or not to be used."""

    goes_on = False


class StoreError(ArtifactError):
    """A disk or store refuses to read or write."""

    goes_on = True


class TrainingError(HpgrError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""

    goes_on = False


class DeviceMemoryError(TrainingError):
    """A GPU has no room for a training step; another GPU, or other `resources`, may have."""


class WorkersLostError(TrainingError):
    """Training's workers were lost more often than resources.max_failures allows."""

    goes_on = True
