"""Feed every reader of foreign files with damaged and hostile ones, and look that each refuses them or answers rightly.

Usage: python tests/fuzz.py [--inputs 100000] [--target svs ...] [--findings DIR]      all of it: make fuzz
       python tests/fuzz.py --target svs --only 1234                                  one input again, in this process

Input n of a target is a function of its name and n alone. Inputs are read in child processes. What counts as a finding:
an exception that is no `WsipipeError`; an answer that is wrong; a child that dies, needs more than CPU_S or MEMORY;
code that a file made run, a process or a connection begun, or a file touched outside the scratch folder (by audit
hook). Findings are kept as files. The last line is JSON.
"""

import argparse
import contextlib
import gzip
import io
import json
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsipipe.errors import WsipipeError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "slides"
CPU_S = 20.0  # a reader may take for one small file
HANG_S = 120.0  # of the clock; other work may hold this machine
MEMORY = 2 << 30  # beside what the libraries take when they are imported
Seeds = dict[str, bytes]


class WrongError(Exception):
    """A reader that took a damaged file and answered otherwise than for the whole one."""


# How files are harmed -------------------------------------------------------------------------------------------------

NUMBERS = (
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 64) - 1,
)
TEXTS = (
    b"nan", b"inf", b"-1", b"0", b"1e308", b"99999999999999999999", b"null", b"true", b"[]", b"{}", b'""', b"..", b"/",
    b"\0", b"\n", b"\xff\xfe", b"\xed\xa0\x80", b"*a", b"&a", b"[" * 300,
    b"!!python/object/apply:os.system [touch hacked]",
)  # fmt: skip


def harmed(data: bytes, rng: random.Random, others: tuple[bytes, ...] = ()) -> bytes:
    """A file with one to four faults, most of them where formats keep their structure: at both ends."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        n = len(out)
        if not n:
            break
        span = rng.choice((n, n, min(n, 64), min(n, 1024), min(n, 8192)))
        at = rng.randrange(span) if rng.random() < 0.6 else n - 1 - rng.randrange(span)
        what = rng.randrange(10)
        if what == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at] = rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif what in (2, 3):
            size = rng.choice((1, 2, 4, 8))
            number = (rng.choice(NUMBERS) + rng.randrange(-2, 3)) % (1 << 8 * size)
            out[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
        elif what == 4:
            del out[at : at + rng.choice((1, 2, 8, 64, n))]
        elif what == 5:
            out[at:at] = out[at : at + rng.choice((1, 4, 12, 64))]
        elif what == 6:
            out[at:at] = rng.choice(TEXTS)
        elif what == 7:
            text = rng.choice(TEXTS)
            out[at : at + len(text)] = text
        elif what == 8 and others:
            other = rng.choice(others)
            start = rng.randrange(max(1, len(other)))
            piece = other[start : start + rng.choice((4, 16, 256, 4096))]
            out[at : at + len(piece)] = piece
        else:
            digits = [i for i in range(max(0, at - 40), min(n, at + 40)) if 48 <= out[i] < 58]
            for i in digits[: rng.randrange(4)]:
                out[i] = rng.choice(b"0123456789.-eE")
    return bytes(out)


def any_json(rng: random.Random, depth: int = 0) -> Any:
    """A value that JSON or YAML can hold, odd ones preferred."""
    kind = rng.randrange(12 if depth < 4 else 8)
    if kind < 2:
        return rng.choice((0, 1, -1, 2**31, 2**63, 10**30, rng.randrange(1000)))
    if kind < 4:
        return rng.choice((0.5, -0.0, 1e308, float("nan"), float("inf"), rng.uniform(-1e4, 1e4)))
    if kind < 6:
        return rng.choice(("", "a", "0.25", "\0", "ä\u202e", "x" * 5000, "../../etc", "Polygon", "tile", "nan"))
    if kind < 8:
        return rng.choice((None, True, False))
    if kind < 10:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(5))]
    names = ("type", "geometry", "coordinates", "features", "tissue", "maps", "mpp", "halo_px", "name", "")
    return {rng.choice(names): any_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part of it replaced, doubled or left out."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return any_json(rng)
    if isinstance(value, list):
        at, out = rng.randrange(len(value)), list(value)
        what = rng.randrange(4)
        out[at : at + 1] = [] if what == 0 else [out[at]] * 3 if what == 1 else [changed(out[at], rng)]
        return out
    key = rng.choice(list(value))
    if rng.random() < 0.15:
        return {name: part for name, part in value.items() if name != key}
    return {**value, key: changed(value[key], rng)}


def text_or_bytes(value: Any, rng: random.Random) -> bytes:
    """Usually JSON of a changed value, else of the whole one with harmed bytes."""
    text = json.dumps(changed(value, rng) if rng.random() < 0.8 else value).encode()
    return harmed(text, rng) if rng.random() < 0.3 else text


class Payload:
    """What pickle would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


