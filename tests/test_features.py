"""The table of nuclei: exact over blocks, outlines that hold, measures as a library takes them."""

import uuid
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_maps import SCENES, TYPES, at_the_edge, crowd, draw_ellipses, maps_of
from skimage.color import hed_from_rgb, separate_stains
from skimage.measure import regionprops

from wsipipe.config import NucleiConfig
from wsipipe.features import NUCLEI_SCHEMA, BlockQC, describe_nuclei, nuclei_of_block
from wsipipe.geometry import Box, Grid, partition
from wsipipe.maps import Maps

CONFIG = NucleiConfig()
any_size = partial(NucleiConfig, min_area_um2=0, small_area_um2=0)
ALL_SIZES = any_size()
PARITY = np.load(Path(__file__).parent / "data" / "parity" / "postproc.npz")


def grid_of(labels: npt.NDArray[Any], scale: float = 1.0) -> Grid:
    height, width = labels.shape
    return Grid(width, height, scale, scale, 0.25 / scale, 0.25 / scale)


def cut(maps: Maps, box: Box) -> Maps:
    part = (..., *box.slices)
    return Maps(maps.nuclei[part], maps.offsets[part], maps.types[part])


def in_blocks(
    maps: Maps, side: int, grid: Grid, config: NucleiConfig = CONFIG, rgb: npt.NDArray[np.uint8] | None = None
) -> tuple[pa.Table, BlockQC]:
    """All nuclei of a slide, block by block, in one order."""
    batches, qc = [], BlockQC()
    for core in partition(grid.box, side):
        read = core.grown(config.halo_px).clipped(grid.box)
        pixels = None if rgb is None else rgb[read.slices]
        batch, of_block = nuclei_of_block(cut(maps, read), read, core, grid, TYPES, "f00d", pixels, config)
        batches.append(batch)
        qc += of_block
    return pa.Table.from_batches(batches).combine_chunks().sort_by([("y_px0", "ascending"), ("x_px0", "ascending")]), qc


def described(
    labels: npt.NDArray[np.int32], maps: Maps | None = None, config: NucleiConfig = ALL_SIZES, **other: Any
) -> tuple[dict[str, Any], BlockQC]:
    """Columns of all nuclei of an instance map."""
    grid = other.pop("grid", grid_of(labels))
    maps = maps or maps_of(labels)
    given = {"rgb": None, "read": grid.box, "core": grid.box, "class_names": TYPES, "fingerprint": "f00d", **other}
    batch, qc = describe_nuclei(labels, maps, grid=grid, config=config, **given)
    columns = {name: batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names}
    return {**columns, "polygons": shapely.from_wkb(columns["geometry"])}, qc


# -- blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("scene", SCENES)
def test_many_blocks_give_the_nuclei_of_one_byte_for_byte(scene: str, noise: float) -> None:
    maps = maps_of(SCENES[scene](), noise, 3)
    grid = grid_of(maps.nuclei, 2.0)
    rgb = np.random.default_rng(0).integers(50, 255, (*maps.nuclei.shape, 3), np.uint8)
    whole, qc = in_blocks(maps, 1024, grid, rgb=rgb)
    assert qc.nuclei == len(whole) >= 20
    for side in (192, 256, 311, 512):
        parts, in_parts = in_blocks(maps, side, grid, rgb=rgb)
        assert parts.equals(whole)
        assert (in_parts.nuclei, in_parts.small, in_parts.invalid) == (qc.nuclei, qc.small, qc.invalid)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(192, 500), st.sampled_from([24.0, 30.0]), st.sampled_from([0.0, 0.2]))
def test_no_block_size_changes_a_nucleus(seed: int, side: int, spacing: float, noise: float) -> None:
    maps = maps_of(crowd((450, 500), spacing, seed), noise, seed)
    grid = grid_of(maps.nuclei)
    assert in_blocks(maps, side, grid)[0].equals(in_blocks(maps, 512, grid)[0])


