"""One tree of exceptions: what the user can mend.

The command line prints these bare and exits 1. Anything else is a defect of wsipipe and keeps its traceback.
"""


class WsipipeError(Exception):
    """What was wrong, where, and what to do about it, in one sentence."""


class SlideError(WsipipeError):
    """A slide file that cannot be opened, read or placed in micrometres."""


class ConfigError(WsipipeError):
    """A setting, a sheet or a region file that does not say what it should."""


class ModelError(WsipipeError):
    """A model that is unknown, or weights that do not fit it."""


class StoreError(WsipipeError):
    """A file of ours that is missing, foreign, incomplete or made with other settings."""


class SettingsError(StoreError):
    """A file of ours that is sound, but was made with other settings."""


class DataError(WsipipeError):
    """A training or evaluation data set that does not hold what its layout promises."""
