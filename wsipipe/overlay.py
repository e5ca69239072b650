"""overlay.png: one picture of a result, to see at a glance whether it is right: slide, density, fields, counts."""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from PIL import Image, ImageDraw, ImageFont

from wsipipe.geometry import Box, Grid
from wsipipe.table import NucleiMeta
from wsipipe.tissue import TissueMask

Rgb = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Reader = Callable[[Box, Grid], Rgb]
Nuclei = Callable[[], Iterable[pa.RecordBatch]]

MARGIN, TOP, GAP = 56, 176, 56  # px of the picture, as all lengths here that carry no other unit
FIELD, FIELD_GAP, COLUMNS, ROWS = 424, 16, 3, 2
FIELDS_WIDTH, FIELDS_HEIGHT = (n * (FIELD + FIELD_GAP) - FIELD_GAP for n in (COLUMNS, ROWS))
# The two maps stand side by side if the slide is tall, else one above the other.
BESIDE, ABOVE = (620, FIELDS_HEIGHT), (960, 520)
LEAST_WIDTH = 320  # of a map's place: its caption and scale
CAPTION = 110  # height of what is written below a map
LEGEND_ROW = 44
OUTLINE = 2
LARGEST_ZOOM = 16  # a slide of a few pixels is not blown up further
SMOOTH_UM, SMOOTH_PX = 50.0, 5.0  # of the density map, a standard deviation: whichever is more

INK, MUTED, RULE, PAPER = "#16181d", "#6b7280", "#d5d9e0", "#ffffff"
TISSUE_LINE = (22, 24, 29)
UNTYPED = (0, 150, 170)  # nuclei of no type: a colour that H&E has not


@dataclass(frozen=True, slots=True)
class View:
    """The part of the slide that is shown, and the pixels of the picture that show it."""

    grid: Grid
    box: Box

    @classmethod
    def of(cls, meta: NucleiMeta, width: int, height: int) -> "View":
        """The slide, or the scanned part of it, as large as fits into `width` x `height`."""
        shown = meta.bounds or Box(0, 0, meta.width_px0, meta.height_px0)
        mpp_x0, mpp_y0 = meta.grid.mpp_x0, meta.grid.mpp_y0
        pixel_um = max(shown.width * mpp_x0 / width, shown.height * mpp_y0 / height, mpp_x0 / LARGEST_ZOOM)
        columns, rows = (max(1, round(side / pixel_um)) for side in (shown.width * mpp_x0, shown.height * mpp_y0))
        scale_x, scale_y = shown.width / columns, shown.height / rows
        left, top = round(shown.x0 / scale_x), round(shown.y0 / scale_y)
        whole = math.ceil(meta.width_px0 / scale_x), math.ceil(meta.height_px0 / scale_y)
        return cls(Grid(*whole, scale_x, scale_y, mpp_x0, mpp_y0), Box(left, top, left + columns, top + rows))

    def pixels(self, xy_px0: Floats) -> Floats:
        return self.grid.from_px0(xy_px0) - (self.box.x0, self.box.y0)