# The readers, each with the files that it takes -----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A reader. `seeds` makes whole files, once; `case` writes an input to the empty folder and reads it."""

    share: float  # of all inputs
    seeds: Callable[[], Seeds]
    case: Callable[[Seeds, random.Random, Path], object]


def _pixels(width: int = 96, height: int = 64) -> Any:
    y, x = np.mgrid[:height, :width]
    return np.stack([(3 * x + y) % 256, 200 - (x * y) % 120, (x + 5 * y) % 256], -1).astype(np.uint8)


def _written(write: Callable[[Path], object], ending: str) -> bytes:
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
        seeds[name] = _written(lambda path, o=options: write_svs(path, _pixels(), levels=2, tile=(32, 32), **o), ".svs")
    return seeds


def tiff_seeds() -> Seeds:
    import tifffile

    def write(path: Path, **options: Any) -> None:
        pixels = options.pop("pixels", _pixels())
        tifffile.imwrite(path, pixels, **{"photometric": "rgb", **options})

    planes = np.ascontiguousarray(np.moveaxis(_pixels(), -1, 0))
    ome = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    return {
        "tiled": _written(lambda p: write(p, tile=(32, 32), resolution=(40000, 40000), resolutionunit=3), ".tif"),
        "strips": _written(lambda p: write(p, rowsperstrip=8, compression="zlib"), ".tif"),
        "ome": _written(lambda p: write(p, ome=True, metadata=ome, tile=(32, 32)), ".ome.tif"),
        "planes": _written(
            lambda p: write(p, pixels=planes, ome=True, metadata={**ome, "axes": "CYX"}, planarconfig="separate"),
            ".ome.tif",
        ),
        "grey": _written(lambda p: write(p, pixels=_pixels()[..., 0], photometric="minisblack"), ".tif"),
        "sixteen": _written(lambda p: write(p, pixels=_pixels().astype(np.uint16)), ".tif"),
        "qptiff": _written(
            lambda p: write(p, tile=(32, 32), description="<PerkinElmer-QPI-ImageDescription/>", metadata=None), ".tif"
        ),
    }


def picture_seeds() -> Seeds:
    from PIL import Image

    seeds = {}
    for mode in ("RGB", "RGBA", "P", "L", "1"):
        out = io.BytesIO()
        Image.fromarray(_pixels(48, 32)).convert(mode).save(out, "PNG")
        seeds[f"{mode}.png"] = out.getvalue()
    out = io.BytesIO()
    Image.fromarray(_pixels(48, 32)).save(out, "JPEG", progressive=True)
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


ROI = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [400, 0], [400, 300], [9, 300], [0, 0]]]},
            "properties": {"classification": {"name": "Tumor"}},
        },
        {
            "type": "Feature",
            "geometry": {
                "type": "MultiPolygon",
                "coordinates": [[[[500, 500], [600, 500], [500, 600], [600, 600]]], [[[1, 1], [2, 1], [2, 2], [1, 2]]]],
            },
            "properties": {},
        },
    ],
}


