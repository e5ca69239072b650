"""Slides, pictures and tissue masks for the fuzz harness: whole files, and how a harmed one is read."""

import io
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_harm import Seeds, WrongError, harmed

SHARED = Path(__file__).parents[2] / "shared" / "data" / "slides"


def pixels(width: int = 96, height: int = 64) -> Any:
    y, x = np.mgrid[:height, :width]
    return np.stack([(3 * x + y) % 256, 200 - (x * y) % 120, (x + 5 * y) % 256], -1).astype(np.uint8)


def written(write: Callable[[Path], object], ending: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"seed{ending}"
        write(path)
        return path.read_bytes()


def svs_seeds() -> Seeds:
    from conftest import write_svs

    seeds = {}
    for name, options in {
        "zlib": {"compression": "zlib"},
        "plain": {"compression": None},
        "big": {"compression": "zlib", "bigtiff": True},
        "jpeg": {"compression": "jpeg", "compressionargs": {"level": 80}},
        "j2k": {"compression": "aperio_jp2000_rgb"},
        "lzw": {"compression": "lzw"},
    }.items():
        seeds[name] = written(lambda path, o=options: write_svs(path, pixels(), levels=2, tile=(32, 32), **o), ".svs")
    return seeds


def tiff_seeds() -> Seeds:
    import tifffile

    def write(path: Path, **options: Any) -> None:
        tifffile.imwrite(path, options.pop("pixels", pixels()), **{"photometric": "rgb", **options})

    planes = np.ascontiguousarray(np.moveaxis(pixels(), -1, 0))
    ome = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    return {
        "tiled": written(lambda p: write(p, tile=(32, 32), resolution=(40000, 40000), resolutionunit=3), ".tif"),
        "strips": written(lambda p: write(p, rowsperstrip=8, compression="zlib"), ".tif"),
        "ome": written(lambda p: write(p, ome=True, metadata=ome, tile=(32, 32)), ".ome.tif"),
        "planes": written(
            lambda p: write(p, pixels=planes, ome=True, metadata={**ome, "axes": "CYX"}, planarconfig="separate"),
            ".ome.tif",
        ),
        "grey": written(lambda p: write(p, pixels=pixels()[..., 0], photometric="minisblack"), ".tif"),
        "sixteen": written(lambda p: write(p, pixels=pixels().astype(np.uint16)), ".tif"),
        "qptiff": written(
            lambda p: write(p, tile=(32, 32), description="<PerkinElmer-QPI-ImageDescription/>", metadata=None), ".tif"
        ),
    }


def picture_seeds() -> Seeds:
    from PIL import Image

    seeds = {}
    for mode in ("RGB", "RGBA", "P", "L", "1"):
        out = io.BytesIO()
        Image.fromarray(pixels(48, 32)).convert(mode).save(out, "PNG")
        seeds[f"{mode}.png"] = out.getvalue()
    out = io.BytesIO()
    Image.fromarray(pixels(48, 32)).save(out, "JPEG", progressive=True)
    head = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return seeds | {"x.jpg": out.getvalue(), "bomb.png": head + _png_chunk(b"IDAT", zlib.compress(bytes(1 << 20)))}


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def other_seeds() -> Seeds:
    """First bytes of formats that OpenSlide tells by their text or magic, and small real files where there are some."""
    seeds = {
        "x.vms": b"[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=../../x.jpg\nMapFile=/dev/zero\n",
        "x.mrxs": b"MRXS",
        "x.czi": b"ZISRAWFILE" + bytes(600),
        "x.svslide": b"SQLite format 3\0" + bytes(200),
        "x.bif": svs_seeds()["zlib"].replace(b"Aperio Image Library", b"<EncodeInfo Ver='2'"),
    }
    for name in ("openslide-python_boxes.tiff", "openslide-python_boxes_0.dcm", "openslide-python_small.svs"):
        if (SHARED / name).exists():
            seeds[name] = (SHARED / name).read_bytes()
    return seeds


def real_seeds() -> Seeds:
    names = (
        "CMU-1-Small-Region.svs",
        "test3-DAPI-2-387.ndpi",
        "instanseg_HE_example.ome.tif",
        "pathml_small_dicom.dcm",
    )
    return {name: (SHARED / name).read_bytes() for name in names if (SHARED / name).exists()}


def slide_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.config import TissueConfig
    from wsipipe.geometry import Box
    from wsipipe.slide import open_slide
    from wsipipe.stages.tissue import find_tissue

    name = rng.choice(sorted(seeds))
    ending = name if "." in name else rng.choice((".svs", ".tif", ".ome.tif"))
    path = folder / f"x{ending}"
    path.write_bytes(harmed(seeds[name], rng, tuple(seeds.values())))
    with open_slide(path, rng.choice((None, 0.25, 0.25, 0.5)), skips_unread=rng.random() < 0.2) as slide:
        grid = slide.grid(rng.choice((0.25, 0.25, 0.5, 2.0, 8.0)))
        for _ in range(2):
            x, y = rng.randrange(-20, max(1, grid.width)), rng.randrange(-20, max(1, grid.height))
            box = Box(x, y, x + rng.randrange(1, 80), y + rng.randrange(1, 80))
            pixels = slide.read(box, grid)
            if pixels.shape != (*box.shape, 3) or pixels.dtype != np.uint8:
                raise WrongError(f"{pixels.shape} {pixels.dtype} for {box}")
        if rng.random() < 0.3:
            return find_tissue(slide, TissueConfig()).area_mm2
        return slide.fingerprint


def mask_seeds() -> Seeds:
    from conftest import write_svs

    from wsipipe.config import TissueConfig
    from wsipipe.slide import open_slide
    from wsipipe.stages.tissue import make_tissue

    with tempfile.TemporaryDirectory() as folder:
        slide = write_svs(Path(folder) / "x.svs", pixels(), levels=1)
        with open_slide(slide) as opened:
            make_tissue(opened, Path(folder) / "tissue.png", TissueConfig(), everywhere=True)
        return {"slide": slide.read_bytes(), "mask": (Path(folder) / "tissue.png").read_bytes()}


def mask_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.slide import open_slide
    from wsipipe.stages.tissue import read_tissue

    (folder / "x.svs").write_bytes(seeds["slide"])
    (folder / "tissue.png").write_bytes(harmed(seeds["mask"], rng))
    with open_slide(folder / "x.svs") as slide:
        tissue = read_tissue(folder / "tissue.png", slide)
    if not tissue.mask.all() or tissue.region is not None:
        raise WrongError("the mask differs from what was stored")
    return tissue.area_mm2
