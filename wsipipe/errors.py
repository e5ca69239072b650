"""One tree of exceptions: what the user can mend.

The command line prints these bare and exits 1. Anything else is a defect of wsipipe and keeps its traceback.
"""


class WsipipeError(Exception):
    """What was wrong, where, and what to do about it, in one sentence."""


class SlideError(WsipipeError):
    """A slide file that cannot be opened, read or placed in micrometres."""


class ResolutionError(SlideError):
    """A slide file that states no resolution, or one that cannot be its own."""


class DamageError(SlideError):
    """A place of a slide file that cannot be read, although the file is there and still the same."""


class ConfigError(WsipipeError):
    """A setting, a sheet or a region file that does not say what it should."""


class ModelError(WsipipeError):
    """A model that is unknown, or weights that do not fit it."""


class StoreError(WsipipeError):
    """A file of ours that is missing, foreign, incomplete or made with other settings."""


class TornError(StoreError):
    """A file of ours that is not as it was written, although the disk and the memory do their work."""


class SettingsError(StoreError):
    """A file of ours that is sound, but was made with other settings."""


class DataError(WsipipeError):
    """A training or evaluation data set that does not hold what its layout promises."""


def one_line(error: BaseException) -> str:
    """What an exception of a library says, for a sentence of ours: without line breaks, its kind if it says nothing.

    Examples
    --------
    >>> one_line(ValueError("no scalar\\n  in line 2"))
    'no scalar in line 2'
    >>> one_line(MemoryError())
    'MemoryError'
    """
    return " ".join(str(error).split()) or type(error).__name__