def roi_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.geometry import Grid
    from wsipipe.roi import read_roi
    from wsipipe.tissue import TissueMask

    path = folder / "roi.geojson"
    kind = rng.random()
    if kind < 0.85:
        content = text_or_bytes(ROI, rng)
    elif kind < 0.9:  # many crossings
        corners = [[rng.uniform(-1e4, 1e5), rng.uniform(-1e4, 1e5)] for _ in range(rng.randrange(3, 60))]
        content = json.dumps({"type": "Polygon", "coordinates": [corners]}).encode()
    elif kind < 0.95:
        content = rng.choice((b"[" * 5000, b'{"type":"Feature","geometry":' * 3000, b'{"a":' * 990 + b"1" + b"}" * 990))
    else:
        content = b'{"type": "Polygon", "coordinates": [[' + b"[1, 2], " * rng.randrange(2000)
    if rng.random() < 0.2:
        content = gzip.compress(content)
        content = harmed(content, rng) if rng.random() < 0.5 else content
    path.write_bytes(content)
    grid = Grid.over(4000, 3000, 0.25, 0.25, 8.0)
    region = read_roi(path, (rng.choice((0, 1e6)), 0))
    return TissueMask(np.ones(grid.box.shape, bool), grid).restricted(region).area_mm2


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
YAMLS = (
    "tissue: {mpp: 8.0, min_area_um2: 20000}\nmaps:\n  tile_px: 256\nnuclei:\n  hv_scale: [-1.5, 0.9]\n",
    "model: cellvta-nano\ndata: {sets/a: 1.0, sets/b: 2}\nsteps: 10\nbetas: [0.9, 0.98]\ncrop_px: 256\n",
    LAUGHS,
    "tissue: &x {mpp: *x}\n",
    "tissue: !!python/object/apply:os.system ['touch hacked']\n",
    "t: 2001-99-99\n",
    "<<: [1]\n",
    "? [a, b]\n: 1\n",
    "nuclei: {hv_scale: tile, simplify_px: .nan}\n",
    "{" * 250,
    "- " * 3000,
    "tissue:\n\tmpp: 1\n",
    "%YAML 9\n---\n",
)


def config_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.config import load_config
    from wsipipe.training.config import load_experiment

    path = folder / "x.yaml"
    text = rng.choice(YAMLS).encode()
    if rng.random() < 0.3:
        import yaml

        with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
            value = changed(yaml.safe_load(rng.choice(YAMLS[:2])), rng)
            text = json.dumps(value).encode()
    path.write_bytes(harmed(text, rng, tuple(y.encode() for y in YAMLS)) if rng.random() < 0.8 else text)
    if rng.random() < 0.3:
        return load_experiment(path)
    return load_config(path, rng.choice((None, {"tissue": {"mpp": 4.0}})))


TINY_SETTINGS = {
    "dim": 16, "depth": 4, "heads": 2, "stages": [[0, 0], [1, 1], [2, 2], [3, 3]], "prior_width": 4,
    "attention_heads": 2, "extra_extractors": 0, "decoder_widths": [2, 2, 2, 2], "layer_scale": None,
}  # fmt: skip


def checkpoint_seeds() -> Seeds:
    from dataclasses import replace

    import torch

    from wsipipe.model.registry import SPECS, build
    from wsipipe.model.weights import save_checkpoint

    spec = replace(SPECS["cellvta-nano"], name="tiny", settings=TINY_SETTINGS)
    torch.manual_seed(0)
    whole = _written(lambda path: save_checkpoint(path, build(spec), spec), ".safetensors")
    saved = _written(lambda path: torch.save({"a": torch.zeros(3), "b": [1, 2]}, path), ".pth")
    old = _written(lambda path: torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False), ".pth")
    evil = _written(lambda path: torch.save({"model": Payload()}, path), ".pth")
    return {"whole": whole, "saved": saved, "old": old, "evil": evil, "pickle": pickle.dumps(Payload())}


def _archive_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    return out.getvalue()


def checkpoint_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.model.weights import inspect, load_model, read_spec

    path = folder / rng.choice(("x.safetensors", "x.pth", "x.tar"))
    kind = rng.random()
    whole = seeds["whole"]
    size = int.from_bytes(whole[:8], "little")
    if kind < 0.55:  # a header that lies
        header = json.loads(whole[8 : 8 + size])
        if rng.random() < 0.7:
            spec = json.loads(header["__metadata__"]["wsipipe_spec"])
            spec = changed(spec, rng)
            if isinstance(spec, dict) and rng.random() < 0.4:
                spec["settings"] = changed(TINY_SETTINGS, rng)
            header["__metadata__"]["wsipipe_spec"] = json.dumps(spec)
        else:
            header = changed(header, rng)
        text = json.dumps(header).encode()
        length = rng.choice((len(text), len(text), len(text), *NUMBERS))
        content = length.to_bytes(8, "little") + text + whole[8 + size :]
    elif kind < 0.65:
        content = harmed(whole[: 8 + size], rng) + whole[8 + size :]
    elif kind < 0.67:
        content = _archive_bomb()
    else:
        name = rng.choice(sorted(seeds.keys() - {"whole"}))
        content = harmed(seeds[name], rng, (seeds["evil"],)) if rng.random() < 0.8 else seeds[name]
    path.write_bytes(content)
    if rng.random() < 0.1:
        return inspect(path)
    return read_spec(path).name if rng.random() < 0.3 else load_model(path)[2]