def test_a_nucleus_larger_than_a_block_is_whole() -> None:
    maps = maps_of(draw_ellipses((400, 420), [(200, 210, 60, 50, 0.4), (330, 120, 14, 12, 0)]))
    grid = grid_of(maps.nuclei)
    whole, _ = in_blocks(maps, 512, grid)
    parts, qc = in_blocks(maps, 64, grid)
    assert len(whole) == 2
    assert parts.equals(whole)
    assert qc.wide == 0


def test_a_nucleus_too_wide_for_the_halo_is_reported() -> None:
    maps = maps_of(draw_ellipses((600, 600), [(300, 300, 180, 150, 0)]))
    assert in_blocks(maps, 192, grid_of(maps.nuclei))[1].wide > 0
    assert in_blocks(maps, 600, grid_of(maps.nuclei))[1].wide == 0


def test_only_what_is_too_wide_for_the_halo_differs_between_blocks() -> None:
    places = [(x, y) for x in range(25, 1000, 55) for y in range(25, 900, 55)]
    around = [(x, y) for x, y in places if ((x - 500) / 290) ** 2 + ((y - 450) / 250) ** 2 > 1]
    maps = maps_of(draw_ellipses((900, 1000), [(500, 450, 260, 220, 0), *((x, y, 14, 11, 0.6) for x, y in around)]))
    grid = grid_of(maps.nuclei)
    whole, parts = in_blocks(maps, 1024, grid)[0], in_blocks(maps, 192, grid)[0]
    giant = shapely.Point(0, 0).buffer(1, quad_segs=64)
    giant = shapely.transform(giant, lambda xy: xy * (265, 225) + (500, 450))
    assert not parts.equals(whole)
    for nuclei in (whole, parts):
        assert nuclei.num_rows > len(around)
    beside = [~shapely.intersects(shapely.from_wkb(nuclei["geometry"].to_numpy()), giant) for nuclei in (whole, parts)]
    whole, parts = (nuclei.filter(pa.array(keep)) for nuclei, keep in zip((whole, parts), beside, strict=True))
    assert whole.num_rows == len(around)
    assert parts.equals(whole)


def test_what_was_read_beyond_the_slide_is_not_looked_at() -> None:
    maps = maps_of(at_the_edge()[:300, :300])
    grid = grid_of(maps.nuclei)
    outside = ((0, 0), (128, 128), (128, 128))
    padded = Maps(*(np.pad(m, outside[-m.ndim :], constant_values=77) for m in (maps.nuclei, maps.offsets, maps.types)))
    batch, qc = nuclei_of_block(padded, grid.box.grown(128), grid.box, grid, TYPES, "f00d", None, CONFIG)
    inside, qc_inside = nuclei_of_block(maps, grid.box, grid.box, grid, TYPES, "f00d", None, CONFIG)
    assert batch.equals(inside)
    assert qc == qc_inside


def test_the_published_way_has_whole_nuclei_too() -> None:
    maps = maps_of(crowd((300, 300), 28, 9), noise=0.3)
    maps.nuclei[::19, ::17] = 0  # holes, which that way leaves open
    grid, config = grid_of(maps.nuclei), NucleiConfig(hv_scale="tile")
    batch, qc = nuclei_of_block(maps, grid.box, grid.box, grid, TYPES, "f00d", None, config)
    polygons = shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False))
    assert qc.nuclei == batch.num_rows > 50
    assert qc.invalid == 0
    np.testing.assert_allclose(shapely.area(polygons), batch["area_um2"].to_numpy() * 16, rtol=0.1)


def test_a_block_without_nuclei_is_an_empty_table() -> None:
    nothing = Maps(np.zeros((64, 64), np.uint8), np.zeros((2, 64, 64), np.int8), np.zeros((4, 64, 64), np.uint8))
    box = Box(0, 0, 64, 64)
    batch, qc = nuclei_of_block(nothing, box, box, Grid(64, 64, 1, 1, 0.25, 0.25), TYPES, "f00d", None, CONFIG)
    assert batch.schema.equals(NUCLEI_SCHEMA)
    assert (batch.num_rows, qc) == (0, BlockQC())


