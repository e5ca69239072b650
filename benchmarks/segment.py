"""`wsipipe segment` over slides of growing size: pixels a second, the network's share, and peak memory.

Usage: python benchmarks/segment.py [--sides 2048 8192 32768] [--model NAME|PATH]

Each slide is square at 0.25 µm/px and carries four times the tissue of the one before, on sixteen times the glass;
the tissue is that of the demonstration slide, repeated. Every size runs in a process of its own. The last line is
JSON: by side `mp_per_s` (megapixels of tissue tiles a second, from start to finished files), `network_share` (of
that time) and `peak_mb` (of the process).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from wsipipe.demo import GLASS, draw_tissue

TILE = 256
TEXTURE = 1024
LEVELS = (1, 4, 16)
PHASE = 336  # of the texture, px: where it repeats, nuclei are cut, and that shall be no line between tiles or blocks
MPP = 0.25
SMALLEST = 2048  # the slide that is all tissue


def write_slide(path: Path, side: int) -> None:
    """A square pyramid with a square of tissue of sqrt(side * 2048) px in its middle."""
    texture = np.ascontiguousarray(draw_tissue(2048)[512 : 512 + TEXTURE, 512 : 512 + TEXTURE])
    tissue = round((side * SMALLEST) ** 0.5 / TEXTURE) * TEXTURE
    first = (side - tissue) // 2 // TEXTURE * TEXTURE

    def tiles(step: int) -> Iterator[npt.NDArray[np.uint8]]:
        reduced = cv2.resize(texture, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)
        glass = np.full((TILE, TILE, 3), GLASS, np.uint8)
        low, high, size, phase = first // step, (first + tissue) // step, side // step, PHASE // step
        for y in range(0, size, TILE):
            for x in range(0, size, TILE):
                tile = glass
                if y + TILE > low and x + TILE > low and y < high and x < high:
                    rows, columns = np.arange(y, y + TILE), np.arange(x, x + TILE)
                    inside = ((rows >= low) & (rows < high))[:, None] & ((columns >= low) & (columns < high))
                    found = reduced[np.ix_((rows - low + phase) % len(reduced), (columns - low + phase) % len(reduced))]
                    tile = np.where(inside[..., None], found, glass)
                yield np.ascontiguousarray(tile)

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for step in LEVELS:
            tiff.write(
                tiles(step),
                shape=(side // step, side // step, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 90},
                description=f"Aperio Image Library v12.0.0\r\n{side}x{side} (256x256)|AppMag = 40|MPP = {MPP}",
                subfiletype=int(step > 1),
                metadata=None,
            )
            if step == 1:  # the second page of such a file is its thumbnail
                tiff.write(np.full((64, 64, 3), 255, np.uint8), photometric="rgb", rowsperstrip=16, metadata=None)


def measure(side: int, model: str | None, folder: Path) -> dict[str, float]:
    slide, out = folder / f"{side}.svs", folder / f"results-{side}"
    write_slide(slide, side)
    command = [sys.executable, "-m", "wsipipe", "-q", "segment", str(slide), "-o", str(out)]
    started = time.perf_counter()
    subprocess.run([*command, *(["--model", model] if model else [])], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    record = json.loads((out / "segment.json").read_text())
    figures = {
        "mp_per_s": record["megapixels"] / seconds,
        "network_share": record["seconds_network"] / seconds,
        "peak_mb": record["peak_mb"],
    }
    nuclei = sum(record["nuclei"].values())
    print(
        f"{side:>6} px: {record['megapixels']:7.1f} MP of tissue tiles, {nuclei:>7} nuclei, {seconds:7.1f} s, {figures}"
    )
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {side: measure(side, arguments.model, Path(folder)) for side in arguments.sides}
    names = ("mp_per_s", "network_share", "peak_mb")
    print(json.dumps({name: {str(side): figures[side][name] for side in figures} for name in names}))


if __name__ == "__main__":
    main()
