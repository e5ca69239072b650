"""report.html: what a pathologist and an engineer want to see of one slide, on one page that needs nothing else."""

import base64
import io
import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from PIL import Image

from wsipipe.features import UNTYPED
from wsipipe.focus import PLACES, Focus
from wsipipe.geometry import Box
from wsipipe.overlay import (
    FIELD,
    Nuclei,
    Reader,
    View,
    choose_fields,
    colour_of,
    coloured_density,
    count_nuclei,
    density_of,
    density_ramp,
    nice,
    tissue_on_view,
    with_tissue_line,
)
from wsipipe.pages import area as readable_area
from wsipipe.pages import render
from wsipipe.table import NucleiMeta
from wsipipe.tissue import TissueMask

Rgb = npt.NDArray[np.uint8]
Verdict = Literal["good", "look", ""]

MAP = (900, 760)  # px at most of the two maps
JPEG_QUALITY = 90
BIN_UM2 = 0.5  # of the histogram that medians are taken from
MOST_UM2 = 2000.0  # what is larger counts as this
BARS = 36  # at most, of a histogram that is drawn
PLOT = (372, 132)  # px of it
USUAL_UM2 = (
    12.0,
    120.0,
)  # median nuclear area of a slide: outside of it the resolution is more likely wrong than right


@dataclass(frozen=True, slots=True)
class Facts:
    """What the stages noted down of their work, as it stands in their records.

    Attributes
    ----------
    mpp_source : str
        Where the resolution comes from.
    seams : dict
        `SeamFigures.to_json`; empty where none were taken.
    dropped : int
        Nuclei that the GeoJSON leaves out.
    unread : sequence of Box
        Places at level 0 that could not be read and were taken for white.
    settings : dict of str to dict
        Section -> name -> value.
    run : dict of str to str
        How it was run: what may differ between two runs with the same result.
    seconds : dict of str to float
        By stage.
    """

    mpp_source: str
    focus: Focus
    seams: Mapping[str, Any] = field(default_factory=dict)
    dropped: int = 0
    unread: Sequence[Box] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    run: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """A figure of quality; "look" where somebody should."""

    name: str
    value: str
    verdict: Verdict
    text: str


@dataclass(slots=True)
class Sizes:
    """Areas and certainties of the nuclei of one type, summed up from parts of a table."""

    areas: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(round(MOST_UM2 / BIN_UM2) + 1, np.int64))
    total_um2: float = 0.0
    probability: float = 0.0

    @property
    def count(self) -> int:
        return int(self.areas.sum())

    def add(self, areas_um2: npt.NDArray[np.floating[Any]], probabilities: npt.NDArray[np.floating[Any]]) -> None:
        bins = np.minimum(areas_um2 / BIN_UM2, len(self.areas) - 1).astype(np.int64)
        self.areas += np.bincount(bins, minlength=len(self.areas))
        self.total_um2 += float(areas_um2.sum(dtype=np.float64))
        self.probability += float(np.nansum(probabilities, dtype=np.float64))

    def quantile(self, share: float) -> float:
        """µm², within `BIN_UM2`; 0 without nuclei."""
        if not self.count:
            return 0.0
        return float((np.searchsorted(np.cumsum(self.areas), share * self.count) + 0.5) * BIN_UM2)


