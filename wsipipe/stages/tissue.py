"""Find the tissue of a slide and store its mask."""

import json
import logging
import time
import zlib
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from PIL import Image, PngImagePlugin

from wsipipe.atomic import finished
from wsipipe.config import TissueConfig
from wsipipe.errors import ConfigError, SettingsError, SlideError, StoreError, one_line
from wsipipe.folder import drop_record, record_of, write_record
from wsipipe.geometry import Box, Grid
from wsipipe.provenance import require_same_slide, sha256_of, tissue_sum
from wsipipe.roi import read_roi
from wsipipe.slide import Slide
from wsipipe.table import NucleiMeta
from wsipipe.tissue import TissueMask, tissue_mask

log = logging.getLogger(__name__)

FORMAT_VERSION = 3
PART = 1 << 19  # characters of a region in one text of the PNG; what reads it refuses texts of more than a megabyte
MOST_PX = 1 << 26  # of the mask: a slide of 52 x 76 mm at 8 µm/px; finding it takes some 50 bytes each


def find_tissue(slide: Slide, config: TissueConfig, *, roi: Path | None = None, everywhere: bool = False) -> TissueMask:
    """The tissue of a slide, read at low resolution.

    Parameters
    ----------
    roi : Path, optional
        A QuPath export of regions; only what lies in them counts. QuPath's origin is the corner of the slide's bounds.
    everywhere : bool
        All of the slide (or of the regions) counts as tissue.

    Raises
    ------
    ConfigError
        If the regions cannot be read, or lie beside the slide.
    SlideError
        If the slide is too large at this resolution, or cannot be read.
    """
    grid = slide.grid(config.mpp)
    if grid.width * grid.height > MOST_PX:
        raise SlideError(
            f"{slide.path} has {grid.width} x {grid.height} px at tissue.mpp {config.mpp:g}, too many for memory; "
            "set a coarser tissue.mpp, and see whether the slide's resolution is right (--mpp)"
        )
    mask = np.ones(grid.box.shape, bool) if everywhere else tissue_mask(slide.read(grid.box, grid), grid.mpp, config)
    tissue = TissueMask(mask, grid, size_px0=(slide.width_px0, slide.height_px0))
    if roi is None:
        return tissue
    region = read_roi(roi, (slide.bounds.x0, slide.bounds.y0) if slide.bounds else (0, 0))
    if shapely.intersection(region, shapely.box(0, 0, slide.width_px0, slide.height_px0)).area == 0:
        x0, y0, x1, y1 = region.bounds
        raise ConfigError(
            f"the regions of {roi} lie at x {x0:.0f} to {x1:.0f} and y {y0:.0f} to {y1:.0f}, not on {slide.path} of "
            f"{slide.width_px0} x {slide.height_px0} px; were they drawn on another slide, or at another resolution?"
        )
    return tissue.restricted(region)


def make_tissue(
    slide: Slide, out: Path, config: TissueConfig, *, roi: Path | None = None, everywhere: bool = False
) -> TissueMask:
    """Find the tissue and write its mask to `out`."""
    started = time.monotonic()
    tissue = find_tissue(slide, config, roi=roi, everywhere=everywhere)
    seconds = time.monotonic() - started
    write_tissue(tissue, out, slide, config, seconds, slide.unread)
    log.info("%s: %.2f mm² of tissue in %.1f s", slide.name, tissue.area_mm2, seconds)
    return tissue


def write_tissue(
    tissue: TissueMask, out: Path, slide: Slide, config: TissueConfig, seconds: float, unread: Collection[Box]
) -> None:
    """Store a mask as a PNG that says where its pixels lie; one that is there is replaced.

    It was found in `seconds`, and at `unread` places (level 0) the slide could not be read for it.
    """
    region = "" if tissue.region is None else tissue.region.wkt
    parts = [region[start : start + PART] for start in range(0, len(region), PART)]
    about = {
        "format": FORMAT_VERSION,
        "fingerprint": slide.fingerprint,
        "grid": asdict(tissue.grid),
        "config": config.model_dump(mode="json"),
        "region_parts": len(parts),
        "crc32": _crc(tissue.mask),
    }
    text = PngImagePlugin.PngInfo()
    text.add_text("wsipipe", json.dumps(about), zip=True)
    for number, part in enumerate(parts):
        text.add_text(f"region-{number}", part, zip=True)
    drop_record(out)
    with finished(out) as partial:
        Image.fromarray(tissue.mask).save(partial, "PNG", pnginfo=text)
    write_record(
        out,
        slide=slide.path,
        mpp={"x": slide.mpp_x0, "y": slide.mpp_y0, "source": slide.mpp_source},
        config=config.model_dump(),
        mm2=tissue.area_mm2,
        share=float(tissue.mask.mean()),
        unread_px0=[asdict(box) for box in sorted(unread, key=lambda box: (box.y0, box.x0, box.y1, box.x1))],
        seconds=round(seconds, 3),
    )