# -- outlines -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes() -> npt.NDArray[np.int32]:
    return crowd((500, 500), 27, 6)


@pytest.mark.parametrize("scale", [0.37, 1.0, 1.98, 4.0])
def test_every_outline_is_valid_at_level_0_with_one_decimal(shapes: npt.NDArray[np.int32], scale: float) -> None:
    columns, qc = described(shapes, grid=grid_of(shapes, scale))
    assert qc.invalid == 0
    assert qc.nuclei == shapes.max()
    assert shapely.is_valid(columns["polygons"]).all()
    assert (shapely.get_num_interior_rings(columns["polygons"]) == 0).all()
    points = shapely.get_coordinates(columns["polygons"])
    np.testing.assert_array_equal(points, np.round(points, 1))
    count = shapely.get_num_coordinates(columns["polygons"]) - 1
    assert 12 <= count.mean() <= 20


def test_an_outline_not_simplified_has_the_area_of_its_pixels(shapes: npt.NDArray[np.int32]) -> None:
    columns, _ = described(shapes, config=any_size(simplify_px=0))
    np.testing.assert_array_equal(shapely.area(columns["polygons"]), columns["area_um2"] * 16)


@pytest.mark.parametrize("bound", [0.3, 0.5, 1.0])
def test_no_middle_of_an_edge_is_farther_from_the_outline_than_the_bound(
    shapes: npt.NDArray[np.int32], bound: float
) -> None:
    simple = described(shapes, config=any_size(simplify_px=bound))[0]["polygons"]
    full = described(shapes, config=any_size(simplify_px=0))[0]["polygons"]
    for outline, pixels in zip(simple, full, strict=True):
        edges = shapely.segmentize(pixels.exterior, 1.0)
        middles = [((x + u) / 2, (y + v) / 2) for (x, y), (u, v) in pairwise(edges.coords)]
        assert shapely.distance(shapely.points(middles), outline.exterior).max() <= bound + 0.1  # rounded to 0.1


def test_simplification_keeps_the_area_in_the_mean(shapes: npt.NDArray[np.int32]) -> None:
    columns, _ = described(shapes, config=CONFIG)
    ratio = shapely.area(columns["polygons"]) / (columns["area_um2"] * 16)
    assert abs(ratio.mean() - 1) < 0.005
    assert abs(ratio - 1).max() < 0.1


def test_an_outline_lies_where_its_pixels_lie() -> None:
    labels = np.zeros((30, 40), np.int32)
    labels[3:6, 2:5] = 1
    columns, _ = described(labels, config=any_size(simplify_px=0), grid=grid_of(labels, 2.0))
    assert columns["polygons"][0].bounds == (4, 6, 10, 12)
    assert (columns["x_px0"][0], columns["y_px0"][0]) == (7, 9)
    assert (columns["x_um"][0], columns["y_um"][0]) == (0.875, 1.125)


def test_holes_are_filled_and_what_lies_in_them_is_part_of_the_nucleus() -> None:
    labels = draw_ellipses((120, 120), [(60, 60, 40, 40, 0)])
    labels[50:70, 50:70] = 0
    labels[55:65, 55:65] = 2
    columns, qc = described(labels)
    full = draw_ellipses((120, 120), [(60, 60, 40, 40, 0)])
    assert qc.nuclei == 1
    assert columns["area_um2"][0] == full.sum() / 16
    assert columns["area_um2"][0] == pytest.approx(columns["polygons"][0].area / 16, rel=0.01)


def test_of_a_nucleus_in_pieces_the_largest_is_kept() -> None:
    labels = np.zeros((80, 80), np.int32)
    labels[10:14, 10:14] = 1
    labels[14:34, 14:34] = 1  # touches the first piece at a corner only
    labels[60:70, 60:70] = 1
    columns, qc = described(labels)
    assert qc.nuclei == 1
    assert columns["area_um2"][0] == 25
    assert columns["polygons"][0].bounds == (14, 14, 34, 34)


