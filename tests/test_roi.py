"""Regions from QuPath, well-formed and not."""

import gzip
import json

import pytest
import shapely

from wsipipe.errors import ConfigError
from wsipipe.roi import read_roi

SQUARE = [[10, 10], [50, 10], [50, 50], [10, 50], [10, 10]]
HOLE = [[20, 20], [30, 20], [30, 30], [20, 30], [20, 20]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}
FEATURE = {
    "type": "Feature",
    "id": "PathAnnotationObject",
    "geometry": POLYGON,
    "properties": {"objectType": "annotation"},
}
FAR = {"type": "Polygon", "coordinates": [[[100, 100], [110, 100], [110, 110], [100, 110], [100, 100]]]}


@pytest.fixture
def saved(tmp_path):
    def save(content):
        path = tmp_path / "roi.geojson"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return save


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [FEATURE]},
        [FEATURE],
        FEATURE,
        POLYGON,
        {"type": "MultiPolygon", "coordinates": [POLYGON["coordinates"]]},
        {"type": "GeometryCollection", "geometries": [POLYGON]},
        gzip.compress(json.dumps(FEATURE).encode()),
        b"\xef\xbb\xbf" + json.dumps(FEATURE).encode(),
    ],
    ids=["collection", "list", "feature", "geometry", "multi", "geometries", "gzip", "byte order mark"],
)
def test_every_form_that_qupath_writes_gives_the_same_area_with_its_hole(saved, content):
    assert read_roi(saved(content)).equals(shapely.Polygon(SQUARE, [HOLE]))


def test_several_regions_are_joined(saved):
    region = read_roi(
        saved({"type": "FeatureCollection", "features": [FEATURE, {**FEATURE, "geometry": FAR}, FEATURE]})
    )
    assert region.geom_type == "MultiPolygon"
    assert region.area == 1500 + 100


def test_an_offset_is_added(saved):
    assert read_roi(saved(FEATURE), offset=(1000, -5)).bounds == (1010, 5, 1050, 45)


def test_a_third_coordinate_and_an_open_ring_are_taken(saved):
    ring = [[x, y, 0] for x, y in SQUARE[:-1]]
    assert read_roi(saved({"type": "Polygon", "coordinates": [ring]})).area == 1600


def test_a_ring_that_crosses_itself_is_repaired(saved):
    region = read_roi(saved({"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}))
    assert region.is_valid
    assert region.area == 50


def test_of_a_repair_only_areas_are_kept(saved):
    spike = [[0, 0], [10, 0], [10, 10], [10, 30], [10, 10], [0, 10], [0, 0]]
    region = read_roi(saved({"type": "Polygon", "coordinates": [spike]}))
    assert region.geom_type == "Polygon"
    assert region.area == 100


@pytest.mark.parametrize("kind", ["Point", "MultiPoint", "LineString", "MultiLineString"])
def test_what_has_no_area_is_refused_by_name(saved, kind):
    with pytest.raises(ConfigError, match=f"item 1 is a {kind}, which has no area"):
        read_roi(saved([FEATURE, {**FEATURE, "geometry": {"type": kind, "coordinates": [[1, 2], [3, 4]]}}]))


def ring_of(*points):
    return {"type": "Polygon", "coordinates": [list(points)]}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is not GeoJSON"),
        (b"not json", "is not GeoJSON"),
        (b"\xff\xfe\x00", "is not GeoJSON"),
        (b"\x1f\x8b", "damaged or incomplete"),
        (gzip.compress(json.dumps([FEATURE] * 50).encode())[:-20], "damaged or incomplete"),
        (b"\x1f\x8b" + b"garbage that is long enough to have a header", "cannot be"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"type": "Polygon", "coordinates": ' + b"[" * 900 + b"]" * 900 + b"}", "fewer than 3|pairs of numbers"),
        ({"type": "FeatureCollection", "features": []}, "holds no area"),
        ([], "holds no area"),
        ({"type": "Polygon", "coordinates": []}, "holds no area"),
        (ring_of([0, 0], [5, 0], [9, 0], [0, 0]), "holds no area"),
        ({"type": "FeatureCollection"}, "list of parts"),
        ({"type": "FeatureCollection", "features": {"a": 1}}, "list of parts"),
        ({"type": "Polygon"}, "list of parts"),
        ({"type": "MultiPolygon", "coordinates": 3}, "list of parts"),
        ({**FEATURE, "geometry": None}, "no GeoJSON geometry"),
        ({"type": "Circle"}, "no GeoJSON geometry"),
        ({"type": ["Polygon"]}, "no GeoJSON geometry"),
        (7, "no GeoJSON geometry"),
        (ring_of([0, 0], [1, 1]), "fewer than 3"),
        (ring_of([0, 0], [5, 0], [None, 5]), "pairs of numbers|finite"),
        (ring_of([0, 0], [5, 0], ["a", 5]), "pairs of numbers"),
        (ring_of([0, 0], [5, 0], [5]), "pairs of numbers"),
        (ring_of(1, 2, 3), "pairs of numbers"),
        (ring_of([0, 0], [5, 0], [float("nan"), 5]), "finite"),
        (ring_of([0, 0], [5, 0], [float("inf"), 5]), "finite"),
        (ring_of([0, 0], [5, 0], [10**400, 5]), "pairs of numbers"),
        (ring_of([0, 0], [5, 0], [1e9, 5]), "level-0 pixels"),
    ],
)
def test_a_file_that_does_not_say_what_it_should_is_refused(saved, content, fault):
    path = saved(content)
    with pytest.raises(ConfigError, match=fault) as caught:
        read_roi(path)
    assert str(path) in str(caught.value)


def test_a_file_that_unpacks_to_too_much_is_refused(saved, monkeypatch):
    monkeypatch.setattr("wsipipe.roi.MAX_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match="more than 1 MB"):
        read_roi(saved(gzip.compress(b" " * (2 << 20))))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_roi(tmp_path / "none.geojson")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_roi(tmp_path)


def test_a_hole_that_reaches_over_the_outline_adds_nothing(saved):
    hole = [[5, 2], [15, 2], [15, 8], [5, 8], [5, 2]]
    path = saved({"type": "Polygon", "coordinates": [[[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]], hole]})
    assert read_roi(path).area == pytest.approx(100 - 5 * 6)
