"""Open a slide; its resolution, its levels, and its pixels at any resolution."""

import contextlib
import hashlib
import logging
import re
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType

import fsspec
import numpy as np
import numpy.typing as npt

from wsipipe.errors import DamageError, ResolutionError, SlideError, one_line
from wsipipe.geometry import Box, Grid, partition
from wsipipe.readers import Reader, open_reader
from wsipipe.resample import resampled

log = logging.getLogger(__name__)

RETRIES_S = (0.1, 1.0)  # pauses before reading again what could not be read
CELL_PX = 256  # side of what is taken for white where it cannot be read: mostly a tile of the file
SENSIBLE_MPP = (0.05, 10.0)  # of a slide: outside, a point was lost, or tags are a screen's (72 dpi are 353 µm/px)
MOST_UM = 1e6  # a side: no glass is wider, whatever a damaged header says
HASHED_BYTES = 1 << 18  # of the head and of the tail of the file
SOURCE_PX = 2048  # side of what is decoded at once: bounds memory, whatever is asked for
UM_PER_UNIT = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4}


class Slide:
    """One slide file, opened; made by `open_slide`, closed by ``with`` or `close`.

    Attributes
    ----------
    path : str
        As it was given.
    name : str
        File name without its endings, such that it can name a folder and stand in one line.
    width_px0, height_px0 : int
        Size at level 0.
    mpp_x0, mpp_y0 : float
        µm per level-0 pixel.
    mpp_source : str
        Who said so: "given", "vendor" or "tiff" (resolution tags).
    reader, vendor : str
        Which library reads it ("openslide", "tifffile", "tiffslide", "image"), and whose format it is.
    levels : list of (int, int, float)
        Width, height and downsample of each level, finest first.
    bounds : Box or None
        The part of level 0 that was scanned, where the file states all of it.
    properties : dict
        What the file says of itself, as text.
    skips_unread : bool
        Whether what cannot be read is taken for white, and kept in `unread`, instead of ending the run.
    fingerprint : str
        Hex hash of the file's size, head and tail and of the size at level 0; a given mpp does not change it.
    """

    def __init__(self, path: str, reader: Reader, mpp: float | None, *, skips_unread: bool = False) -> None:
        self._reader = reader
        self._holds = Counter([reader])  # of each open reader: the threads in it, and one for the slide's own
        self._lock, self._reopening = threading.Lock(), threading.Lock()
        self._unread: set[Box] = set()
        self.path, self.skips_unread = path, skips_unread
        self.name = _name(path)
        self.width_px0, self.height_px0 = reader.sizes[0]
        self.reader, self.vendor, self.properties = reader.name, reader.vendor, reader.properties
        if any(min(size) < 1 or max(size) > max(reader.sizes[0]) for size in reader.sizes):
            raise SlideError(
                f"{path} is damaged: of its levels, {reader.sizes}, some are empty or larger than the first"
            )
        self.levels = [(width, height, _downsample(reader.sizes[0], (width, height))) for width, height in reader.sizes]
        self.mpp_x0, self.mpp_y0, self.mpp_source = _resolution(path, reader, mpp)
        size_um = (self.width_px0 * self.mpp_x0, self.height_px0 * self.mpp_y0)
        if max(size_um) > MOST_UM:
            raise ResolutionError(
                f"{path} would be {size_um[0] / 1e4:.0f} x {size_um[1] / 1e4:.0f} cm large; it is damaged, "
                "or its resolution is wrong: pass --mpp"
            )
        self.bounds = _bounds(reader.properties)
        self.fingerprint = _fingerprint(path, reader.sizes[0])
        self._changed = f"{path} was changed while it was read; run the same command again"

    def __enter__(self) -> "Slide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._let_go(self._reader)

    @property
    def unread(self) -> frozenset[Box]:
        """Cells of a fixed grid, as boxes of level 0, where something could not be read and was taken for white."""
        with self._lock:
            return frozenset(self._unread)

    def grid(self, mpp: float) -> Grid:
        """The slide's pixels at `mpp`."""
        return Grid.over(self.width_px0, self.height_px0, self.mpp_x0, self.mpp_y0, mpp)

    def read(self, box: Box, grid: Grid) -> npt.NDArray[np.uint8]:
        """The pixels of a box of `grid`; safe to call from many threads.

        They come from the coarsest level that is still as fine as `grid`, averaged over areas; from level 0,
        interpolated, where `grid` is finer than that. A pixel's value does not depend on the box it is read with.

        Parameters
        ----------
        box : Box
            In pixels of `grid`; it may reach beyond the slide.
        grid : Grid
            A grid of this slide, from `Slide.grid`.

        Returns
        -------
        (H, W, 3) uint8
            RGB; white beyond the slide and where it has no data.

        Raises
        ------
        DamageError
            If the file cannot be read there, after further attempts, unless such places are skipped.
        SlideError
            If the file is gone, or another one than was opened.
        """
        pixels = np.full((*box.shape, 3), 255, np.uint8)
        finest = min(grid.scale_x, grid.scale_y)
        fine_enough = [n for n, (_, _, downsample) in enumerate(self.levels) if downsample <= finest]
        level = max(fine_enough, key=lambda n: self.levels[n][2], default=0)
        width, height, downsample = self.levels[level]
        scale = (grid.scale_x / downsample, grid.scale_y / downsample)

        def read_level(part: Box) -> npt.NDArray[np.uint8]:
            try:
                return self._region(level, part, RETRIES_S)
            except DamageError as error:
                if not self.skips_unread:
                    raise
                log.warning("%s; what cannot be read there is taken for white", error)
                return self._readable(level, part)

        for part in partition(box.clipped(grid.box), max(1, int(SOURCE_PX / max(1, *scale)))):
            pixels[part.within(box).slices] = resampled(read_level, (width, height), scale, part)
        return pixels

    def _region(self, level: int, part: Box, retries_s: tuple[float, ...]) -> npt.NDArray[np.uint8]:
        """Pixels of a level; a network disk may fail once, and OpenSlide answers nothing more after any failure."""
        for pause in (*retries_s, None):
            with self._lock:
                reader = self._reader
                self._holds[reader] += 1
            try:
                return reader.region(level, part)
            except Exception as error:  # each library has its own
                if pause is None:
                    raise self._failure(reader, level, part, error) from error
            finally:
                self._let_go(reader)
            time.sleep(pause)
            self._reopen(reader)
        raise AssertionError("the last attempt returns or raises")

    def _let_go(self, reader: Reader) -> None:
        """Close a reader once nobody holds it: it was replaced, or the slide closed, and no thread is in it."""
        with self._lock:
            self._holds[reader] -= 1
            unused = self._holds[reader] == 0
            if unused:
                del self._holds[reader]
        if unused:
            reader.close()

    def _reopen(self, failed: Reader) -> None:
        with self._reopening, contextlib.ExitStack() as opened:
            if self._reader is not failed:  # another thread did
                return
            try:
                reader = open_reader(self.path)
                opened.callback(reader.close)
                same = _fingerprint(self.path, reader.sizes[0]) == self.fingerprint
            except (SlideError, OSError):  # it may be there again for the next attempt
                return
            if not same:
                raise SlideError(self._changed)
            opened.pop_all()
            with self._lock:
                self._reader = reader
                self._holds[reader] = 1
        self._let_go(failed)  # other threads may still be in it

    def _failure(self, reader: Reader, level: int, part: Box, error: Exception) -> SlideError:
        """What is wrong with the file: gone, another one, or damaged at a place."""
        try:
            same = _fingerprint(self.path, reader.sizes[0]) == self.fingerprint
        except Exception as lost:  # noqa: BLE001 - each file system has its own
            return SlideError(
                f"{self.path} can no longer be read: {one_line(lost)}; run the same command again once it can"
            )
        if not same:
            return SlideError(self._changed)
        return DamageError(
            f"{self.path} cannot be read at level {level}, x {part.x0} to {part.x1}, "
            f"y {part.y0} to {part.y1}, it is damaged or incomplete there: {one_line(error)}"
        )

    def _readable(self, level: int, part: Box) -> npt.NDArray[np.uint8]:
        """What can be read of a part, cell by cell; the rest is white and its cells are noted, whole."""
        pixels = np.full((*part.shape, 3), 255, np.uint8)
        width, height, downsample = self.levels[level]
        first = Box(part.x0 // CELL_PX * CELL_PX, part.y0 // CELL_PX * CELL_PX, part.x1, part.y1)
        for whole in partition(first, CELL_PX):
            cell = whole.clipped(part)
            try:
                pixels[cell.within(part).slices] = self._region(level, cell, (0.0,))
            except DamageError:
                edges = (whole.x0, whole.y0, min(whole.x0 + CELL_PX, width), min(whole.y0 + CELL_PX, height))
                with self._lock:
                    self._unread.add(Box(*(round(edge * downsample) for edge in edges)))
        return pixels


def open_slide(path: str | Path, mpp: float | None = None, *, skips_unread: bool = False) -> Slide:
    """Open a slide file, a plain picture or a URL.

    Parameters
    ----------
    path : str or Path
        Any format of OpenSlide; OME-TIFF, QPTIFF and other TIFF; PNG and JPEG; a URL of a TIFF that fsspec reaches.
    mpp : float, optional
        µm per level-0 pixel; wins over what the file says.
    skips_unread : bool
        Take for white what cannot be read, and keep it in `Slide.unread`, instead of raising.

    Raises
    ------
    SlideError
        If the file is missing, damaged or of no known format.
    ResolutionError
        If nobody says its resolution, or the one that it states cannot be.
    """
    if mpp is not None and not SENSIBLE_MPP[0] <= mpp <= SENSIBLE_MPP[1]:
        raise SlideError(f"--mpp {mpp} is no resolution of a slide; give µm per pixel, e.g. --mpp 0.25 for a 40x scan")
    if not str(path).strip():
        raise SlideError("no slide is named; give the path of a slide file")
    if "://" not in str(path):
        file = Path(path)
        if file.is_dir():
            raise SlideError(f"{path} is a folder; give the path of a slide file in it")
        try:
            empty = file.stat().st_size == 0
        except OSError as error:
            raise SlideError(f"{path} cannot be opened: {(error.strerror or 'error').lower()}") from error
        if empty:
            raise SlideError(f"{path} is empty; fetch it again")
    reader = open_reader(path)
    try:
        return Slide(str(path), reader, mpp, skips_unread=skips_unread)
    except BaseException:
        reader.close()
        raise


def _name(path: str) -> str:
    stem = re.sub(r"(\.ome)?\.[^.]+$", "", Path(path).name, flags=re.IGNORECASE)
    plain = "".join(c if c.isprintable() else "_" for c in stem)  # no line breaks, no bytes that are no text
    return plain if plain.strip(". ") else "slide"  # "..svs" and "...svs" would name this folder and the one above


def _downsample(size0: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 pixels per pixel of a level: a whole number where its rounded size allows one."""
    longer = int(size0[1] > size0[0])
    ratio = size0[longer] / size[longer]
    whole = round(ratio)
    return float(whole) if all(abs(a / whole - b) <= 1 for a, b in zip(size0, size, strict=True)) else ratio


def _resolution(path: str, reader: Reader, mpp: float | None) -> tuple[float, float, str]:
    """(mpp x, mpp y, source): given, else the vendor's, else the TIFF tags' if a scanner could have meant them."""
    if mpp is not None:
        return mpp, mpp, "given"
    said = reader.properties
    prefix = "tiffslide" if reader.name == "tiffslide" else "openslide"
    tagged = (said.get(f"{prefix}.mpp-x"), said.get(f"{prefix}.mpp-y"))
    candidates = [("tiff" if reader.vendor == "generic-tiff" else "vendor", tagged)]
    candidates.insert(0, ("vendor", _ome_resolution(said.get("tiff.ImageDescription", ""))))
    low, high = SENSIBLE_MPP
    for source, texts in candidates:
        try:
            x, y = (float(text or "nan") for text in texts)
        except ValueError:
            continue
        if low <= x <= high and low <= y <= high:
            return x, y, source
    unit = f"{tagged[0]} µm/px is no slide's" if tagged[0] else ""
    raise ResolutionError(
        f"{path} does not state its resolution{unit and f' ({unit})'}; pass --mpp, e.g. --mpp 0.25 for a 40x scan"
    )


def _ome_resolution(description: str) -> tuple[str | None, str | None]:
    """The first image's PhysicalSize in µm, of OME-XML."""
    if "<OME" not in description[:2000]:
        return None, None
    found: list[str | None] = []
    for axis in "XY":
        size = re.search(rf'\bPhysicalSize{axis}="([^"]*)"', description)
        unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]*)"', description)
        factor = UM_PER_UNIT.get(unit[1].replace("&#181;", "µ").replace("\u03bc", "µ") if unit else "µm")
        try:
            found.append(str(float(size[1]) * factor) if size and factor else None)
        except ValueError:
            found.append(None)
    return found[0], found[1]


def _bounds(properties: dict[str, str]) -> Box | None:
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{key}"]) for key in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return None
    return Box(x, y, x + width, y + height) if width > 0 and height > 0 else None


def _fingerprint(path: str, size: tuple[int, int]) -> str:
    digest = hashlib.sha256(repr(size).encode())
    with fsspec.open(path, "rb") as file:
        digest.update(file.read(HASHED_BYTES))
        length = file.seek(0, 2)
        file.seek(max(0, length - HASHED_BYTES))
        digest.update(file.read(HASHED_BYTES))
    digest.update(str(length).encode())
    return digest.hexdigest()[:32]