def test_a_ring_closed_by_a_corner_is_filled() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[5:10, 5:10] = 1
    labels[6:9, 6:9] = 0
    labels[5, 5] = 0  # open only across the corner, where two pixels still touch
    columns, qc = described(labels)
    assert qc.invalid == 0
    assert columns["area_um2"][0] == 24 / 16
    assert columns["polygons"][0].is_valid


@given(st.integers(0, 10**6), st.floats(0.3, 0.9))
@settings(max_examples=40)
def test_the_wildest_shapes_have_valid_outlines_of_their_own_area(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random((24, 24)) < share).astype(np.int32) * rng.integers(1, 4, (24, 24)).astype(np.int32)
    for simplify in (0.0, 0.5, 1.0):
        config = any_size(simplify_px=simplify)
        columns, qc = described(labels, config=config, grid=grid_of(labels, 1.98))
        assert qc.invalid == 0
        assert shapely.is_valid(columns["polygons"]).all()
        if not simplify:
            unit = 0.25**2 / (1.98**2)
            np.testing.assert_allclose(shapely.area(columns["polygons"]) * unit, columns["area_um2"], rtol=0.1)


# -- measures -----------------------------------------------------------------------------------------------------


def test_measures_are_those_of_scikit_image(shapes: npt.NDArray[np.int32]) -> None:
    columns, _ = described(shapes)
    props = regionprops(shapes, spacing=(0.25, 0.25))
    props.sort(key=lambda p: p.centroid)
    for name, ours, rel in (
        ("area", "area_um2", 1e-6),
        ("axis_major_length", "major_axis_um", 1e-5),
        ("axis_minor_length", "minor_axis_um", 1e-5),
        ("eccentricity", "eccentricity", 1e-4),
    ):
        np.testing.assert_allclose(columns[ours], [p[name] for p in props], rtol=rel)
    np.testing.assert_allclose(columns["y_um"], [p.centroid[0] + 0.125 for p in props])
    np.testing.assert_allclose(columns["x_um"], [p.centroid[1] + 0.125 for p in props])
    np.testing.assert_allclose(columns["perimeter_um"], [p.perimeter_crofton for p in props], rtol=0.12)
    assert columns["perimeter_um"].mean() == pytest.approx(np.mean([p.perimeter_crofton for p in props]), rel=0.03)
    np.testing.assert_allclose(columns["solidity"], [p.solidity for p in props], atol=0.08)
    assert ((columns["solidity"] > 0.8) & (columns["solidity"] <= 1)).all()


@pytest.mark.parametrize("simplify", [0.0, 0.5])
def test_solidity_perimeter_and_bytes_are_those_that_shapely_gives(
    shapes: npt.NDArray[np.int32], simplify: float
) -> None:
    config = any_size(simplify_px=simplify)
    columns, _ = described(shapes, config=config, grid=grid_of(shapes, 2.0))  # at which rounding changes nothing
    polygons = columns["polygons"]
    solidity = shapely.area(polygons) / shapely.area(shapely.convex_hull(polygons))
    np.testing.assert_allclose(columns["solidity"], solidity, rtol=1e-6)
    np.testing.assert_allclose(columns["perimeter_um"], shapely.length(polygons) * 0.125, rtol=1e-6)
    assert columns["geometry"].tolist() == shapely.to_wkb(polygons).tolist()


def test_unequal_pixels_are_measured_as_they_are() -> None:
    labels = draw_ellipses((100, 200), [(100, 50, 60, 30, 0)])
    columns, _ = described(labels, grid=Grid(200, 100, 1, 1, 0.25, 0.5))
    assert columns["major_axis_um"][0] == pytest.approx(30, rel=0.01)
    assert columns["minor_axis_um"][0] == pytest.approx(30, rel=0.01)
    assert columns["area_um2"][0] == labels.sum() * 0.125
    assert columns["perimeter_um"][0] == pytest.approx(np.pi * 30, rel=0.04)
    assert columns["circularity"][0] == pytest.approx(0.95, abs=0.05)


def test_the_perimeter_of_a_disc_is_right_to_four_percent() -> None:
    labels = draw_ellipses((100, 100), [(50.3, 49.8, 20, 20, 0)])
    columns, _ = described(labels)
    assert columns["perimeter_um"][0] == pytest.approx(2 * np.pi * 20 * 0.25, rel=0.04)