def patch_seeds() -> Seeds:
    from made_patches import write_set

    with tempfile.TemporaryDirectory() as folder:
        made = write_set(Path(folder) / "set", count=2, side=24)
        seeds = {file.name: file.read_bytes() for file in made.iterdir()}
    evil = io.BytesIO()
    np.save(evil, np.array([Payload()], object), allow_pickle=True)
    return seeds | {"evil": evil.getvalue()}


def patch_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.training.data import PatchSet

    names = sorted(seeds.keys() - {"evil"})
    harm = rng.choice(names)
    for name in names:
        content = seeds[name]
        if name == harm:
            if name.endswith(".npy") and rng.random() < 0.1:
                content = seeds["evil"]
            elif name == "dataset.json":
                content = text_or_bytes(json.loads(content), rng)
            else:
                content = harmed(content, rng, tuple(seeds.values()))
        (folder / name).write_bytes(content)
    patches = PatchSet.open(folder)
    return len(patches), patches.images.sum(), patches.instances.sum()


def store_seeds() -> Seeds:
    from test_store import META, complete

    with tempfile.TemporaryDirectory() as folder:
        root = complete(Path(folder) / "maps.zarr").path
        other = complete(Path(folder) / "other.zarr").path
        seeds = {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        assert seeds == {str(f.relative_to(other)): f.read_bytes() for f in other.rglob("*") if f.is_file()}
        assert META.chunk_box(0)
    return seeds


def _maps_digest(store: Any) -> int:
    maps = store.read(store.meta.grid.box)
    parts = (maps.nuclei, maps.offsets, maps.types, store.tissue)
    return zlib.crc32(b"".join(part.tobytes() for part in parts) + repr(store.meta).encode())


def store_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.store import MapStore

    files = dict(seeds)
    for _ in range(rng.choice((1, 1, 2))):
        name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
        what = rng.randrange(8)
        if what == 0 and len(files) > 1:
            del files[name]
        elif what == 1:
            files[name], files[other] = files[other], files[name]
        elif what == 2 and name.endswith(".json"):
            with contextlib.suppress(ValueError):
                files[name] = text_or_bytes(json.loads(files[name]), rng)
        else:
            files[name] = harmed(files[name], rng, (files[other],))
    root = folder / "maps.zarr"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    digest = _maps_digest(MapStore.open(root))
    if not hasattr(store_case, "expected"):
        whole = folder / "whole.zarr"
        for name, content in seeds.items():
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).write_bytes(content)
        store_case.expected = _maps_digest(MapStore.open(whole))  # type: ignore[attr-defined]
    if digest != store_case.expected:  # type: ignore[attr-defined]
        raise WrongError("maps differ from what was stored")
    return digest


def table_seeds() -> Seeds:
    from made_nuclei import made_meta, made_nuclei

    from wsipipe.table import NucleiSpool

    with tempfile.TemporaryDirectory() as folder:
        spool = NucleiSpool(Path(folder) / "n.parquet", made_meta(), {"side": 2048})
        rng = np.random.default_rng(0)
        for block in range(3):
            spool.add(block, made_nuclei(rng.uniform(0, 3000, (20, 2)), block))
        seeds = {f"spool/{file.name}": file.read_bytes() for file in spool.folder.iterdir()}
        spool.finish(range(3))
        return seeds | {"table": (Path(folder) / "n.parquet").read_bytes()}


def _table_digest(path: Path) -> int:
    from wsipipe.table import read_nuclei

    meta, batches = read_nuclei(path)
    rows = [row for batch in batches for row in batch.to_pylist()]
    return zlib.crc32(repr((meta, rows)).encode())


def table_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from made_nuclei import made_meta

    from wsipipe.geojson import write_geojson
    from wsipipe.table import NucleiSpool

    path = folder / "n.parquet"
    if rng.random() < 0.7:
        path.write_bytes(harmed(seeds["table"], rng))
        if rng.random() < 0.2:
            return write_geojson(path, folder / "n.geojson.gz")
    else:
        names = [name for name in seeds if name.startswith("spool/")]
        harm = rng.choice(names)
        (folder / "n.parquet.partial").mkdir()
        for name in names:
            content = harmed(seeds[name], rng, (seeds[names[0]],)) if name == harm else seeds[name]
            (folder / "n.parquet.partial" / Path(name).name).write_bytes(content)
        NucleiSpool(path, made_meta(), {"side": 2048}).finish(range(3))
    digest = _table_digest(path)
    if not hasattr(table_case, "expected"):
        (folder / "whole.parquet").write_bytes(seeds["table"])
        table_case.expected = _table_digest(folder / "whole.parquet")  # type: ignore[attr-defined]
    if digest != table_case.expected:  # type: ignore[attr-defined]
        raise WrongError("nuclei differ from what was stored")
    return digest


