"""Speed, memory and exactness from maps to nuclei.parquet and GeoJSON, one core; the published way beside it.

    python benchmarks/nuclei.py                            a minute
    python benchmarks/nuclei.py --sizes 2048 4096 8192 16384

Touching ellipses, about 4,700 on 2048 x 2048 px, with the HV map that they define, blurred and noisy. The last line
is JSON: processor time of everything but reading the maps, outlines, types, features and both files included.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import ndimage

from wsipipe.config import NucleiConfig
from wsipipe.features import nuclei_of_block
from wsipipe.geojson import write_geojson
from wsipipe.geometry import Box, Grid, partition
from wsipipe.instances import label_tile
from wsipipe.maps import Maps
from wsipipe.table import NucleiMeta, NucleiSpool
from wsipipe.training.targets import hv_map

PERIOD = 2048  # the maps repeat: a slide of any size costs the memory of this one
SPACING = 29.9  # px between nuclei: 4,700 a period
MARGIN = 64  # px drawn round a period, so that its nuclei go on over the border
CLASSES = ("background", "neoplastic", "inflammatory", "connective", "dead", "epithelial")
COLOURS = tuple((40 * k, 200 - 30 * k, 90) for k in range(len(CLASSES)))
TILE = 1024  # of the published way, px
MPP = 0.25
CONFIG = NucleiConfig()


@dataclass(frozen=True)
class MadeSlide:
    """Maps and pixels without end, read like those of a slide."""

    maps: Maps
    rgb: npt.NDArray[np.uint8]

    def read(self, box: Box) -> tuple[Maps, npt.NDArray[np.uint8]]:
        part = np.ix_(np.arange(box.y0, box.y1) % PERIOD, np.arange(box.x0, box.x1) % PERIOD)
        maps = self.maps
        offsets, types = (np.stack([layer[part] for layer in layers]) for layers in (maps.offsets, maps.types))
        return Maps(maps.nuclei[part], offsets, types), self.rgb[part]


def make_slide(noise: float = 0.1, seed: int = 0) -> MadeSlide:
    rng = np.random.default_rng(seed)
    labels = draw_nuclei(rng)
    inside = np.s_[MARGIN:-MARGIN, MARGIN:-MARGIN]

    def blurred(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        rough = ndimage.gaussian_filter(rng.standard_normal((PERIOD, PERIOD), np.float32), 2, mode="wrap")
        smooth = ndimage.gaussian_filter(values.astype(np.float32), 1)[inside]
        said: npt.NDArray[np.float32] = smooth + np.float32(7 * noise) * rough
        return said

    nuclei = np.round(255 * np.clip(blurred(labels > 0), 0, 1)).astype(np.uint8)
    offsets = [np.round(127 * np.clip(blurred(offset), -1, 1)).astype(np.int8) for offset in hv_map(labels)]
    kind = np.where(labels > 0, 1 + labels % (len(CLASSES) - 1), 0)
    types = [np.round(200 * np.clip(blurred(kind == k), 0, 1)).astype(np.uint8) for k in range(len(CLASSES))]
    rgb = rng.integers(60, 250, (PERIOD, PERIOD, 3), np.uint8)
    return MadeSlide(Maps(nuclei, np.stack(offsets), np.stack(types)), rgb)


def draw_nuclei(rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """One period of nuclei and the margin round it; a pixel of several belongs to the one it lies deepest in."""
    side = PERIOD + 2 * MARGIN
    labels, depth = np.zeros((side, side), np.int32), np.ones((side, side))
    n = round(PERIOD / SPACING)
    rows, columns = np.mgrid[:37, :37]
    for x, y in (np.argwhere(np.ones((n, n))) + rng.uniform(0.2, 0.8, (n * n, 2))) * PERIOD / n:
        a, b, angle = rng.uniform(10, 16), rng.uniform(8, 12), rng.uniform(0, np.pi)
        copies = [(x + i * PERIOD + MARGIN, y + j * PERIOD + MARGIN) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        for u, v in copies:
            left, top = int(u) - 18, int(v) - 18
            if not (0 <= left <= side - 37 and 0 <= top <= side - 37):
                continue
            part = np.s_[top : top + 37, left : left + 37]
            dx, dy = columns + left - u, rows + top - v
            along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
            radius = (along / a) ** 2 + (across / b) ** 2
            mine = radius < depth[part]
            labels[part][mine], depth[part][mine] = labels.max() + 1, radius[mine]
    return labels


@dataclass(frozen=True)
class Result:
    """What the stages took, reading not counted, and what came of it."""

    seconds: dict[str, float]  # by part
    nuclei: int
    rows: pa.Table  # of nuclei.parquet
    table: bytes

    @property
    def us(self) -> float:
        """µs a nucleus, of all parts."""
        return 1e6 * sum(self.seconds.values()) / self.nuclei


def run(slide: MadeSlide, side: int, block: int) -> Result:
    """From maps to nuclei.parquet and nuclei.geojson.gz, as the stages do it."""
    grid = Grid(side, side, 1.0, 1.0, MPP, MPP)
    meta = NucleiMeta("made", "made", side, side, None, grid, CLASSES, COLOURS, {}, CONFIG.model_dump(mode="json"), {})
    seconds = dict.fromkeys(("blocks", "table", "GeoJSON"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "nuclei.parquet"
        spool, cores = NucleiSpool(table, meta, {}), list(partition(grid.box, block))
        for number, core in enumerate(cores):
            read = core.grown(CONFIG.halo_px).clipped(grid.box)
            maps, rgb = slide.read(read)
            with clock(seconds, "blocks"):
                nuclei, _ = nuclei_of_block(maps, read, core, grid, CLASSES, "made", rgb, CONFIG)
                spool.add(number, nuclei)
        with clock(seconds, "table"):
            count = spool.finish(range(len(cores))).count
        with clock(seconds, "GeoJSON"):
            write_geojson(table, Path(folder) / "nuclei.geojson.gz")
        return Result(seconds, count, pq.read_table(table), table.read_bytes())


@contextmanager
def clock(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Processor time of all threads: what one core would take."""
    begun = time.process_time()
    yield
    seconds[part] += time.process_time() - begun