def draw_report(meta: NucleiMeta, tissue: TissueMask, nuclei: Nuclei, read: Reader, facts: Facts) -> str:
    """The page.

    Parameters
    ----------
    nuclei : callable
        Gives the table's batches from the start, at least `type_id`, `type_probability`, `x_px0`, `y_px0`, `area_um2`
        and `geometry`. It is called several times, so that no more than a batch is held.
    read : callable
        (box, grid) -> (H, W, 3) uint8, the slide at any resolution, white beyond it.
    """
    view = View.of(meta, *MAP)
    counts, cells = count_nuclei(meta, nuclei, view)
    covered = tissue_on_view(tissue, view)
    thumbnail = read(view.box, view.grid)
    density, top = coloured_density(thumbnail, covered, density_of(counts, covered, view))
    fields = choose_fields(cells, meta.grid)
    sizes = measure_sizes(meta, nuclei)
    return render(
        "report.html.jinja",
        meta=meta,
        area_mm2=tissue.area_mm2,
        per_mm2=meta.count / tissue.area_mm2 if tissue.area_mm2 else None,
        view={"width": view.box.width, "height": view.box.height, "bar": _scale_bar(view.grid.mpp_x, view.box.width)},
        thumbnail=_jpeg(with_tissue_line(thumbnail, covered)),
        unread=[_on_view([(box.x0, box.y0), (box.x1, box.y1)], view) for box in facts.unread],
        density=_jpeg(density),
        ramp=_jpeg(density_ramp(256, 8)),
        top=top,
        fields=_fields(fields, meta, nuclei, read, view),
        field_px=FIELD,
        field_um=FIELD * meta.grid.mpp_x,
        field_bar=_scale_bar(meta.grid.mpp_x, FIELD),
        types=_types(meta, sizes, tissue.area_mm2),
        plots=_plots(meta, sizes),
        plot={"width": PLOT[0], "height": PLOT[1]},
        checks=checks(meta, tissue, sizes, facts),
        facts=facts,
    )


def measure_sizes(meta: NucleiMeta, nuclei: Nuclei) -> dict[int, Sizes]:
    """Sizes by `type_id`, of types that have nuclei."""
    sizes: dict[int, Sizes] = {}
    for batch in nuclei():
        types = batch["type_id"].to_numpy()
        areas = batch["area_um2"].to_numpy()
        probabilities = batch["type_probability"].to_numpy(zero_copy_only=False)
        for type_id in np.unique(types).tolist():
            chosen = types == type_id
            sizes.setdefault(type_id, Sizes()).add(areas[chosen], probabilities[chosen])
    return sizes


def checks(meta: NucleiMeta, tissue: TissueMask, sizes: Mapping[int, Sizes], facts: Facts) -> list[Check]:
    """The figures of quality, and which of them ask for a look."""
    share = float(tissue.mask.mean()) if tissue.mask.size else 0.0
    median = _together(sizes.values()).quantile(0.5)
    usual = USUAL_UM2[0] <= median <= USUAL_UM2[1]
    focus, wide = facts.focus, meta.qc.get("wide", 0)
    told = [
        Check(
            "Tissue",
            f"{share:.0%} of the slide",
            "" if tissue.region or tissue.mask.all() else "good" if 0.005 <= share <= 0.98 else "look",
            f"{readable_area(tissue.area_mm2)}; nuclei are looked for there only. See the outline in the map.",
        ),
        Check(
            "Focus",
            "not measured" if focus.median is None else f"{focus.blurred} of {len(focus.blur)} places blurred",
            "" if focus.median is None else "look" if focus.blurred > len(focus.blur) / 5 else "good",
            f"Blur at up to {PLACES} places in the tissue, 0 to 1: median "
            f"{'-' if focus.median is None else f'{focus.median:.2f}'}; sharp scans have 0.2 to 0.45.",
        ),
        Check(
            "Resolution",
            f"{meta.grid.mpp_x0:.4g} µm/px",
            "good" if usual or not meta.count else "look",
            f"From: {facts.mpp_source}. The median nucleus has {median:.0f} µm²"
            f"{'.' if usual else ', which is unusual: is the resolution right?'}"
            if meta.count
            else f"From: {facts.mpp_source}.",
        ),
        Check(
            "Too large",
            f"{wide:,} nuclei",
            "look" if wide else "good",
            "Wider than the halo lets blocks see whole; they may be cut or doubled. A larger nuclei.halo_px mends it.",
        ),
    ]
    if facts.unread:
        told.append(
            Check(
                "Unread",
                f"{len(facts.unread):,} place{'s' * (len(facts.unread) > 1)}",
                "look",
                "The slide could not be read there, so they were taken for white and hold no nuclei. "
                "They are crossed out on the map.",
            )
        )
    if facts.seams:
        ratio, sd = facts.seams.get("density_ratio"), facts.seams.get("density_ratio_sd")
        said = (
            "There are none." if ratio is None else
            f"Density near borders of tiles {ratio:.2f} ± {sd:.2f} of elsewhere; {facts.seams.get('straight', 0)} "
            f"outlines cut straight there, {facts.seams.get('straight_elsewhere', 0)} on lines elsewhere; "
            f"{facts.seams.get('overlaps', 0)} of {facts.seams.get('crossing', 0)} crossing nuclei found twice."
        )  # fmt: skip
        shows = bool(facts.seams.get("shows"))
        told.append(Check("Seams", "show" if shows else "do not show", "look" if shows else "good", said))
    left_out = {
        "small": "left out as too small (nuclei.min_area_um2), or small and not certain (nuclei.small_area_um2)",
        "invalid": "left out as their outline was not valid",
    }
    told += [
        Check(
            key.replace("_", " ").capitalize(), f"{value:,}", "", f"Nuclei {left_out[key]}." if key in left_out else ""
        )
        for key, value in meta.qc.items()
        if key not in ("wide", "nuclei")
    ]
    if facts.dropped:
        told.append(Check("GeoJSON", f"{facts.dropped:,} left out", "look", "QuPath would refuse their outlines."))
    return told