def test_stains_are_those_of_ruifrok_and_johnston(shapes: npt.NDArray[np.int32]) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (*shapes.shape, 3), np.uint8)
    columns, _ = described(shapes, rgb=rgb)
    density = 6 * separate_stains(rgb, hed_from_rgb)
    props = sorted(regionprops(shapes, density), key=lambda p: p.centroid)
    means = np.array([p.intensity_mean for p in props])
    np.testing.assert_allclose(columns["hematoxylin_mean"], means[:, 0], rtol=1e-5)
    np.testing.assert_allclose(columns["eosin_mean"], means[:, 1], rtol=1e-5)


def test_without_pixels_stains_are_null(shapes: npt.NDArray[np.int32]) -> None:
    columns, _ = described(shapes)
    assert np.isnan(columns["hematoxylin_mean"]).all()
    assert np.isnan(columns["eosin_mean"]).all()


# -- types --------------------------------------------------------------------------------------------------------


def typed(*values: int) -> dict[str, Any]:
    """The one nucleus of a map whose NC is the same at every pixel."""
    labels = np.zeros((20, 20), np.int32)
    labels[5:15, 5:15] = 1
    maps = maps_of(labels)
    types = np.repeat(np.array(values, np.uint8), 400).reshape(len(values), 20, 20)
    return described(labels, Maps(np.full((20, 20), 204, np.uint8), maps.offsets, types))[0]


def test_the_type_is_the_class_with_most_of_the_nucleus() -> None:
    columns = typed(10, 20, 51, 30)
    assert columns["type"][0] == "inflammatory"
    assert columns["type_id"][0] == 2
    assert columns["type_probability"][0] == pytest.approx(0.2)
    assert columns["probability"][0] == pytest.approx(0.8)


def test_background_loses_to_the_best_real_type() -> None:
    assert typed(250, 0, 0, 1)["type"][0] == "connective"


def test_a_nucleus_of_background_alone_stays_that() -> None:
    assert typed(250, 0, 0, 0)["type_id"][0] == 0


@pytest.mark.parametrize("values", [(), (200,)])
def test_a_network_without_types_finds_nuclei(values: tuple[int, ...]) -> None:
    columns = typed(*values)
    assert (columns["type"][0], columns["type_id"][0]) == ("nucleus", 0)
    assert np.isnan(columns["type_probability"][0])


@pytest.mark.parity
@pytest.mark.parametrize("case", ["p40_dense", "p40_noisy", "p20_small", "p40_rect", "p20_rect", "p40_bgtype"])
def test_types_are_the_published_ones(case: str) -> None:
    pred, labels = PARITY[f"{case}.pred_map"], PARITY[f"{case}.inst"]
    types = (pred[..., 0] == np.arange(PARITY[f"{case}.nr_types"])[:, None, None]) * np.uint8(255)
    maps = Maps((pred[..., 1] * 255).astype(np.uint8), np.zeros((2, *labels.shape), np.int8), types)
    names = [str(k) for k in range(len(types))]
    ids, centre = PARITY[f"{case}.ids"], PARITY[f"{case}.centroid"]
    for i, kind, share in zip(ids, PARITY[f"{case}.type"], PARITY[f"{case}.type_prob"], strict=True):
        columns, _ = described(np.where(labels == i, labels, 0), maps, class_names=names)
        assert columns["type_id"][0] == kind
        if len(regionprops((labels == i).astype(int))) == 1 and columns["area_um2"][0] * 16 == (labels == i).sum():
            assert columns["type_probability"][0] == pytest.approx(share, abs=1e-6)
    assert len(centre) == len(ids)


def test_names_must_fit_the_types(shapes: npt.NDArray[np.int32]) -> None:
    with pytest.raises(ValueError, match="3 names do not fit 4 channels"):
        described(shapes, class_names=TYPES[:3])


