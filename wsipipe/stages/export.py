"""Make of a table of nuclei what viewers open: GeoJSON for QuPath, and a picture for the eye."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from wsipipe.atomic import finished
from wsipipe.folder import record_of, write_record
from wsipipe.geojson import Form, GeojsonSummary, write_geojson
from wsipipe.overlay import draw_overlay
from wsipipe.slide import Slide
from wsipipe.stages.tissue import require_tissue_of
from wsipipe.table import read_nuclei
from wsipipe.tissue import TissueMask

log = logging.getLogger(__name__)


def make_export(
    slide: Slide,
    tissue: TissueMask,
    nuclei: Path,
    geojson: Path,
    overlay: Path,
    *,
    form: Form = "outlines",
    crop_to_bounds: bool = True,
    split: int | None = None,
) -> GeojsonSummary:
    """Write `geojson` and `overlay` from a finished table; what an earlier export wrote is replaced, all its parts.

    Parameters
    ----------
    form : {"outlines", "centroids", "overview"}
        What stands for a nucleus in the GeoJSON.
    crop_to_bounds : bool
        Place nuclei where QuPath shows a slide that states its bounds; False: where ``--no-crop`` shows it.
    split : int, optional
        Nuclei a file, if they are to be several.

    Raises
    ------
    SettingsError
        If the nuclei were found in other tissue.
    """
    started = time.monotonic()
    meta, _ = read_nuclei(nuclei)
    require_tissue_of(nuclei, meta, tissue)
    before = _exported(geojson)

    def note(files: Sequence[Path]) -> None:
        """Whatever happens below, the next export knows all files that may be there."""
        write_record(geojson, files=sorted(file.name for file in before.union(files)))

    offset = None if crop_to_bounds else (0, 0)
    summary = write_geojson(nuclei, geojson, form=form, offset=offset, split=split, on_named=note)
    for stale in before - set(summary.files):  # nobody is to open what was found with other settings
        stale.unlink(missing_ok=True)

    def batches() -> Iterator[pa.RecordBatch]:
        return read_nuclei(nuclei, ["type_id", "x_px0", "y_px0", "geometry"])[1]

    picture = draw_overlay(meta, tissue, batches, slide.read)
    with finished(overlay) as partial:
        picture.save(partial, "PNG")
    seconds = time.monotonic() - started
    log.info("%s: wrote %s and %s in %.1f s", slide.name, geojson.name, overlay.name, seconds)
    write_record(
        geojson,
        files=[file.name for file in summary.files],
        nuclei=summary.nuclei,
        dropped=summary.dropped,
        form=form,
        seconds=round(seconds, 3),
    )
    return summary


def _exported(geojson: Path) -> set[Path]:
    """The files that an earlier export wrote, as its record tells."""
    try:
        names = json.loads(record_of(geojson).read_bytes())["files"]
        stem = geojson.name.partition(".")[0]
        return {geojson.with_name(name) for name in names if name.startswith(stem) and ".geojson" in name}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()