def _types(meta: NucleiMeta, sizes: Mapping[int, Sizes], area_mm2: float) -> list[dict[str, Any]]:
    whole = _together(sizes.values())
    rows: list[dict[str, Any]] = []
    for type_id, name in _named(meta, sizes):
        size = sizes.get(type_id, Sizes())
        rows.append(
            {
                "id": type_id,
                "name": name,
                "colour": "rgb({}, {}, {})".format(*colour_of(meta, type_id)),
                "count": size.count,
                "share": size.count / max(1, whole.count),
                "per_mm2": size.count / area_mm2 if area_mm2 else None,
                "area_share": size.total_um2 / whole.total_um2 if whole.total_um2 else 0.0,
                "area_mm2": size.total_um2 / 1e6,
                "median_um2": size.quantile(0.5),
                "certainty": size.probability / size.count if type_id and size.count else None,
            }
        )
    most = max((max(row["share"], row["area_share"]) for row in rows), default=0.0) or 1.0
    return [{**row, "bar": row["share"] / most, "area_bar": row["area_share"] / most} for row in rows]


def _plots(meta: NucleiMeta, sizes: Mapping[int, Sizes]) -> list[dict[str, Any]]:
    """A histogram of areas for every type that has nuclei, all on one scale."""
    if not sizes:
        return []
    top = nice(max(_together(sizes.values()).quantile(0.995), 10.0), up=True)
    step = nice(top / 3)
    bins = round(top / BIN_UM2)
    count = next(bars for bars in range(BARS, 0, -1) if bins % bars == 0)  # equally many bins a bar
    width, height = PLOT
    plots = []
    for type_id, name in _named(meta, sizes):
        if type_id not in sizes:
            continue
        size = sizes[type_id]
        areas = np.pad(size.areas, (0, max(0, bins - size.areas.size)))[:bins]
        bars = areas.reshape(count, -1).sum(1).astype(float)
        bars[-1] += size.count - bars.sum()  # the last bar holds what is larger
        heights = bars / (bars.max() or 1.0) * (height - 8)
        path = "".join(
            f"M{x * width / count:.1f} {height}v{-tall:.1f}h{width / count - 1:.1f}v{tall:.1f}z"
            for x, tall in enumerate(heights)
            if tall
        )
        plots.append(
            {
                "name": name,
                "colour": "rgb({}, {}, {})".format(*colour_of(meta, type_id)),
                "path": path,
                "median": size.quantile(0.5),
                "quartiles": (size.quantile(0.25), size.quantile(0.75)),
                "median_x": min(size.quantile(0.5) / top, 1.0) * width,
                "ticks": [(n * step / top * width, f"{n * step:g}") for n in range(math.floor(top / step + 1e-9) + 1)],
                "count": size.count,
            }
        )
    return plots


