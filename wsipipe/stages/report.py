"""Show the results of a slide on one page of HTML."""

import json
import logging
import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

import wsipipe
from wsipipe.atomic import finished
from wsipipe.errors import StoreError
from wsipipe.focus import MPP, measure_focus
from wsipipe.folder import ResultFolder, record_of, unread_in, write_record
from wsipipe.provenance import require_same_slide
from wsipipe.report import Facts, draw_report
from wsipipe.slide import Slide
from wsipipe.stages.tissue import require_tissue_of
from wsipipe.table import read_nuclei
from wsipipe.tissue import TissueMask

log = logging.getLogger(__name__)

COLUMNS = ["type_id", "type_probability", "x_px0", "y_px0", "area_um2", "geometry"]
SOFTWARE = ("torch", "numpy", "scipy", "scikit-image", "opencv-python-headless", "shapely", "pyarrow", "zarr", "dask")


def make_report(
    slide: Slide, folder: ResultFolder, tissue: TissueMask, *, seconds: Mapping[str, float] | None = None
) -> Path:
    """Write report.html from what the other stages wrote; one that is there is replaced.

    Parameters
    ----------
    seconds : mapping of str to float, optional
        What each stage took, if not what its record says: stages that overlap know it only together.

    Raises
    ------
    StoreError
        If a file or a record of an earlier stage is missing or damaged.
    SettingsError
        If the nuclei were found in other tissue.
    """
    started = time.monotonic()
    meta, _ = read_nuclei(folder.nuclei)
    require_same_slide(folder.nuclei, meta.fingerprint, meta.grid, slide)
    require_tissue_of(folder.nuclei, meta, tissue)
    outputs = {"tissue": folder.tissue, "maps": folder.maps, "nuclei": folder.nuclei, "export": folder.geojson}
    records = {stage: _record(record_of(output), stage) for stage, output in outputs.items()}
    tissue_record, maps, nuclei = records["tissue"], records["maps"], records["nuclei"]
    facts = Facts(
        mpp_source=slide.mpp_source,
        focus=measure_focus(tissue, slide.grid(MPP), slide.read),
        seams=nuclei.get("seams", {}),
        dropped=records["export"].get("dropped", 0),
        unread=unread_in(tissue_record, maps),
        settings={
            "tissue": tissue_record["config"],
            "maps": maps.get("config", {}).get("maps", {}),
            "nuclei": meta.config,
            "export": {"form": records["export"].get("form")},
        },
        run={
            "wsipipe": wsipipe.__version__,
            "device": f"{maps.get('device')}, {maps.get('precision')}, batches of {maps.get('batch_size')}",
            "machine": f"{platform.platform()}, Python {platform.python_version()}",
            "software": ", ".join(f"{name} {version(name)}" for name in SOFTWARE),
        },
        seconds=seconds or {stage: record["seconds"] for stage, record in records.items() if "seconds" in record},
    )

    def batches() -> Iterator[pa.RecordBatch]:
        return read_nuclei(folder.nuclei, COLUMNS)[1]

    page = draw_report(meta, tissue, batches, slide.read, facts)
    with finished(folder.report) as partial:
        partial.write_text(page, encoding="utf-8")
    took = time.monotonic() - started
    log.info("%s: wrote %s in %.1f s", slide.name, folder.report.name, took)
    write_record(folder.report, bytes=len(page.encode()), seconds=round(took, 3))
    return folder.report


def _record(path: Path, stage: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("not a record")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is missing or damaged; make it again with `wsipipe {stage}`") from error
    return record
