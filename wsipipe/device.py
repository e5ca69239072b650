"""Where the network runs, how it counts, and how much of it at once."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from wsipipe.errors import ConfigError

if TYPE_CHECKING:  # --help needs no torch
    import torch

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]

# Of the device's memory for one 256 px tile; a CUDA device that has less halves its batch by itself.
TILE_BYTES = {"fp32": 512 * 2**20, "bf16": 256 * 2**20, "fp16": 256 * 2**20}
LARGEST_BATCH = 64  # a ViT keeps a big GPU busy with fewer; more only costs memory
CPU_BATCH = 4  # its cores are busy with one tile already; a few spare the overhead of small ones
MOST_NETWORKS = 4  # batches at once on a CPU, each of which holds its activations; more cores share a batch
MOST_READERS = 8  # decode some 8 x 50 MP/s, several times what the fastest network takes


def choose_device(name: str = "auto") -> "torch.device":
    """The device of that name, or the best there is.

    Raises
    ------
    ConfigError
        If the name is unknown or there is no such device; says what there is.
    """
    import torch

    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    available = [*cuda, *mps, "cpu"]
    wanted = {"auto": available[0], "cuda": "cuda:0"}.get(name, name)
    if wanted not in available:
        raise ConfigError(f"device '{name}' is not here; available: auto, {', '.join(available)}")
    return torch.device(wanted)


def require_precision(name: str) -> None:
    """Raise ConfigError if there is no arithmetic of that name."""
    if name not in ("auto", *get_args(Precision)):
        raise ConfigError(f"precision '{name}' is unknown; choose auto, {', '.join(get_args(Precision))}")


def choose_precision(name: str, device: "torch.device") -> Precision:
    """The arithmetic of that name, or the fastest that the device does in hardware and that is exact enough.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    import torch

    require_precision(name)
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"
    if device.type == "cpu" and name != "fp32" and not _cpu_has_bf16():
        log.warning("this CPU has no %s units: fp32 is many times faster", name)
    return cast(Precision, name)


def torch_dtype(precision: Precision) -> "torch.dtype":
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def choose_batch_size(device: "torch.device", tile_px: int, precision: Precision) -> int:
    """Tiles a batch, from the device's memory, free or not: the same on every run, so that runs agree bit for bit."""
    import torch

    tiles_of_256 = (tile_px / 256) ** 2
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        fitting = 0.5 * memory / (TILE_BYTES[precision] * tiles_of_256)
        return max(1, min(LARGEST_BATCH, int(fitting)))
    return max(1, int(CPU_BATCH / tiles_of_256))


def choose_readers(device: "torch.device") -> int:
    """Threads that read the slide: they share the CPUs with a network that runs there."""
    return min(usable_cpus(), 2 if device.type == "cpu" else MOST_READERS)


def network_threads(device: "torch.device") -> int:
    """Threads for the network: torch counts the machine's cores, not those of this job."""
    import torch

    return min(torch.get_num_threads(), usable_cpus()) if device.type == "cpu" else 1


def choose_networks(threads: int) -> int:
    """Batches that the network works on at a time, so that its threads need not wait for one another."""
    return min(threads, MOST_NETWORKS)


def describe(device: "torch.device", precision: Precision) -> str:
    """One line for the log."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    elif device.type == "mps":
        name = "Apple GPU"
    else:
        name = f"{usable_cpus()} CPUs, {torch.backends.cpu.get_cpu_capability()}"
    return f"{device} ({name}), {precision}"


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs this process may keep busy: its affinity and its container's or job's quota, not what the machine has."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, int(_quota(cgroups, own))))


def _quota(cgroups: Path, own: Path) -> float:
    """CPUs that the control groups of this process and all groups above them grant."""
    quota = float(2**31)
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, place = line.split(":", 2)
        names: tuple[str, ...] = ("cpu.max",)
        if controllers == "":  # version 2
            root = cgroups
        elif "cpu" in controllers.split(","):
            root, names = cgroups / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        group = root / place.lstrip("/")
        for folder in (group, *group.parents):
            if all((folder / name).is_file() for name in names):
                granted, period = " ".join((folder / name).read_text() for name in names).split()
                if granted not in ("max", "-1"):
                    quota = min(quota, int(granted) / int(period))
            if folder == root:
                break
    return quota


def _cpu_has_bf16() -> bool:
    """AMX or AVX512-BF16; elsewhere bf16 is emulated, 10 to 30 times slower than fp32 as measured on AVX2."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
