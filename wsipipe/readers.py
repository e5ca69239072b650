"""The libraries that open slide files, behind one small interface.

OpenSlide comes first. Where it gives the pixels of tiled TIFF pages as they are stored, `TiledTiff` decodes
these itself: the same pixels (the tests compare), 5 times faster for JPEG and 2 for JPEG 2000. TiffSlide opens
what OpenSlide cannot, and Pillow plain pictures.
"""

import contextlib
import logging
import math
import threading
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wsipipe.errors import SlideError, one_line
from wsipipe.geometry import Box

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# None, LZW, JPEG, Deflate (two numbers), Aperio JPEG 2000 RGB. Aperio's YCbCr kind (33003) is OpenSlide's to turn
# into RGB.
SAME_PIXELS = {1, 5, 7, 8, 32946, 33005}
TILE_CACHE_BYTES = 64 << 20  # a read shares its outer tiles with its neighbours'
PICTURE_MAX_PX = 1 << 30  # a picture is held whole: 3 GB
ANCHOR_PX = 1024  # see OpenSlideReader.region


class Reader(Protocol):
    """What `Slide` needs of a library.

    `region` gives (H, W, 3) uint8 of a box that lies within the level, in pixels of that level; white
    where the file has no data; any number of threads may call it.
    """

    name: str
    vendor: str
    sizes: list[tuple[int, int]]  # (width, height) of every level, finest first
    properties: dict[str, str]

    def region(self, level: int, box: Box) -> npt.NDArray[np.uint8]: ...

    def close(self) -> None: ...


def open_reader(path: str | Path) -> Reader:
    """Open a file or URL with the first library that can.

    Raises
    ------
    SlideError
        If none can, or if its pixels are not 8-bit RGB.
    """
    import openslide

    if "://" in str(path):
        return _open_tiffslide(str(path))
    with Path(path).open("rb") as file:
        is_tiff = file.read(4) in TIFF_MAGIC
    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        return _open_tiffslide(str(path)) if is_tiff else Picture(path)
    except openslide.OpenSlideError as error:
        with contextlib.suppress(SlideError):
            if is_tiff:
                return _open_tiffslide(str(path))
        raise _malformed(path, error) from error
    try:
        reader = OpenSlideReader(slide)
    except Exception as error:  # such as a property that is listed and not there
        slide.close()
        raise _malformed(path, error) from error
    if "<OME" in reader.properties.get("tiff.ImageDescription", ""):
        # To OpenSlide this is any TIFF: it sees neither the levels nor that each colour has a page of its own.
        reader.close()
        return _open_tiffslide(str(path))
    return TiledTiff.of(path, reader) or reader


def _malformed(path: str | Path, error: Exception) -> SlideError:
    return SlideError(f"{path} cannot be opened, it is damaged, incomplete or malformed: {one_line(error)}")


class OpenSlideReader:
    """Any format of OpenSlide, which is safe to read from many threads."""

    name = "openslide"

    def __init__(self, slide: Any) -> None:
        self._slide = slide
        self.properties = dict(slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "")
        self.sizes = list(slide.level_dimensions)

    def region(self, level: int, box: Box) -> npt.NDArray[np.uint8]:
        downsample = self._slide.level_downsamples[level]
        if downsample == round(downsample):
            return self._read(level, box)
        # OpenSlide takes places at level 0 only. At a level whose rounded size makes the downsample a fraction most
        # pixels have no such place and are interpolated between, differently for each corner that a read starts
        # from. So reads start from fixed corners.
        x0, y0 = box.x0 // ANCHOR_PX * ANCHOR_PX, box.y0 // ANCHOR_PX * ANCHOR_PX
        pixels = np.empty((*box.shape, 3), np.uint8)
        for y in range(y0, box.y1, ANCHOR_PX):
            for x in range(x0, box.x1, ANCHOR_PX):
                block = Box(x, y, x + ANCHOR_PX, y + ANCHOR_PX)
                part = block.clipped(box)
                pixels[part.within(box).slices] = self._read(level, block)[part.within(block).slices]
        return pixels

    def _read(self, level: int, box: Box) -> npt.NDArray[np.uint8]:
        downsample = self._slide.level_downsamples[level]
        corner = (round(box.x0 * downsample), round(box.y0 * downsample))
        return _on_white(self._slide.read_region(corner, level, (box.width, box.height)))

    def close(self) -> None:
        self._slide.close()


