"""One process at a time: a lock beside the file, which the system lifts when its holder ends, however it ends."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from wsipipe.errors import StoreError

log = logging.getLogger(__name__)

PAUSE_S = 0.5  # between two tries of one who waits


class Lock:
    """Holds `<path>.lock` from its making to `release`; who holds it is written inside.

    Parameters
    ----------
    wait : bool
        Wait until it is free.

    Raises
    ------
    StoreError
        If another process, or another lock of this one, holds it; says which.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self._wait, self._waited = wait, False
        self._place = (place := path.absolute()).with_name(place.name + ".lock")  # also of "."
        self._place.parent.mkdir(parents=True, exist_ok=True)
        while not self._took(path):
            pass
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        except OSError:  # a full disk: nobody must wait for a lock that nobody has
            self.release()
            raise

    def release(self) -> None:
        self._place.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what could not be written at first cannot be now
            self._file.close()

    def _took(self, path: Path) -> bool:
        try:  # a link that somebody left here must not have us write elsewhere
            handle = os.open(self._place, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise StoreError(f"{self._place} cannot be opened: {(error.strerror or 'error').lower()}") from error
        self._file: TextIO = os.fdopen(handle, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            holder = holder or "another process"
            if not self._wait:
                raise StoreError(f"{path} is in use by {holder}; wait for it or stop it") from None
            if not self._waited:
                log.info("%s is in use by %s; waiting for it", path, holder)
            self._waited = True
            time.sleep(PAUSE_S)
            return False
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s); make sure that one process writes it", path, error)
        # The last holder may have removed the file between our opening and locking it: then nobody else sees this lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self._place.stat()):
                return True
        self._file.close()
        return False


def is_held(path: Path) -> bool:
    """Whether some process on this machine, or one whose locks this file system shows, holds the lock of `path`."""
    try:
        with path.with_name(path.name + ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