def draw_overlay(meta: NucleiMeta, tissue: TissueMask, nuclei: Nuclei, read: Reader) -> Image.Image:
    """The slide with its tissue, the density of nuclei, fields at full resolution, and a legend with counts.

    Parameters
    ----------
    meta : NucleiMeta
        Of the finished table.
    tissue : TissueMask
        Where nuclei were looked for; the area that densities refer to.
    nuclei : callable
        Gives the table's batches from the start, at least `type_id`, `x_px0`, `y_px0` and `geometry`. It is
        called twice, so that no more than a batch is held.
    read : callable
        (box, grid) -> (H, W, 3) uint8, the slide at any resolution, white beyond it.

    Returns
    -------
    PIL.Image.Image
        RGB; some 2000 to 2700 px wide and 1300 high.
    """
    beside, above = View.of(meta, *BESIDE), View.of(meta, *ABOVE)
    tall = beside.box.width * beside.box.height > above.box.width * above.box.height
    view = beside if tall else above
    height, width = view.box.shape
    place = max(width, LEAST_WIDTH)
    first = MARGIN, TOP
    second = (MARGIN + place + GAP, TOP) if tall else (MARGIN, TOP + height + CAPTION)
    left = second[0] + place + GAP
    legend_top = TOP + FIELDS_HEIGHT + 36
    bottom = max(second[1] + height + CAPTION, legend_top + (1 + len(meta.counts)) * LEGEND_ROW)
    picture = Image.new("RGB", (left + FIELDS_WIDTH + MARGIN, bottom + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)

    counts, cells = count_nuclei(meta, nuclei, view)
    covered = tissue_on_view(tissue, view)
    fields = choose_fields(cells, meta.grid)
    thumbnail = read(view.box, view.grid)
    _title(draw, meta, tissue.area_mm2, picture.width)
    _slide_map(picture, first, thumbnail, covered, view, fields, meta.grid)
    _density_map(picture, second, thumbnail, covered, density_of(counts, covered, view))
    for number, image in enumerate(_outlined(fields, meta, nuclei, read)):
        row, column = divmod(number, COLUMNS)
        at = left + column * (FIELD + FIELD_GAP), TOP + row * (FIELD + FIELD_GAP)
        picture.paste(Image.fromarray(image), at)
        _frame(draw, at, image.shape)
        _tag(draw, (at[0] + 12, at[1] + 12), str(number + 1), 24)
        _scale_bar(draw, (at[0] + FIELD - 12, at[1] + FIELD - 12), meta.grid.mpp_x, FIELD // 4)
    if not fields:
        draw.rectangle((left, TOP, left + FIELDS_WIDTH, TOP + FIELDS_HEIGHT), "#f6f7f9")
        _write(draw, (left + FIELDS_WIDTH // 2, TOP + FIELDS_HEIGHT // 2), "No nuclei were found", MUTED, 34, "m")
    _legend(draw, (left, legend_top), meta, tissue.area_mm2)
    return picture


def count_nuclei(meta: NucleiMeta, nuclei: Nuclei, view: View) -> tuple[Floats, Floats]:
    """Nuclei by pixel of the view, and by field of the working grid."""
    shape = view.box.shape
    cells = math.ceil(meta.grid.height / FIELD), math.ceil(meta.grid.width / FIELD)
    by_pixel, by_cell = np.zeros(shape), np.zeros(cells)
    for batch in nuclei():
        xy = np.stack([batch["x_px0"].to_numpy(), batch["y_px0"].to_numpy()], axis=1)
        for counts, places in ((by_pixel, view.pixels(xy)), (by_cell, meta.grid.from_px0(xy) / FIELD)):
            x, y = np.floor(places).astype(np.int64).T
            inside = (x >= 0) & (y >= 0) & (x < counts.shape[1]) & (y < counts.shape[0])
            index = y[inside] * counts.shape[1] + x[inside]
            counts += np.bincount(index, minlength=counts.size).reshape(counts.shape)
    return by_pixel, by_cell


def tissue_on_view(tissue: TissueMask, view: View) -> npt.NDArray[np.bool_]:
    """The tissue mask in pixels of the view, its steps smoothed."""
    if tissue.mask.size == 0:
        return np.zeros(view.box.shape, bool)
    step_x, step_y = view.grid.scale_x / tissue.grid.scale_x, view.grid.scale_y / tissue.grid.scale_y
    to_mask = np.array(
        [[step_x, 0, (view.box.x0 + 0.5) * step_x - 0.5], [0, step_y, (view.box.y0 + 0.5) * step_y - 0.5]]
    )
    height, width = view.box.shape
    sampled = cv2.warpAffine(
        tissue.mask.astype(np.float32),
        to_mask,
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(sampled >= 0.5)


def density_of(counts: Floats, covered: npt.NDArray[np.bool_], view: View) -> Floats:
    """Nuclei per mm² of tissue: both are smoothed alike, so the edge of the tissue is not paler."""
    sigma = min(max(SMOOTH_PX, SMOOTH_UM / view.grid.mpp), max(counts.shape) / 8)

    def smooth(values: npt.NDArray[Any]) -> Floats:
        border = cv2.BORDER_REFLECT
        return np.asarray(cv2.GaussianBlur(values.astype(np.float64), (0, 0), sigma, borderType=border))

    area_mm2 = smooth(covered) * view.grid.pixel_um2 / 1e6
    return np.divide(smooth(np.where(covered, counts, 0)), area_mm2, out=np.zeros(counts.shape), where=covered)


def choose_fields(cells: Floats, grid: Grid) -> list[Box]:
    """The densest field, then always the one that is both dense and far from those chosen; in reading order."""
    if not cells.any():
        return []
    places, weights = np.argwhere(cells > 0), cells[cells > 0]
    chosen = [int(np.argmax(weights))]
    while len(chosen) < min(COLUMNS * ROWS, len(places)):
        away = np.min([np.hypot(*(places - places[one]).T) for one in chosen], axis=0)
        chosen.append(int(np.argmax(np.sqrt(away) * weights)))
    boxes = []
    for row, column in sorted(places[chosen].tolist()):
        # The last column and row of cells reach beyond the slide: their fields are moved back onto it. A slide
        # smaller than a field lies in its middle.
        x0, y0 = (
            min(cell * FIELD, side - FIELD) if side >= FIELD else (side - FIELD) // 2
            for cell, side in ((column, grid.width), (row, grid.height))
        )
        boxes.append(Box(x0, y0, x0 + FIELD, y0 + FIELD))
    return boxes


def _outlined(fields: list[Box], meta: NucleiMeta, nuclei: Nuclei, read: Reader) -> list[Rgb]:
    """Each field's pixels with the outlines of its nuclei in the colours of their types."""
    images = [np.ascontiguousarray(read(field, meta.grid)) for field in fields]
    for batch in nuclei():
        xy = meta.grid.from_px0(np.stack([batch["x_px0"].to_numpy(), batch["y_px0"].to_numpy()], axis=1))
        for field, image in zip(fields, images, strict=True):
            near = np.flatnonzero(field.grown(FIELD // 4).owns(xy[:, 0], xy[:, 1]))
            if not near.size:
                continue
            rows = batch.take(pa.array(near))
            types = rows["type_id"].to_numpy()
            shapes = shapely.from_wkb(rows["geometry"].to_numpy(zero_copy_only=False))
            for type_id in np.unique(types):
                # Corners of pixels, to centres of pixels in 1/16 px, as OpenCV wants them.
                rings = [
                    np.rint(
                        (meta.grid.from_px0(shapely.get_coordinates(shape)) - (field.x0 + 0.5, field.y0 + 0.5)) * 16
                    ).astype(np.int32)
                    for shape in shapes[types == type_id]
                ]
                cv2.polylines(image, rings, True, colour_of(meta, int(type_id)), OUTLINE, cv2.LINE_AA, shift=4)
    return images


def _slide_map(
    picture: Image.Image,
    at: tuple[int, int],
    thumbnail: Rgb,
    covered: npt.NDArray[np.bool_],
    view: View,
    fields: list[Box],
    grid: Grid,
) -> None:
    image = with_tissue_line(thumbnail, covered)
    picture.paste(Image.fromarray(image), at)
    draw = ImageDraw.Draw(picture)
    _frame(draw, at, covered.shape)
    for number, field in enumerate(fields, 1):
        shown = field.clipped(grid.box)
        corners = view.pixels(grid.to_px0([(shown.x0, shown.y0), (shown.x1, shown.y1)]))
        (x0, y0), (x1, y1) = (np.clip(corners, 0, (view.box.width, view.box.height)) + at).tolist()
        draw.rectangle((x0 - 2, y0 - 2, x1 + 2, y1 + 2), outline="white", width=5)
        draw.rectangle((x0, y0, x1, y1), outline=INK, width=2)
        beyond = x1 + 34 > at[0] + view.box.width
        _tag(draw, (round(x0) - 34 if beyond else round(x1) + 6, round(y0) - 3), str(number), 18)
    below = at[1] + view.box.height + 34
    _write(draw, (at[0], below), "Tissue and fields", INK, 24)
    _scale_bar(draw, (at[0] + max(view.box.width, LEAST_WIDTH), below + 24), view.grid.mpp_x, 120)


def coloured_density(thumbnail: Rgb, covered: npt.NDArray[np.bool_], density: Floats) -> tuple[Rgb, float]:
    """The density in colours over the slide in grey, with the tissue's outline, and what the top colour stands for.

    That is 0 where there is no nucleus.
    """
    # The scale ends where hardly any tissue is denser; but a few nuclei alone on a large slide are to be seen too.
    top = nice(max(np.quantile(density[covered], 0.995), density.max() / 4), up=True) if density.any() else 0.0
    shades = np.clip(density / (top or 1.0) * 255, 0, 255).astype(np.uint8)
    coloured = cv2.applyColorMap(shades, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    grey = np.repeat(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    pale = (255 - (255 - grey.astype(np.float64)) * 0.4).astype(np.uint8)
    blended = (coloured * 0.82 + grey * 0.18).astype(np.uint8)
    return with_tissue_line(np.where(covered[..., None], blended, pale), covered), top


def density_ramp(width: int, height: int) -> Rgb:
    """The colours of `coloured_density`, from 0 on the left to the highest on the right."""
    shades = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
    return np.ascontiguousarray(cv2.applyColorMap(shades, cv2.COLORMAP_VIRIDIS)[..., ::-1])


def _density_map(
    picture: Image.Image, at: tuple[int, int], thumbnail: Rgb, covered: npt.NDArray[np.bool_], density: Floats
) -> None:
    image, top = coloured_density(thumbnail, covered, density)
    picture.paste(Image.fromarray(image), at)
    draw = ImageDraw.Draw(picture)
    _frame(draw, at, covered.shape)
    below = at[1] + covered.shape[0] + 34
    _write(draw, (at[0], below), "Nuclei per mm² of tissue", INK, 24)
    if not top:
        return
    width = min(max(covered.shape[1], LEAST_WIDTH), 480)
    picture.paste(Image.fromarray(density_ramp(width, 14)), (at[0], below + 24))
    for share, anchor in ((0.0, "l"), (0.5, "m"), (1.0, "r")):
        _write(draw, (at[0] + round(share * width), below + 58), f"{top * share:,.0f}", MUTED, 20, anchor)


def with_tissue_line(image: Rgb, covered: npt.NDArray[np.bool_]) -> Rgb:
    lines, _ = cv2.findContours(covered.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    drawn = np.ascontiguousarray(image).copy()
    cv2.drawContours(drawn, lines, -1, TISSUE_LINE, 2, cv2.LINE_AA)
    return drawn


def _title(draw: ImageDraw.ImageDraw, meta: NucleiMeta, area_mm2: float, width: int) -> None:
    _write(draw, (MARGIN, 62), meta.slide, INK, 46)
    area = f"{area_mm2:,.0f} mm²" if area_mm2 >= 100 else f"{area_mm2:.3g} mm²"
    if 0 < area_mm2 < 0.001:
        area = f"{area_mm2 * 1e6:.0f} µm²"
    facts = [f"{meta.count:,} nuclei", f"{area} of tissue"]
    if area_mm2 > 0:
        facts.append(f"{meta.count / area_mm2:,.0f} nuclei per mm²")
    facts.append(f"{meta.grid.mpp:.3g} µm/px")
    if "name" in meta.model:
        facts.append(f"model {meta.model['name']}")
    _write(draw, (MARGIN, 118), "   ·   ".join(facts), MUTED, 26)
    draw.line((MARGIN, 150, width - MARGIN, 150), RULE, 2)


def _legend(draw: ImageDraw.ImageDraw, at: tuple[int, int], meta: NucleiMeta, area_mm2: float) -> None:
    """A row for each type: colour, name, count, share and density."""
    x, y = at
    stops = [x + round(FIELDS_WIDTH * share) for share in (0.56, 0.76, 1.0)]
    middle = y + LEGEND_ROW // 2
    for stop, label in zip(stops, ("nuclei", "share", "per mm² of tissue"), strict=True):
        _write(draw, (stop, middle), label, MUTED, 22, "r")
    draw.line((x, y + LEGEND_ROW, x + FIELDS_WIDTH, y + LEGEND_ROW), RULE, 2)
    for name, count in meta.counts.items():
        middle += LEGEND_ROW
        type_id = meta.class_names.index(name) if name in meta.class_names else 0
        share = f"{count / meta.count:.1%}" if meta.count else "-"
        density = f"{count / area_mm2:,.0f}" if area_mm2 > 0 else "-"
        draw.rounded_rectangle((x + 2, middle - 12, x + 26, middle + 12), 5, colour_of(meta, type_id))
        _write(draw, (x + 44, middle), name, INK, 26)
        for stop, value in zip(stops, (f"{count:,}", share, density), strict=True):
            _write(draw, (stop, middle), value, INK, 26, "r")


def _tag(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int) -> None:
    side = size * 3 // 2
    draw.rounded_rectangle((at[0], at[1], at[0] + side, at[1] + side), 5, INK)
    _write(draw, (at[0] + side // 2, at[1] + side // 2), text, PAPER, size, "m")


def _scale_bar(draw: ImageDraw.ImageDraw, corner: tuple[int, int], pixel_um: float, longest: int) -> None:
    """A bar of a round length, at most `longest` px, on a white plate whose lower right is `corner`."""
    length_um = nice(longest * pixel_um)
    bar = round(length_um / pixel_um)
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    plate = max(bar, round(_font(20).getlength(label))) + 20
    right, bottom = corner
    middle = right - plate // 2
    draw.rounded_rectangle((right - plate, bottom - 46, right, bottom), 6, PAPER)
    draw.rectangle((middle - bar // 2, bottom - 14, middle - bar // 2 + bar - 1, bottom - 9), INK)
    _write(draw, (middle, bottom - 30), label, INK, 20, "m")


def _frame(draw: ImageDraw.ImageDraw, at: tuple[int, int], shape: tuple[int, ...]) -> None:
    draw.rectangle((at[0] - 1, at[1] - 1, at[0] + shape[1], at[1] + shape[0]), outline=RULE)


def nice(value: float, *, up: bool = False) -> float:
    """The next 1, 2 or 5 times a power of ten below `value`; above it in finer ones, so that scales are made use of."""
    power = 10.0 ** math.floor(math.log10(value))
    if up:
        return min(power * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * step >= value * (1 - 1e-9))
    return max(power * step for step in (1, 2, 5, 10) if power * step <= value)


def colour_of(meta: NucleiMeta, type_id: int) -> tuple[int, int, int]:
    return meta.class_colours[type_id] if 0 < type_id < len(meta.class_colours) else UNTYPED


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: str, size: int, anchor: str = "l"
) -> None:
    """Text whose middle height is at `at`, with its left end, middle or right end there ("l", "m", "r").

    Pillow's own font has little beyond ASCII: µ is a u with a stem, ² a small 2, é an e.
    """
    plain = unicodedata.normalize("NFKD", text.replace("²", "\0").replace("µ", "\1").replace("μ", "\1"))
    runs = []
    for run in re.findall(r"[\0\1]|[^\0\1]+", "".join(c for c in plain if not unicodedata.combining(c))):
        small = run == "\0"
        shown = {"\0": "2", "\1": "u"}.get(run) or "".join(c if c.isascii() or c == "·" else "?" for c in run)
        font = _font(round(size * 0.62) if small else size)
        runs.append((run, shown, font, font.getlength(shown)))
    x = at[0] - sum(length for *_, length in runs) * {"l": 0, "m": 0.5, "r": 1}[anchor]
    baseline = at[1] + round(size * 0.35)
    for run, shown, font, length in runs:
        draw.text((x, baseline - (size * 0.33 if run == "\0" else 0)), shown, colour, font, anchor="ls")
        if run == "\1":
            stem, thick = round(x + size * 0.07), max(2, round(size * 0.085))
            draw.rectangle((stem, baseline - size * 0.3, stem + thick - 1, baseline + size * 0.2), colour)
        x += length