def seams(whole: Result, parts: Result) -> dict[str, int]:
    """Nuclei that blocks lose, add or change against one block; one that is there twice is added."""
    if whole.table == parts.table:
        return {"seam_missed": 0, "seam_extra": 0, "seam_changed": 0}
    one = {row["id"]: row for row in whole.rows.to_pylist()}
    many = parts.rows.to_pylist()
    found = {row["id"]: row for row in many}
    both = one.keys() & found.keys()
    changed = sum(one[i] != found[i] for i in both)
    return {"seam_missed": len(one) - len(both), "seam_extra": len(many) - len(both), "seam_changed": changed}


def run_published(slide: MadeSlide, side: int) -> tuple[float, int]:
    """Seconds and nuclei of the published way: tile by tile, each nucleus by a look at the whole tile."""
    seconds, count = 0.0, 0
    for core in partition(Box(0, 0, side, side), TILE):
        maps, _ = slide.read(core)
        offsets, kinds = np.float32(1 / 127) * maps.offsets, maps.types.argmax(0)
        begun = time.process_time()
        labels = label_tile(maps.nuclei > 127, offsets, MPP)
        for label in np.unique(labels)[1:]:
            mask = labels == label
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
            outline = cv2.findContours(crop, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0][0]
            cv2.moments(crop)
            np.unique(kinds[mask], return_counts=True)
            count += len(outline) > 2
        seconds += time.process_time() - begun
    return seconds, count


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096], help="sides of the slides, px")
    parser.add_argument("--block", type=int, default=2048, help="side of a block, px")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many counts")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    slide = make_slide()
    run(slide, 256, 256)  # compiles
    before = peak_mb()

    by_size: dict[int, float] = {}
    for side in arguments.sizes:
        best = min((run(slide, side, arguments.block) for _ in range(arguments.repeats)), key=lambda result: result.us)
        by_size[side] = best.us
        parts = ", ".join(f"{part} {1e6 * seconds / best.nuclei:.1f}" for part, seconds in best.seconds.items())
        print(f"{side:6d} px  {best.nuclei:8d} nuclei  {best.us:6.1f} us a nucleus: {parts}", flush=True)
    peak = peak_mb()
    print(f"peak {peak:.0f} MB, of which {before:.0f} MB libraries and the made slide")

    side = 2 * PERIOD
    whole = run(slide, side, side)
    print(f"{side} px in one block: {whole.us:.1f} us a nucleus")
    blocks = (509, 1024, arguments.block)
    differences = [seams(whole, run(slide, side, block)) for block in blocks]
    seam = {key: sum(found[key] for found in differences) for key in differences[0]}
    print(f"blocks of {blocks} px against one of {side} px, {whole.nuclei} nuclei each: {seam}", flush=True)

    published_seconds, count = run_published(slide, PERIOD)  # the maps repeat: more would be the same
    published = 1e6 * published_seconds / count
    print(f"published way, tiles of {TILE} px: {count} nuclei, {published:.0f} us a nucleus")
    summary = {
        "us_per_nucleus": {str(side): round(us, 1) for side, us in by_size.items()},
        "us_per_nucleus_4096": round(by_size.get(side, whole.us), 1),
        "flatness": round(max(by_size.values()) / min(by_size.values()), 3),
        **seam,
        "peak_mb": round(peak),
        "reference_us_per_nucleus_4096": round(published, 1),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
