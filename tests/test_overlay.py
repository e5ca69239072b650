"""The picture of a result: it shows where the nuclei are, for every slide that there can be."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import shapely
from made_nuclei import CLASSES, COLOURS, made_meta, made_nuclei
from PIL import Image

from wsipipe import overlay
from wsipipe.geometry import Box, Grid
from wsipipe.overlay import FIELD, draw_overlay
from wsipipe.table import NucleiMeta
from wsipipe.tissue import TissueMask

GLASS = (244, 240, 243)


def glass(box: Box, grid: Grid) -> np.ndarray:
    return np.full((*box.shape, 3), GLASS, np.uint8)


def everywhere(width_px0: int, height_px0: int) -> TissueMask:
    grid = Grid.over(width_px0, height_px0, 0.25, 0.25, 8.0)
    return TissueMask(np.ones(grid.box.shape, bool), grid)


def drawn(nuclei: pa.RecordBatch, width_px0: int, height_px0: int, bounds: Box | None = None) -> Image.Image:
    counts = {name: nuclei["type"].to_pylist().count(name) for name in CLASSES[1:]}
    meta = replace(made_meta(width_px0, height_px0, bounds), counts=counts)
    return draw_overlay(meta, everywhere(width_px0, height_px0), lambda: [nuclei], glass)


def scattered(n: int, width: int, height: int) -> pa.RecordBatch:
    return made_nuclei(np.random.default_rng(0).uniform(0, (width, height), (n, 2)).round(1))


@pytest.mark.parametrize("size", [(16, 16), (1, 100_000), (100_000, 1), (4000, 3000), (3000, 4000), (200_000, 100_000)])
@pytest.mark.parametrize("n", [0, 1, 400])
def test_a_picture_is_drawn_for_slides_of_every_size_with_and_without_nuclei(size, n):
    picture = drawn(scattered(n, *size), *size)
    assert picture.mode == "RGB"
    assert 1200 < picture.width < 3200
    assert 1000 < picture.height < 2000


def test_a_slide_without_tissue_is_drawn():
    grid = Grid.over(4000, 3000, 0.25, 0.25, 8.0)
    nothing = TissueMask(np.zeros(grid.box.shape, bool), grid)
    picture = draw_overlay(made_meta(4000, 3000), nothing, lambda: [], glass)
    assert picture.width > 1200


def test_nuclei_without_a_type_are_in_the_legend_and_outlined_in_a_colour_of_their_own():
    meta = replace(
        made_meta(4000, 3000), class_names=("background",), class_colours=COLOURS[:1], counts={"nucleus": 30}
    )
    nuclei = scattered(30, 4000, 3000)
    i = nuclei.schema.get_field_index("type_id")
    nuclei = nuclei.set_column(i, nuclei.schema.field(i), pa.array(np.zeros(30, np.uint8)))
    picture = draw_overlay(meta, everywhere(4000, 3000), lambda: [nuclei], glass)
    assert (np.asarray(picture) == overlay.UNTYPED).all(axis=2).sum() > 500


def test_the_scanned_part_of_a_slide_is_what_is_shown():
    read = []

    def watched(box: Box, grid: Grid) -> np.ndarray:
        read.append((box, grid))
        return glass(box, grid)

    meta = made_meta(40_000, 30_000, Box(10_000, 5_000, 30_000, 15_000))
    draw_overlay(meta, everywhere(40_000, 30_000), lambda: [], watched)
    ((box, grid),) = read
    corners = grid.to_px0([(box.x0, box.y0), (box.x1, box.y1)])
    assert np.abs(corners - [(10_000, 5_000), (30_000, 15_000)]).max() < grid.scale_x


def test_an_outline_lies_on_the_edge_of_its_nucleus_in_the_colour_of_its_type():
    def square(box: Box, grid: Grid) -> np.ndarray:
        """Dark from 100 to 140 px, the rest glass."""
        image = glass(box, grid)
        place = Box(100, 100, 140, 140).within(box).clipped(Box(0, 0, *box.shape))
        image[place.slices] = 30
        return image

    nuclei = made_nuclei([[120.0, 120.0]])
    i = nuclei.schema.get_field_index("geometry")
    nuclei = nuclei.set_column(i, nuclei.schema.field(i), pa.array([shapely.to_wkb(shapely.box(100, 100, 140, 140))]))
    colour = COLOURS[nuclei["type_id"][0].as_py()]
    (image,) = overlay._outlined([Box(0, 0, FIELD, FIELD)], made_meta(), lambda: [nuclei], square)
    line = (np.abs(image.astype(int) - colour) < 60).all(axis=2)
    rows, columns = np.nonzero(line)
    assert {int(rows.min()), int(columns.min())} <= {98, 99}
    assert {int(rows.max()), int(columns.max())} <= {140, 141}
    assert not line[103:137, 103:137].any()
    assert (image[110:130, 110:130] == 30).all()


def test_fields_are_dense_apart_and_within_the_slide():
    grid = Grid.over(12_100, 9_100, 0.25, 0.25, 0.25)
    cells = np.ones((22, 29))
    crowds = [(2, 3), (2, 4), (19, 26), (3, 25), (18, 2), (21, 28), (10, 14)]
    for crowd in crowds:
        cells[crowd] = 100
    fields = overlay.choose_fields(cells, grid)
    assert len(set(fields)) == 6
    for field in fields:
        assert field == field.clipped(grid.box)
        assert field.shape == (FIELD, FIELD)
        assert (-(-field.y0 // FIELD), -(-field.x0 // FIELD)) in crowds
    assert fields == sorted(fields, key=lambda field: (-(-field.y0 // FIELD), field.x0))


def test_the_density_of_an_even_slide_is_even_up_to_the_edge_of_the_tissue():
    meta = made_meta(8000, 6000)
    view = overlay.View.of(meta, 800, 600)
    covered = np.zeros(view.box.shape, bool)
    covered[100:400, 200:600] = True
    per_pixel = 3000 * view.grid.pixel_um2 / 1e6
    density = overlay.density_of(np.where(covered, per_pixel, 0.0), covered, view)
    assert np.allclose(density[covered], 3000)
    assert not density[~covered].any()


def test_nuclei_are_counted_where_they_lie_batch_by_batch():
    meta = made_meta(4000, 3000)
    view = overlay.View.of(meta, 400, 300)
    batches = [made_nuclei([[5, 5], [3995, 2995]]), made_nuclei([[2005, 1505], [2006, 1506], [-30, 9000]])]
    by_pixel, by_field = overlay.count_nuclei(meta, lambda: batches, view)
    assert by_pixel[0, 0] == 1
    assert by_pixel[-1, -1] == 1
    assert by_pixel[150, 200] == 2
    assert by_pixel.sum() == 4
    assert by_field[1505 // FIELD, 2005 // FIELD] == 2


def test_the_tissue_mask_is_laid_on_the_view_where_it_belongs():
    meta = made_meta(6400, 6400)
    grid = Grid.over(6400, 6400, 0.25, 0.25, 8.0)
    mask = np.zeros(grid.box.shape, bool)
    mask[50:100, 100:150] = True
    view = overlay.View.of(meta, 400, 400)
    rows, columns = np.nonzero(overlay.tissue_on_view(TissueMask(mask, grid), view))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (100, 200, 200, 300)


@pytest.mark.parametrize(
    ("value", "below", "above"),
    [(1, 1, 1), (4.9, 2, 5), (5, 5, 5), (0.03, 0.02, 0.03), (99, 50, 100), (1234, 1000, 1500)],
)
def test_numbers_are_rounded_to_what_reads_well(value, below, above):
    assert overlay.nice(value) == pytest.approx(below)
    assert overlay.nice(value, up=True) == pytest.approx(above)


def test_names_in_any_script_are_drawn_without_complaint():
    meta: NucleiMeta = replace(made_meta(4000, 3000), slide="Präparat Ł 切片 µ² · 7")
    assert draw_overlay(meta, everywhere(4000, 3000), lambda: [], glass).height > 1000


def test_the_same_nuclei_give_the_same_picture():
    nuclei = scattered(200, 4000, 3000)
    assert drawn(nuclei, 4000, 3000).tobytes() == drawn(nuclei, 4000, 3000).tobytes()