def mask_seeds() -> Seeds:
    from conftest import write_svs

    from wsipipe.config import TissueConfig
    from wsipipe.slide import open_slide
    from wsipipe.stages.tissue import make_tissue

    with tempfile.TemporaryDirectory() as folder:
        slide = write_svs(Path(folder) / "x.svs", _pixels(), levels=1)
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


def _no_seeds() -> Seeds:
    return {}


TARGETS = {
    "svs": Target(0.16, svs_seeds, slide_case),
    "tiff": Target(0.10, tiff_seeds, slide_case),
    "picture": Target(0.12, picture_seeds, slide_case),
    "other": Target(0.05, other_seeds, slide_case),
    "real": Target(0.02, real_seeds, slide_case),
    "roi": Target(0.15, _no_seeds, roi_case),
    "config": Target(0.14, _no_seeds, config_case),
    "checkpoint": Target(0.06, checkpoint_seeds, checkpoint_case),
    "patches": Target(0.08, patch_seeds, patch_case),
    "store": Target(0.04, store_seeds, store_case),
    "table": Target(0.05, table_seeds, table_case),
    "mask": Target(0.03, mask_seeds, mask_case),
}


# The children that read -----------------------------------------------------------------------------------------------


class Watch:
    """An audit hook that remembers what no reader of a file may do. Once set it stays, so only a child sets it."""

    WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
    NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect",
             "socket.bind", "socket.getaddrinfo")  # fmt: skip

    def __init__(self, scratch: Path) -> None:
        self._scratch, self.seen = os.path.realpath(scratch), list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.NEVER:
            self.seen.append(f"{event} {arguments[:2]!r:.200}")
        elif event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, str | bytes):
                self._require_inside(event, path)
        elif event in self.WRITES and isinstance(arguments[0], str | bytes):
            self._require_inside(event, arguments[0])

    def _require_inside(self, event: str, path: str | bytes) -> None:
        place = os.path.realpath(os.fsdecode(path))
        if not place.startswith((self._scratch, "/dev/")):
            self.seen.append(f"{event} {place}")


def read_one(name: str, seeds: Seeds, number: int, folder: Path, watch: Watch | None) -> tuple[str, str]:
    """("refused" | "answered" | "finding", what)."""
    target, rng = TARGETS[name], random.Random(f"{name}/{number}")
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    started = time.process_time()
    try:
        target.case(seeds, rng, folder)
        outcome = ("answered", "")
    except WsipipeError as error:
        outcome = ("refused", "")
        if len(str(error).splitlines()) != 1:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            outcome = ("finding", f"a message of several lines: {Path(frame.filename).name}:{frame.lineno}")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/wsipipe/" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        outcome = ("finding", f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:200]}")
    if (spent := time.process_time() - started) > CPU_S:
        outcome = ("finding", f"took {spent:.0f} s")
    if watch is not None and watch.seen:
        outcome = ("finding", "forbidden: " + "; ".join(sorted(set(watch.seen))))
        watch.seen.clear()
    if Path("hacked").exists() or (folder / "hacked").exists():
        outcome = ("finding", "a file made code run")
    return outcome


def child(name: str, seeds: Seeds, numbers: range, step: int, folder: Path, shared: mmap.mmap, pipe: int) -> None:
    """Read inputs one after another, saying in `shared` which one is being read and how many came out how."""
    import faulthandler

    faulthandler.disable()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # libtiff and libpng talk
    os.chdir(folder.parent)
    import warnings

    warnings.simplefilter("ignore")
    import wsipipe.slide

    wsipipe.slide.RETRIES_S = (0.0,)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if name == "checkpoint":
        from wsipipe.model.weights import load_model

        (folder / "whole.safetensors").write_bytes(seeds["whole"])
        load_model(folder / "whole.safetensors")
    for number in range(20):  # what is imported, compiled or loaded on first use is no fault of a file
        read_one(name, seeds, -1 - number, folder, None)
    watch = Watch(folder.parent)
    for number in numbers[step:]:
        struct.pack_into("<q", shared, 0, number)
        kind, what = read_one(name, seeds, number, folder, watch)
        slot = {"refused": 8, "answered": 16, "finding": 24}[kind]
        struct.pack_into("<q", shared, slot, struct.unpack_from("<q", shared, slot)[0] + 1)
        if kind == "finding":
            os.write(pipe, (json.dumps([number, what]) + "\n").encode())
    os._exit(0)