def _fields(fields: Sequence[Box], meta: NucleiMeta, nuclei: Nuclei, read: Reader, view: View) -> list[dict[str, Any]]:
    """Pixels of each field, the outlines in it, and where it lies on the map."""
    outlines: list[list[dict[str, Any]]] = [[] for _ in fields]
    for batch in nuclei() if fields else ():
        xy = meta.grid.from_px0(np.stack([batch["x_px0"].to_numpy(), batch["y_px0"].to_numpy()], axis=1))
        for box, found in zip(fields, outlines, strict=True):
            near = np.flatnonzero(box.grown(FIELD // 8).owns(xy[:, 0], xy[:, 1]))
            if near.size:
                found += _outlines(batch.take(pa.array(near)), meta, box)
    shown = []
    for box, found in zip(fields, outlines, strict=True):
        corners = meta.grid.to_px0([(box.x0, box.y0), (box.x1, box.y1)])
        inside = Counter(one["type_id"] for one in found if one["inside"])
        shown.append(
            {
                "image": _jpeg(read(box, meta.grid)),
                "outlines": found,
                "counts": [(name, inside[type_id]) for type_id, name in _named(meta, inside) if inside[type_id]],
                "box": _on_view(corners, view),
            }
        )
    return shown


def _on_view(corners_px0: npt.ArrayLike, view: View) -> dict[str, float]:
    """Where a box between two corners at level 0 lies on the map, cut to it."""
    corners = view.pixels(np.asarray(corners_px0, float))
    (x0, y0), (x1, y1) = np.clip(corners, 0, (view.box.width, view.box.height)).round(1).tolist()
    return {"x": x0, "y": y0, "width": round(x1 - x0, 1), "height": round(y1 - y0, 1)}


def _outlines(rows: pa.RecordBatch, meta: NucleiMeta, box: Box) -> list[dict[str, Any]]:
    names = dict(_named(meta, rows["type_id"].to_pylist()))
    found = []
    for row in rows.select(["type_id", "type_probability", "area_um2", "x_px0", "y_px0", "geometry"]).to_pylist():
        corners = meta.grid.from_px0(shapely.get_coordinates(shapely.from_wkb(row["geometry"]))) - (box.x0, box.y0)
        told = names[row["type_id"]]
        if row["type_id"] and row["type_probability"] is not None:
            told += f" {row['type_probability']:.0%}"
        centre = meta.grid.from_px0((row["x_px0"], row["y_px0"]))
        found.append(
            {
                "type_id": row["type_id"],
                "path": "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners[:-1].tolist()) + "z",
                "told": f"{told}, {row['area_um2']:.0f} µm²",
                "inside": bool(box.owns(centre[0], centre[1])),
            }
        )
    return found


def _named(meta: NucleiMeta, present: Container[int]) -> list[tuple[int, str]]:
    """(type_id, name) of all types of the model, after nuclei without a type, if such are present."""
    untyped = [(0, UNTYPED)] if 0 in present else []
    return untyped + list(enumerate(meta.class_names))[1:]


def _together(sizes: Iterable[Sizes]) -> Sizes:
    whole = Sizes()
    for size in sizes:
        whole.areas += size.areas
        whole.total_um2 += size.total_um2
        whole.probability += size.probability
    return whole


def _scale_bar(pixel_um: float, width: int) -> dict[str, Any]:
    """A bar of a round length, at most a quarter of `width` px."""
    length_um = nice(width / 4 * pixel_um)
    return {
        "width": round(length_um / pixel_um, 1),
        "label": f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm",
    }


def _jpeg(image: Rgb) -> str:
    """A data URI."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
