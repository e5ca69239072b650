"""What several tests share: the tiny slide, drawn here, and the way to real data where it exists."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from hypothesis import settings
from torch import nn

from wsipipe.model import registry
from wsipipe.model.spec import ModelSpec
from wsipipe.model.weights import save_checkpoint

# A busy machine is no fault of the code. A gate judges every change by the same examples; elsewhere they are drawn.
settings.register_profile("wsipipe", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("wsipipe")

SHARED = Path(__file__).parents[2] / "shared"


@dataclass(frozen=True)
class Disc:
    """A drawn nucleus, level-0 px: the pixels whose centre is less than `radius` from (x, y)."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class TinySlide:
    """A 1024 x 768 px slide at 0.25 µm/px: white glass, one piece of pink tissue, twelve purple discs."""

    path: Path
    pixels: npt.NDArray[np.uint8]  # (768, 1024, 3), level 0
    discs: tuple[Disc, ...]
    mpp: float = 0.25
    glass: tuple[int, int, int] = (255, 255, 255)
    tissue: tuple[int, int, int] = (235, 180, 215)
    nucleus: tuple[int, int, int] = (90, 50, 140)


# Two straddle x = 512 or y = 256, where tiles and chunks of usual sizes meet; two nearly touch.
DISCS = (
    Disc(200.5, 180.5, 12), Disc(300, 256, 14), Disc(420.5, 150.5, 10), Disc(512, 320.5, 16),
    Disc(260.5, 420.5, 13), Disc(360, 500, 18), Disc(450.5, 420.5, 11), Disc(476.5, 420.5, 11),
    Disc(600.5, 200.5, 15), Disc(640.5, 384, 12), Disc(560.5, 540.5, 14), Disc(700.5, 300.5, 10),
)  # fmt: skip


def inside(disc: Disc, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    y, x = np.ogrid[: shape[0], : shape[1]]
    claim: npt.NDArray[np.bool_] = np.hypot(x + 0.5 - disc.x, y + 0.5 - disc.y) < disc.radius
    return claim


def write_svs(
    path: Path, pixels: npt.NDArray[np.uint8], mpp: float | None = 0.25, levels: int = 3, **options: object
) -> Path:
    """Write a tiled pyramid that readers take for an Aperio slide; each level is half the one before."""
    height, width = pixels.shape[:2]
    stated = "" if mpp is None else f"|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
    options = {"photometric": "rgb", "tile": (256, 256), "compression": "zlib", "metadata": None} | options
    with tifffile.TiffWriter(path, bigtiff=bool(options.pop("bigtiff", False))) as tiff:
        level = pixels
        for n in range(levels):
            size = f"{width}x{height} [0,0 {width}x{height}] (256x256)"
            if n:
                size += f" -> {level.shape[1]}x{level.shape[0]}"
            tiff.write(
                level, description=f"Aperio Image Library v12.0.0\r\n{size}{stated}", subfiletype=n and 1, **options
            )
            h, w = level.shape[0] // 2 * 2, level.shape[1] // 2 * 2
            if n == 0 and levels > 1:  # the second page is always a thumbnail
                tiff.write(np.ascontiguousarray(level[::8, ::8]), photometric="rgb", rowsperstrip=16, metadata=None)
            level = level[:h, :w].reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3)).round().astype(np.uint8)
    return path


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command that is called within a test sets what is logged; the next test must not notice."""
    logger = logging.getLogger("wsipipe")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(scope="session")
def make_svs() -> Callable[..., Path]:
    """`write_svs`, for tests that draw their own slide."""
    return write_svs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinySlide:
    """The tiny slide with its truth: colours are exact, the file is compressed without loss."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.svs"
    pixels = np.full((768, 1024, 3), TinySlide.glass, np.uint8)
    y, x = np.ogrid[:768, :1024]
    pixels[((x - 450) / 350) ** 2 + ((y - 360) / 300) ** 2 < 1] = TinySlide.tissue
    for disc in DISCS:
        pixels[inside(disc, (768, 1024))] = TinySlide.nucleus
    return TinySlide(write_svs(path, pixels), pixels, DISCS)


@pytest.fixture(scope="session")
def tiny_slide(tiny: TinySlide) -> Path:
    """Path of the tiny slide."""
    return tiny.path


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("slides/x.svs")`: the path of real data, or a skip that says what is missing."""

    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.exists():
            pytest.skip(f"real data is not here: {path}")
        return path

    return find


class ColourOracle(nn.Module):
    """A network that reads the truth from the colours of the tiny slide; wants RGB in [0, 1].

    What is dark in green is a nucleus, all of type 1; type 2 is the runner-up.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("threshold", torch.tensor(115 / 255))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        nucleus = 100 * (self.threshold - image[:, 1:2])
        types = torch.cat([-nucleus, nucleus, nucleus - 1][: self.classes], dim=1)
        return {"nuclei": torch.cat([-nucleus, nucleus], dim=1), "offsets": 0 * image[:, :2], "types": types}


ORACLE = ModelSpec(
    name="oracle",
    architecture="oracle",
    settings={},
    mpp=0.25,
    tile_px=96,
    halo_px=16,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    class_names=("background", "round", "other"),
    class_colours=((0, 0, 0), (200, 30, 40), (40, 90, 220)),
    source="drawn",
    licence="Apache-2.0",
)


@pytest.fixture
def oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of `ColourOracle`, which `--model` takes."""
    monkeypatch.setitem(registry.ARCHITECTURES, "oracle", ColourOracle)
    path = tmp_path / "oracle.safetensors"
    save_checkpoint(path, ColourOracle(3), ORACLE)
    return path