def in_child(function: Callable[[], Any], path: Path) -> Any:
    """What a function gives that is run in a process of its own: it may start threads, which no fork survives."""
    pid = os.fork()
    if pid == 0:
        try:
            path.write_bytes(pickle.dumps(function()))
            os._exit(0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("seeds could not be made")
    return pickle.loads(path.read_bytes())


def run_target(name: str, numbers: range, findings: Path) -> tuple[Counter[str], dict[str, list[int]]]:
    """Read inputs of a target in children; a child that dies or hangs costs that one input."""
    counts: Counter[str] = Counter()
    found: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch) / "input"
        folder.mkdir()
        seeds = in_child(TARGETS[name].seeds, Path(scratch) / "seeds.pickle")
        if not seeds and TARGETS[name].seeds is not _no_seeds:
            return counts, found
        step = 0
        while step < len(numbers):
            shared = mmap.mmap(-1, 64)
            struct.pack_into("<q", shared, 0, numbers[step])
            receive, send = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(receive)
                try:
                    child(name, seeds, numbers, step, folder, shared, send)
                finally:
                    os._exit(99)
            os.close(send)
            ended, last, since = 0, -1, time.monotonic()
            said = b""
            os.set_blocking(receive, False)
            while True:
                with contextlib.suppress(BlockingIOError):
                    said += os.read(receive, 1 << 16)
                done, ended = os.waitpid(pid, os.WNOHANG)
                if done:
                    break
                now = struct.unpack_from("<q", shared, 0)[0]
                if now != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > HANG_S:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
            with contextlib.suppress(BlockingIOError):
                while more := os.read(receive, 1 << 16):
                    said += more
            os.close(receive)
            for line in said.decode().splitlines():
                number, what = json.loads(line)
                found.setdefault(re.sub(r"0x[0-9a-f]+|\d+", "N", what), []).append(number)
            current, refused, answered, wrong = struct.unpack_from("<4q", shared, 0)
            counts += Counter(refused=refused, answered=answered, findings=wrong)
            if ended:
                how = signal.Signals(ended & 127).name if ended & 127 else f"code {ended >> 8}"
                found.setdefault(f"the reading process ended by {how}", []).append(current)
                counts["findings"] += 1
                step = numbers.index(current) + 1
            else:
                step = len(numbers)
    for what, where in found.items():
        findings.mkdir(parents=True, exist_ok=True)
        with (findings / "findings.txt").open("a") as file:
            file.write(f"{name} {len(where)}x, e.g. --only {where[0]}: {what}\n")
    return counts, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets, by their shares")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    parser.add_argument("--only", type=int, help="this input of one target, in this process, with its traceback")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    # Imported before the fork: a child starts in no time.
    import conftest  # noqa: F401
    import made_nuclei  # noqa: F401
    import made_patches  # noqa: F401
    import test_store  # noqa: F401

    import wsipipe.stages.segment
    import wsipipe.training.loop  # noqa: F401

    if arguments.only is not None:
        (name,) = arguments.target
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        TARGETS[name].case(TARGETS[name].seeds(), random.Random(f"{name}/{arguments.only}"), folder)
        return
    total, whole = Counter[str](), sum(TARGETS[name].share for name in arguments.target)
    unique = 0
    for name in arguments.target:
        count = -(-int(arguments.inputs * TARGETS[name].share) // 1) if whole > 0.99 else arguments.inputs
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        counts, found = run_target(name, range(arguments.first, arguments.first + count), arguments.findings)
        inputs, after = sum(counts.values()), resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{name:11}{inputs:>7} inputs: {counts['refused']:>7} refused, {counts['answered']:>6} answered, "
              f"{counts['findings']:>4} findings, {spent:.0f} s of CPU", flush=True)  # fmt: skip
        for what, where in found.items():
            print(f"    {len(where)}x, e.g. --only {where[0]}: {what}", flush=True)
        total += counts
        unique += len(found)
    summary = {"inputs": sum(total.values()), **{k: total[k] for k in ("refused", "answered", "findings")}}
    print(json.dumps(summary | {"unique_findings": unique}))
    sys.exit(1 if unique else 0)


if __name__ == "__main__":
    main()
