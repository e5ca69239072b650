"""What this machine has and lacks for wsipipe: looks, changes nothing, needs no network."""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import wsipipe
from wsipipe.errors import ModelError, one_line

Verdict = Literal["ok", "warn", "fail"]
GIB = 2**30
LITTLE_MEMORY = 4 * GIB  # what a slide may take beside the model
LITTLE_DISK = 10 * GIB  # the maps of a big 40x slide
ROUNDED = 0.005  # by which a probability may differ between fp32 and `--precision auto`, on the mean: seen are 0.0001


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `warn` works but slower or not for long, `fail` has to be mended."""

    name: str
    verdict: Verdict
    text: str


def examine(folder: Path = Path()) -> list[Check]:
    """Every check, in a fixed order; `folder` is where results would go."""
    looks: dict[str, Callable[[], tuple[Verdict, str]]] = {
        "Python": lambda: ("ok", f"{platform.python_version()} at {sys.executable}, {platform.platform()}"),
        "wsipipe": lambda: ("ok", f"{wsipipe.__version__} at {Path(wsipipe.__file__).parent}"),
        "PyTorch": _torch,
        "device": _device,
        "CPUs": lambda: ("ok", _cpus()),
        "memory": _memory,
        "disk": lambda: _disk(folder),
        "OpenSlide": _openslide,
        "codecs": _codecs,
        "numba": _numba,
        "weights": _weights,
        "arithmetic": _arithmetic,
    }
    checks = []
    for name, look in looks.items():
        try:
            verdict, text = look()
        except Exception as error:  # noqa: BLE001 - whatever a broken installation or driver makes its libraries raise
            verdict, text = "fail", f"{type(error).__name__}: {one_line(error)}"
        checks.append(Check(name, verdict, text))
    return checks


def usable_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may use: the machine's, or what its container or job grants if that is less."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, place = line.split(":", 2)
        if controllers == "":  # version 2
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / place.lstrip("/")
        for folder in (group, *group.parents):
            granted = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
            if granted != "max":
                limits.append(int(granted))
            if folder == root:
                break
    return min(limits)


def _torch() -> tuple[Verdict, str]:
    import torch
    import torchvision

    cuda, hip = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "no CUDA"
    versions = f"{torch.__version__} ({build}), torchvision {torchvision.__version__}"
    if Path("/dev/nvidia0").exists() and not torch.cuda.is_available():
        return "warn", f"{versions}: there is an NVIDIA GPU that it cannot use; match the driver to the CUDA build"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "ok", f"{versions}, GPUs: {', '.join(names) or 'none'}"


def _device() -> tuple[Verdict, str]:
    from wsipipe.device import choose_device, choose_precision, describe

    device = choose_device()
    return "ok", f"--device auto takes {describe(device, choose_precision('auto', device))}"


def _cpus() -> str:
    from wsipipe.device import usable_cpus

    return f"{usable_cpus()} usable of {os.cpu_count()}"


def _memory() -> tuple[Verdict, str]:
    import psutil

    usable, whole = usable_memory(), int(psutil.virtual_memory().total)
    text = f"{usable / GIB:.1f} GiB usable of {whole / GIB:.1f}"
    return ("ok", text) if usable >= LITTLE_MEMORY else ("warn", f"{text}; {LITTLE_MEMORY // GIB} are advised")


def _disk(folder: Path) -> tuple[Verdict, str]:
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free at {folder.resolve()}"
    return ("ok", text) if free >= LITTLE_DISK else ("warn", f"{text}; a big slide takes up to {LITTLE_DISK // GIB}")


def _openslide() -> tuple[Verdict, str]:
    import openslide

    return "ok", f"library {openslide.__library_version__}, Python binding {openslide.__version__}"


def _codecs() -> tuple[Verdict, str]:
    import imagecodecs
    import numpy as np

    image = np.full((16, 16, 3), 200, np.uint8)
    for name in ("jpeg8", "jpeg2k"):
        encode, decode = getattr(imagecodecs, f"{name}_encode"), getattr(imagecodecs, f"{name}_decode")
        if abs(decode(encode(image, level=90)).astype(int) - 200).max() > 2:
            return "fail", f"{name} of imagecodecs {imagecodecs.__version__} returns wrong pixels; install it anew"
    return "ok", f"JPEG and JPEG 2000 by imagecodecs {imagecodecs.__version__}"


def _numba() -> tuple[Verdict, str]:
    import numba

    try:
        place = numba.njit(cache=True)(_kernel).stats.cache_path
    except RuntimeError:  # numba found no folder for its cache
        return "warn", "no folder to keep machine code in, each process compiles anew; set NUMBA_CACHE_DIR to one"
    return "ok", f"{numba.__version__}, machine code is kept in {place}"


def _kernel() -> None:
    """Numba looks for a folder by where a function's source lies; this one lies with the package."""


def _weights() -> tuple[Verdict, str]:
    from wsipipe.model import weights

    path = weights.find_checkpoint(weights.DEFAULT_MODEL)
    digest = weights.sha256(path)
    if digest != weights.shipped_sha256(path):
        raise ModelError(f"{path} is not as shipped, its sha256 is {digest}; install wsipipe anew")
    return "ok", f"{path.name}, sha256 {digest[:16]}"


def _arithmetic() -> tuple[Verdict, str]:
    """Libraries have had kernels for the newest CPUs and GPUs that compute something else: no error tells of it."""
    import torch

    from wsipipe.device import choose_device, choose_precision, torch_dtype
    from wsipipe.maps import to_input
    from wsipipe.model.inference import prepare_for_inference
    from wsipipe.model.weights import DEFAULT_MODEL, load_model, shipped_models

    device = choose_device()
    precision = choose_precision("auto", device)
    across = torch.arange(256) % 32 - 16
    disks = (across.square() + across.square()[:, None] < 81)[None, ..., None]  # such as nuclei are
    picture = torch.where(disks, torch.tensor([90, 60, 140]), torch.tensor([225, 190, 215])).to(torch.uint8)

    def nuclei(name: str, where: torch.device, dtype: torch.dtype) -> torch.Tensor:
        network, spec, _ = load_model(name)
        prepared = prepare_for_inference(network, where, dtype)
        with torch.inference_mode():
            pixels = to_input(picture, spec.mean, spec.std, device=where, dtype=dtype)
            answer: torch.Tensor = prepared(pixels)["nuclei"]
        return answer.float().cpu().softmax(1)[:, 1]

    differences = [
        (nuclei(name, device, torch_dtype(precision)) - nuclei(name, torch.device("cpu"), torch.float32)).abs().mean()
        for name in {DEFAULT_MODEL, *shipped_models()}
    ]
    difference = torch.stack(differences).max().item()
    text = f"{precision} on {device} differs from fp32 on the CPU by {difference:.1e} in the probability of a nucleus"
    if difference <= ROUNDED:  # what is no number is not
        return "ok", text
    return "fail", f"{text}; give --precision fp32, and install another torch or driver"