def test_arrays_must_lie_on_their_box(shapes: npt.NDArray[np.int32]) -> None:
    with pytest.raises(ValueError, match="do not lie on a box"):
        described(shapes, read=Box(0, 0, 500, 400))
    with pytest.raises(ValueError, match="do not lie on a box"):
        described(shapes, rgb=np.zeros((10, 500, 3), np.uint8))


# -- which and what -----------------------------------------------------------------------------------------------


def test_ids_are_uuid5_of_the_slide_and_the_centroid_in_tenths_of_a_pixel(shapes: npt.NDArray[np.int32]) -> None:
    columns, _ = described(shapes)
    slide = uuid.uuid5(uuid.NAMESPACE_OID, "f00d")
    for text, x, y in zip(columns["id"], columns["x_px0"], columns["y_px0"], strict=True):
        assert text == str(uuid.uuid5(slide, f"{round(x * 10)},{round(y * 10)}"))
    assert len(set(columns["id"])) == len(columns["id"])
    assert described(shapes, fingerprint="other")[0]["id"][0] != columns["id"][0]


def test_rows_are_sorted_by_centroid(shapes: npt.NDArray[np.int32]) -> None:
    columns, _ = described(shapes)
    places = list(zip(columns["y_px0"], columns["x_px0"], strict=True))
    assert places == sorted(places)


def test_small_nuclei_are_left_out_and_counted_unless_they_are_certain() -> None:
    config = NucleiConfig(min_area_um2=3, small_area_um2=6, small_probability=0.9)
    sides = {"large": 10, "small": 8, "tiny": 4}  # 0.25 µm each: 6.25, 4 and 1 µm²
    for certainty, kept in ((0.95, ["large", "small"]), (0.9, ["large", "small"]), (0.85, ["large"])):
        labels = np.zeros((30, 90), np.int32)
        for place, side in enumerate(sides.values()):
            labels[5 : 5 + side, 5 + 30 * place : 5 + 30 * place + side] = place + 1
        maps = replace(maps_of(labels), nuclei=np.where(labels > 0, round(255 * certainty + 0.3), 0).astype(np.uint8))
        columns, qc = described(labels, maps, config=config)
        areas = sorted((sides[name] / 4) ** 2 for name in kept)
        assert sorted(columns["area_um2"]) == pytest.approx(areas)
        assert (qc.nuclei, qc.small) == (len(kept), 3 - len(kept))


def test_nothing_is_counted_of_nuclei_whose_centroid_lies_outside_the_region() -> None:
    nuclei = [(40, 60, 3, 3, 0), (90, 60, 12, 10, 0), (150, 60, 12, 10, 0), (210, 60, 3, 3, 0)]
    labels = draw_ellipses((120, 260), nuclei)
    maps, grid = maps_of(labels), grid_of(labels, 2.0)
    everywhere, _ = describe_nuclei(labels, maps, grid.box, grid.box, grid, TYPES, "f00d", None, NucleiConfig())
    inside, qc = describe_nuclei(
        labels, maps, grid.box, grid.box, grid, TYPES, "f00d", None, NucleiConfig(), shapely.box(0, 0, 240, 240)
    )
    assert len(everywhere) == 2
    assert inside["id"].to_pylist() == everywhere["id"].to_pylist()[:1]
    assert (qc.nuclei, qc.small) == (1, 1)
    seen, narrow = Box(0, 0, 160, 120), NucleiConfig(halo_px=8)
    part = cut(maps, seen)
    arguments = (labels[seen.slices], part, seen, seen, grid, TYPES, "f00d", None, narrow)
    assert describe_nuclei(*arguments)[1].wide == 1  # the one at the border of what was read
    assert describe_nuclei(*arguments, shapely.box(0, 0, 240, 240))[1].wide == 0


def test_only_nuclei_whose_centroid_lies_in_the_core_are_there() -> None:
    labels = draw_ellipses((100, 100), [(30, 30, 10, 10, 0), (70, 30, 10, 10, 0)])
    columns, _ = described(labels, core=Box(0, 0, 69, 100))
    assert len(columns["id"]) == 1
    assert columns["x_px0"][0] == pytest.approx(30, abs=0.5)
