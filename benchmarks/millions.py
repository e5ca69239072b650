"""Millions of nuclei through `nuclei` and `export`: peak memory of each stage, and the GeoJSON read to its last byte.

    python benchmarks/millions.py           a slide of 12,288 px; a minute
    python benchmarks/millions.py --full    100,000 x 100,000 px, 5 million nuclei; 10 minutes of a free core

Made-up maps of benchmarks/nuclei.py on tissue that covers nearly half of the slide in islands. Every chunk of the maps
is the same, so they are links to one file; every block is read and worked on. Each stage runs in a process of its own.
As the maps repeat from block to block, a nucleus that by nature lies straight on one seam does so on all of them, and
the seams are said to show. The last line is JSON.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nuclei import CLASSES, COLOURS, MPP, PERIOD, MadeSlide, make_slide
from scipy import ndimage

from wsipipe.config import NucleiConfig
from wsipipe.folder import ResultFolder
from wsipipe.geometry import Box, Grid
from wsipipe.model.spec import ModelSpec
from wsipipe.provenance import StoreMeta
from wsipipe.slide import Slide
from wsipipe.stages.compare import read_features
from wsipipe.stages.export import make_export
from wsipipe.stages.nuclei import make_nuclei
from wsipipe.store import COMMITS, MapStore
from wsipipe.table import read_nuclei
from wsipipe.tiles import TileGeometry
from wsipipe.tissue import TissueMask

SHARE = 0.45  # of the slide that is tissue: 5 million nuclei on 100,000 x 100,000 px
MASK_PX = 32  # working px a pixel of the tissue mask
ARRAYS = (("np", ""), ("hv", "0/"), ("nc", "0/"))  # of the store, and what comes before the row in its chunks' names


class EndlessSlide(Slide):
    """Pixels of the made-up slide, repeated; plain at any coarser resolution."""

    def __init__(self, side: int, made: MadeSlide) -> None:
        self.path, self.name, self.fingerprint, self.bounds = "made", "made", "made", None
        self.width_px0 = self.height_px0 = side
        self.mpp_x0 = self.mpp_y0 = MPP
        self.mpp_source, self.skips_unread = "given", False
        self._made = made

    def read(self, box: Box, grid: Grid) -> npt.NDArray[np.uint8]:
        if grid.scale_x != 1:
            return np.full((*box.shape, 3), 200, np.uint8)
        return self._made.read(box)[1]


def islands(side: int) -> npt.NDArray[np.bool_]:
    """Blocks with tissue."""
    blocks = -(-side // PERIOD)
    rough = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((blocks, blocks)), 3)
    return rough > np.quantile(rough, 1 - SHARE)


def tissue_of(side: int) -> TissueMask:
    mask = np.kron(islands(side), np.ones((PERIOD // MASK_PX,) * 2, bool))
    mask = mask[: -(-side // MASK_PX), : -(-side // MASK_PX)]
    return TissueMask(mask, Grid(mask.shape[1], mask.shape[0], MASK_PX, MASK_PX, MPP, MPP))


def make_store(path: Path, side: int, made: MadeSlide) -> None:
    """A finished store whose chunks are links to the first of their size; those at the edge are written."""
    spec = ModelSpec(
        name="made",
        architecture="made",
        settings={},
        mpp=MPP,
        tile_px=PERIOD,
        halo_px=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        class_names=CLASSES,
        class_colours=COLOURS,
        source="made",
        licence="Apache-2.0",
    )
    tissue, grid = tissue_of(side), Grid(side, side, 1.0, 1.0, MPP, MPP)
    meta = StoreMeta(
        "made", "made", grid, TileGeometry(PERIOD, 0, 1), spec, "00" * 32, "fp32", tissue.grid, {"region": None}, ""
    )
    wanted = dict.fromkeys(np.flatnonzero(islands(side)).tolist(), 1)
    inner = [index for index in wanted if meta.chunk_box(index).shape == (PERIOD, PERIOD)]
    with MapStore.resume_or_create(path, meta, wanted, tissue.mask) as store:
        for index in {*inner[:1], *(wanted.keys() - {*inner})}:
            store.write_chunk(index, made.read(meta.chunk_box(index))[0])
    link_chunks(path.with_name(path.name + ".partial"), meta.columns, inner)
    with MapStore.resume_or_create(path, meta, wanted, tissue.mask) as store:
        store.finish()


def link_chunks(root: Path, columns: int, indices: list[int]) -> None:
    """Make all chunks links to the first, as the format of the store has it: the files, and a line in its list."""

    def files(index: int) -> list[Path]:
        row, column = divmod(index, columns)
        return [root / array / "c" / f"{lead}{row}" / str(column) for array, lead in ARRAYS]

    content = [file.read_bytes() for file in files(indices[0])]
    with (root / COMMITS).open("a") as commits:
        for index in indices[1:]:
            for file, first in zip(files(index), files(indices[0]), strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                os.link(first, file)
            commits.write(f"{index} {reduce(lambda crc, part: zlib.crc32(part, crc), content, index):08x}\n")


def check(folder: ResultFolder) -> dict[str, Any]:
    """Every feature of the GeoJSON is there, in the order of the table, closed and finite, and nothing follows."""
    meta, batches = read_nuclei(folder.nuclei, ["id"])
    ids = (text for batch in batches for text in batch["id"].to_pylist())
    count = 0
    with gzip.open(folder.geojson, "rt", encoding="utf-8") as file:
        for feature, expected in zip(read_features(file, {}), ids, strict=True):
            (ring,) = feature["geometry"]["coordinates"]
            values = feature["properties"]["measurements"].values()
            if feature["id"] != expected or ring[0] != ring[-1] or not np.isfinite([*values]).all():
                raise SystemExit(f"nucleus {count} of the GeoJSON is not that of the table: {feature}")
            count += 1
    if count != meta.count:
        raise SystemExit(f"the GeoJSON holds {count} nuclei, the table {meta.count}")
    return {"nuclei": count, "geojson_mb": round(folder.geojson.stat().st_size / 2**20)}


def run_stage(stage: str, folder: ResultFolder, side: int, workers: int) -> dict[str, Any]:
    """One stage, and what it took."""
    begun, told = time.monotonic(), {}
    made = make_slide()
    slide = EndlessSlide(side, made)
    if stage == "maps":
        make_store(folder.maps, side, made)
    elif stage == "nuclei":
        summary = make_nuclei(slide, folder.maps, folder.nuclei, NucleiConfig(), workers=workers)
        told = {"nuclei": summary.meta.count, "qc": summary.meta.qc, "seams": summary.seams and summary.seams.to_json()}
    elif stage == "export":
        make_export(slide, tissue_of(side), folder.nuclei, folder.geojson, folder.overlay)
    else:
        told = check(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**told, "seconds": round(time.monotonic() - begun, 1), "peak_mb": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=12_288, help="of the slide, px")
    parser.add_argument("--full", action="store_true", help="100,000 px")
    parser.add_argument("--workers", type=int, default=2, help="threads of the nuclei stage")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the files go and stay; by default they are removed")
    arguments = parser.parse_args()
    side = 100_000 if arguments.full else arguments.side
    if arguments.stage:
        told = run_stage(arguments.stage, ResultFolder(arguments.folder), side, arguments.workers)
        print(json.dumps(told))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        results = {}
        for stage in ("maps", "nuclei", "export", "check"):
            command = [sys.executable, __file__, "--side", str(side), "--stage", stage, "--folder", str(folder)]
            command += ["--workers", str(arguments.workers)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[stage] = json.loads(output.splitlines()[-1])
            print(f"{stage:8}{results[stage]}", flush=True)
        summary = {
            "side_px": side,
            "nuclei": results["check"]["nuclei"],
            "nuclei_s": results["nuclei"]["seconds"],
            "nuclei_peak_mb": results["nuclei"]["peak_mb"],
            "export_s": results["export"]["seconds"],
            "export_peak_mb": results["export"]["peak_mb"],
            "geojson_mb": results["check"]["geojson_mb"],
        }
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