def read_tissue(path: Path, slide: Slide) -> TissueMask:
    """The mask that `make_tissue` wrote.

    Raises
    ------
    StoreError
        If the file is missing, damaged, not ours, of another slide, or made at another resolution of it.
    """
    return _read(path, slide)[0]


def is_written(tissue: TissueMask, path: Path, slide: Slide, config: TissueConfig) -> bool:
    """Whether a file holds just this mask, found with these settings, and has a record."""
    try:
        there, made = _read(path, slide)
    except StoreError:
        return False
    same = np.array_equal(there.mask, tissue.mask) and there.grid == tissue.grid and there.region == tissue.region
    return same and made == config and record_of(path).exists()


def settings_of_tissue(path: Path, slide: Slide, asked: TissueConfig) -> TissueConfig:
    """The settings that a mask was made with.

    Raises
    ------
    SettingsError
        If `asked` sets one of them otherwise; what it leaves to its default asks for nothing.
    StoreError
        As `read_tissue`.
    """
    made = _read(path, slide)[1]
    ours, theirs = asked.model_dump(mode="json", exclude_unset=True), made.model_dump(mode="json")
    differing = [f"tissue.{key} {theirs[key]} there and {value} now" for key, value in ours.items()
                 if theirs[key] != value]  # fmt: skip
    if differing:
        raise SettingsError(
            f"{path} was made otherwise: {'; '.join(differing)}; make it again with `wsipipe tissue`, or leave them out"
        )
    return made


def _read(path: Path, slide: Slide) -> tuple[TissueMask, TissueConfig]:
    try:
        with Image.open(path) as image:
            texts: dict[str, str] = getattr(image, "text", {})
            about: dict[str, Any] = json.loads(texts["wsipipe"])
            mask = np.asarray(image.convert("L")) > 0
        if about["crc32"] != _crc(mask):  # what reads PNG looks at no checksum of pixels
            raise ValueError("its pixels are not those that were written")
        if about["format"] != FORMAT_VERSION:
            raise ValueError(f"it has format version {about['format']}, this wsipipe reads {FORMAT_VERSION}")
        grid = Grid(**about["grid"])
        region = "".join(texts[f"region-{number}"] for number in range(about["region_parts"]))
        require_same_slide(path, about["fingerprint"], grid, slide)
        within = shapely.from_wkt(region) if region else None
        tissue = TissueMask(mask, grid, within, (slide.width_px0, slide.height_px0))
        return tissue, TissueConfig.model_validate(about["config"])
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist; make it with `wsipipe tissue`") from error
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, MemoryError, shapely.errors.GEOSException) as error:
        raise StoreError(
            f"{path} is no tissue mask of wsipipe ({one_line(error)}); make it with `wsipipe tissue`"
        ) from error


def require_tissue_of(nuclei: Path, meta: NucleiMeta, tissue: TissueMask) -> None:
    """Let areas and densities be told of `tissue` only where the table of nuclei was made in it.

    Raises
    ------
    SettingsError
        If it was made in other tissue; a table that does not say in which is not refused.
    """
    ours = tissue_sum(sha256_of(tissue.mask), None if tissue.region is None else tissue.region.wkt)
    if meta.maps.get("tissue", ours) != ours:
        raise SettingsError(
            f"{nuclei} was made in other tissue than tissue.png shows now; make that again as it was, "
            "or maps and nuclei for it, with `wsipipe maps --overwrite` and `wsipipe nuclei --overwrite`"
        )


def _crc(mask: npt.NDArray[np.bool_]) -> int:
    return zlib.crc32(np.packbits(mask).tobytes())