class TiledTiff:
    """Tiled TIFF pages that OpenSlide knows, decoded one tile at a time and without its copies."""

    name = "tifffile"

    def __init__(self, tiff: Any, pages: list[Any], known: OpenSlideReader) -> None:
        self._tiff, self._pages, self._known = tiff, pages, known
        self._file_lock = threading.Lock()
        self.vendor, self.sizes, self.properties = known.vendor, known.sizes, known.properties
        tile_bytes = max(page.tilewidth * page.tilelength * 3 for page in pages)
        self._tile = lru_cache(maxsize=max(4, TILE_CACHE_BYTES // tile_bytes))(self._decode)

    @classmethod
    def of(cls, path: str | Path, known: OpenSlideReader) -> "TiledTiff | None":
        """The levels of an opened slide as TIFF pages, or None where that would not give the same pixels."""
        import tifffile

        if known.vendor not in ("aperio", "generic-tiff"):
            return None
        try:
            tiff: Any = tifffile.TiffFile(path)
            pages = []
        except (tifffile.TiffFileError, ValueError, OSError):
            return None
        with contextlib.suppress(Exception):  # whatever a damaged file makes it raise: then OpenSlide reads alone
            by_size = {(page.imagewidth, page.imagelength): page for page in reversed(tiff.pages) if page.is_tiled}
            pages = [by_size[size] for size in known.sizes if size in by_size and _as_stored(by_size[size])]
        # OpenSlide takes an Aperio tile without bytes for a fault of the encoder: it draws that tile from the level
        # before, and so those of all coarser levels that cover it.
        redrawn = known.vendor == "aperio" and len(pages) > 1 and any(0 in page.databytecounts for page in pages)
        if len(pages) < len(known.sizes) or redrawn:
            tiff.close()
            return None
        return cls(tiff, pages, known)

    def region(self, level: int, box: Box) -> npt.NDArray[np.uint8]:
        page = self._pages[level]
        side_x, side_y = page.tilewidth, page.tilelength
        per_row = -(-page.imagewidth // side_x)
        pixels = np.empty((*box.shape, 3), np.uint8)
        for row in range(box.y0 // side_y, -(-box.y1 // side_y)):
            for column in range(box.x0 // side_x, -(-box.x1 // side_x)):
                tile = Box(column * side_x, row * side_y, (column + 1) * side_x, (row + 1) * side_y)
                part = tile.clipped(box)
                pixels[part.within(box).slices] = self._tile(level, row * per_row + column)[part.within(tile).slices]
        return pixels

    def _decode(self, level: int, index: int) -> npt.NDArray[np.uint8]:
        page = self._pages[level]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:  # a tile that the scanner left out
            return np.full((page.tilelength, page.tilewidth, 3), 255, np.uint8)
        with self._file_lock:
            self._tiff.filehandle.seek(offset)
            data = self._tiff.filehandle.read(count)
        if len(data) < count:  # libjpeg would fill the rest with grey
            raise EOFError("the file ends within a tile")
        tile: npt.NDArray[np.uint8] = page.decode(data, index, jpegtables=page.jpegtables)[0][0]
        return tile

    def close(self) -> None:
        self._tile.cache_clear()
        self._tiff.close()
        self._known.close()


class TiffSlideReader:
    """OME-TIFF, QPTIFF, plain TIFF, and whatever fsspec reaches."""

    name = "tiffslide"

    def __init__(self, slide: Any, levels: list[Any], axes: str, opened: contextlib.ExitStack) -> None:
        self._levels, self._axes, self._opened = levels, axes, opened
        self.vendor = slide.properties.get("tiffslide.vendor") or "generic-tiff"
        self.properties = {key: str(value) for key, value in slide.properties.items() if value is not None}
        self.sizes = [(int(width), int(height)) for width, height in slide.level_dimensions]

    def region(self, level: int, box: Box) -> npt.NDArray[np.uint8]:
        y, x = box.slices
        if self._axes == "CYX":
            return np.ascontiguousarray(np.moveaxis(self._levels[level][:, y, x], 0, -1))
        return np.asarray(self._levels[level][y, x])[..., :3]

    def close(self) -> None:
        self._opened.close()


class Picture:
    """A PNG or JPEG file, held whole."""

    name = "image"
    vendor = ""

    def __init__(self, path: str | Path) -> None:
        from PIL import Image, UnidentifiedImageError

        try:
            with pillow_limit(None), Image.open(path, formats=("PNG", "JPEG")) as image:
                width, height = image.size
                if width * height > PICTURE_MAX_PX:
                    raise SlideError(
                        f"{path} has {width} x {height} px, too many for a plain picture; save it as a tiled TIFF"
                    )
                if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
                    raise SlideError(f"{path} holds {image.mode} pixels; save it with 8 bits a channel, as RGB")
                self._pixels = _on_white(image)
        except UnidentifiedImageError as error:
            raise SlideError(f"{path} is neither a slide nor a picture of a format that can be read") from error
        except (OSError, SyntaxError, ValueError, MemoryError) as error:
            raise SlideError(f"{path} cannot be read, it is damaged or incomplete: {one_line(error)}") from error
        self.sizes = [(width, height)]
        self.properties: dict[str, str] = {}

    def region(self, level: int, box: Box) -> npt.NDArray[np.uint8]:
        return self._pixels[box.slices]

    def close(self) -> None:
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _as_stored(page: Any) -> bool:
    """Whether a page holds plain 8-bit RGB tiles, of a kind that decodes to OpenSlide's pixels."""
    return bool(
        page.dtype == np.uint8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.photometric in (2, 6)  # RGB, YCbCr
        and page.compression in SAME_PIXELS
        and (page.photometric == 2 or page.compression == 7)
        and _lists_its_tiles(page)
    )


def _lists_its_tiles(page: Any) -> bool:
    """Whether a page says of every tile or strip where it is: else its size is a lie, which would be long to read."""
    declared = math.prod(page.chunked)
    return bool(0 < declared <= min(len(page.dataoffsets), len(page.databytecounts)))


def _open_tiffslide(path: str) -> TiffSlideReader:
    import fsspec
    import tiffslide
    import zarr

    # tifffile logs every oddity of a file, as an error; what matters is raised.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    with contextlib.ExitStack() as opened:  # opened here: neither library closes a file that it gives up on
        try:
            file = opened.enter_context(fsspec.open(path, "rb").open())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as "metadata parsing only partially implemented"
                slide: Any = tiffslide.TiffSlide(file, tifffile_options={"name": Path(path).name})
                axes = slide.properties["tiffslide.series-axes"]
                if "tiffslide.series-composition" in slide.properties:
                    raise ValueError("it is put together of several images")
                series = slide.ts_tifffile.series[slide.properties.get("tiffslide.series-index", 0)]
                if not all(_lists_its_tiles(page) for level in series.levels for page in level.pages):
                    raise ValueError("it declares more tiles than it lists")
                # Not `slide.zarr_group`, in which a tile that the file leaves out is black.
                white = 255 if series.dtype == np.uint8 else None  # others are refused below
                stores = [series.aszarr(level=level, fillvalue=white) for level in range(slide.level_count)]
                levels = [zarr.open_array(store, mode="r", zarr_format=2) for store in stores]
                shape, dtype = levels[0].shape, levels[0].dtype
        except Exception as error:  # TiffSlide lets through whatever any of its layers raises
            reason = "it is not there" if isinstance(error, FileNotFoundError) else one_line(error)
            raise SlideError(f"{path} cannot be opened as a slide: {reason}") from error
        opened.callback(slide.close)
        channels = shape[axes.index("S" if "S" in axes else "C")] if axes in ("YXS", "CYX") else 0
        if dtype != np.uint8 or not (channels == 3 or (channels == 4 and axes == "YXS")):
            raise SlideError(f"{path} holds {dtype} {axes} pixels of shape {shape}; a brightfield slide is 8-bit RGB")
        return TiffSlideReader(slide, levels, axes, opened.pop_all())


def _on_white(image: Any) -> npt.NDArray[np.uint8]:
    """Pixels of a Pillow image; what is transparent has no data and is white."""
    from PIL import Image

    if image.mode not in ("RGBA", "LA") and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return np.asarray(image)[..., :3]
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return np.asarray(white)


_pillow_lock = threading.Lock()


@contextlib.contextmanager
def pillow_limit(pixels: int | None) -> Any:
    """Pillow's guard against huge pictures is a global that also warns of honest slides; ours is `PICTURE_MAX_PX`."""
    from PIL import Image

    with _pillow_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
