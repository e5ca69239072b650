"""One GPU for one process: of N processes that ask at once, each gets another, or waits for one.

A lease is a locked file named after the device. The system lifts the lock when its holder ends, however it ends, so a
lease cannot outlive its process.
"""

import contextlib
import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from wsipipe.errors import ConfigError

log = logging.getLogger(__name__)

LEASE = re.compile(r"lease(?::(\d+))?")  # what --device says to ask for one; with the number that a workflow grants
PAUSE_S = 0.5  # between two looks whether a device has become free
# Not TMPDIR, which schedulers set anew for every job: processes of one user on one machine must meet here.
FOLDER = "/tmp/wsipipe-{user}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device under the name that this process calls it by, and under one that all processes share.

    Attributes
    ----------
    name : str
        "cuda:N", where N counts within CUDA_VISIBLE_DEVICES, or "mps".
    identity : str
        Its UUID: the same whatever a process is allowed to see.
    """

    name: str
    identity: str


def visible_gpus() -> list[Gpu]:
    """What this process may use: all CUDA devices, or those of CUDA_VISIBLE_DEVICES; else Apple's GPU."""
    import torch

    if not torch.cuda.is_available():
        return [Gpu("mps", "mps")] if torch.backends.mps.is_available() else []
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    devices = []
    for index in range(torch.cuda.device_count()):
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        if uuid is None:  # an old PyTorch: where the variable says which devices are seen, its words tell them apart
            uuid = visible[index] if index < len(visible) else index
        devices.append(Gpu(f"cuda:{index}", str(uuid)))
    return devices


@contextmanager
def granted(device: str) -> Iterator[str]:
    """The device that `--device` means, for this process: "lease" is one of its own, others are as named.

    "lease:0" is the CPU, and loud: what `--resources gpu=0` comes to.
    """
    asked = LEASE.fullmatch(device)
    if asked is None:
        yield device
    elif asked[1] == "0":
        log.warning("NO GPU WAS GRANTED: running on the CPU, which takes many times as long")
        yield "cpu"
    else:
        with leased(visible_gpus()) as name:
            yield name


@contextmanager
def leased(devices: Sequence[Gpu], folder: Path | None = None) -> Iterator[str]:
    """Hold one of `devices`, the first that is free, and yield its name; waits as long as none is.

    Without any device the CPU is what there is, and the log says so.

    Parameters
    ----------
    folder : Path, optional
        Where leases are; all processes that share the devices must name the same. By default WSIPIPE_LEASES, or one
        of this user on this machine.

    Raises
    ------
    ConfigError
        If the folder cannot be used, or is another user's.
    """
    if not devices:
        log.warning("NO GPU IS HERE: running on the CPU, which takes many times as long")
        yield "cpu"
        return
    folder = _own_folder(folder or Path(os.environ.get("WSIPIPE_LEASES") or FOLDER.format(user=os.getuid())))
    waiting = False
    while (held := _take_one(devices, folder)) is None:
        if not waiting:
            log.info("all of %s are in use; waiting for one", ", ".join(device.name for device in devices))
        waiting = True
        time.sleep(PAUSE_S)
    device, file = held
    log.info("leased %s (%s)", device.name, device.identity)
    try:
        yield device.name
    finally:
        file.close()  # and with it the lock; the file stays, for removing it would race with who opens it


def _take_one(devices: Sequence[Gpu], folder: Path) -> tuple[Gpu, TextIO] | None:
    for device in devices:
        plain = "".join(c if c.isalnum() or c == "-" else "_" for c in device.identity)
        file = (folder / f"{plain}.lease").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        return device, file
    return None


def _own_folder(folder: Path) -> Path:
    """`folder`, made if need be; one in /tmp that somebody else made is a trap."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"no leases can be kept in {folder} ({error}); set WSIPIPE_LEASES to a folder") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{folder} is not a folder of this user; set WSIPIPE_LEASES to one that is")
    return folder
