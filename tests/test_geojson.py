"""GeoJSON for QuPath: every rule that its readers enforce, on every file that we write."""

import gzip
import json
import math
import re
import runpy
import uuid
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_nuclei import CLASSES, COLOURS, made_meta, made_nuclei, with_surroundings

from wsipipe import geojson
from wsipipe.errors import ConfigError
from wsipipe.geojson import MEASUREMENTS, encode_features, write_geojson
from wsipipe.geometry import Box
from wsipipe.table import NucleiSpool, read_nuclei

CHECKER = Path(__file__).parents[2] / "shared" / "qupath" / "check_geojson.py"


def scattered(n: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(100, (40_000, 30_000), (n, 2)).round(1)


def made_table(folder: Path, nuclei: pa.RecordBatch, **meta) -> Path:
    spool = NucleiSpool(folder / "nuclei.parquet", replace(made_meta(), **meta), {})
    spool.add(0, nuclei)
    spool.finish([0])
    return spool.path


def changed(nuclei: pa.RecordBatch, **columns) -> pa.RecordBatch:
    for name, values in columns.items():
        i = nuclei.schema.get_field_index(name)
        nuclei = nuclei.set_column(i, nuclei.schema.field(i), pa.array(values, nuclei.schema.field(i).type))
    return nuclei


def loaded(path: Path) -> dict:
    """The collection, once it has been seen to be strict JSON without a null in it."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()

    def refused(token):
        raise AssertionError(f"{token} is no JSON")

    value = json.loads(raw.decode("utf-8"), parse_constant=refused)
    assert "null" not in re.findall(r'"(?:[^"\\]|\\.)*"|null', raw.decode("utf-8"))
    assert value["type"] == "FeatureCollection"
    return value


def check(feature: dict) -> None:
    """The rules of QuPath 0.4 to 0.7 for one nucleus."""
    assert list(feature) == ["type", "id", "geometry", "properties"]
    assert feature["type"] == "Feature"
    assert str(uuid.UUID(feature["id"])) == feature["id"]
    geometry, properties = feature["geometry"], feature["properties"]
    assert properties["objectType"] == "detection"
    assert set(properties) <= {"objectType", "classification", "measurements"}
    if "classification" in properties:
        assert properties["classification"]["name"].strip()
        colour = properties["classification"]["color"]
        assert len(colour) == 3
        assert all(isinstance(value, int) and 0 <= value <= 255 for value in colour)
    names = [name for _, name, _ in MEASUREMENTS]
    assert list(properties["measurements"]) == [name for name in names if name in properties["measurements"]]
    assert all(math.isfinite(value) and not isinstance(value, bool) for value in properties["measurements"].values())
    if geometry["type"] == "Polygon":
        (ring,) = geometry["coordinates"]
        assert ring[0] == ring[-1]
        assert len({tuple(point) for point in ring}) >= 3
        assert shapely.geometry.shape(geometry).is_valid
    numbers = np.ravel(geometry["coordinates"])
    assert np.allclose(numbers, np.round(numbers, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("ending", [".geojson", ".geojson.gz"])
@pytest.mark.parametrize("form", ["outlines", "centroids"])
def test_every_nucleus_is_written_by_the_rules_of_qupath(tmp_path, form, ending):
    nuclei = made_nuclei(scattered(200))
    path = tmp_path / f"nuclei{ending}"
    table = made_table(tmp_path, nuclei)
    summary = write_geojson(table, path, form=form)
    assert (summary.files, summary.nuclei, summary.dropped) == ((path,), 200, 0)
    features = {feature["id"]: feature for feature in loaded(path)["features"]}
    assert len(features) == 200
    for row in pa.Table.from_batches(read_nuclei(table)[1]).to_pylist():
        feature = features[row["id"]]
        check(feature)
        properties = feature["properties"]
        assert properties["classification"] == {"name": row["type"], "color": list(COLOURS[row["type_id"]])}
        assert list(properties["measurements"]) == [name for _, name, _ in MEASUREMENTS]
        for column, name, decimals in MEASUREMENTS:
            assert properties["measurements"][name] == pytest.approx(row[column], abs=0.5000001 * 10.0**-decimals)
        if form == "outlines":
            assert shapely.equals(shapely.geometry.shape(feature["geometry"]), shapely.from_wkb(row["geometry"]))
        else:
            assert feature["geometry"] == {"type": "Point", "coordinates": [row["x_px0"], row["y_px0"]]}


@pytest.mark.skipif(not CHECKER.exists(), reason="the checker that was compared with QuPath's own reader is not here")
@pytest.mark.parametrize("form", ["outlines", "centroids", "overview"])
def test_the_checker_of_qupaths_rules_has_nothing_to_say(tmp_path, form):
    nuclei = made_nuclei(scattered(300))
    nuclei = changed(nuclei, solidity=[math.nan] * 300)
    path = tmp_path / "nuclei.geojson.gz"
    write_geojson(made_table(tmp_path, nuclei, bounds=Box(50, 60, 40_000, 30_000)), path, form=form)
    report = runpy.run_path(str(CHECKER))["check_file"](path)
    assert not report.n
    assert report.features == (3 if form == "overview" else 300)


@settings(max_examples=60, deadline=None)
@given(
    rings=st.lists(
        st.lists(st.tuples(st.floats(-50, 2e5), st.floats(-50, 2e5)), min_size=3, max_size=9), min_size=1, max_size=8
    ),
    value=st.floats(width=32),
    offset=st.tuples(st.integers(-1000, 100_000), st.integers(0, 100_000)),
)
def test_whatever_the_outlines_and_values_what_is_written_is_good_and_what_is_not_is_counted(rings, value, offset):
    nuclei = made_nuclei([[i, i] for i in range(len(rings))])
    nuclei = changed(nuclei, geometry=list(shapely.to_wkb([shapely.Polygon(ring) for ring in rings])))
    nuclei = changed(nuclei, circularity=[value] * len(rings))
    text, kept = encode_features(with_surroundings(nuclei), made_meta(), "outlines", offset)
    features = json.loads(b"[" + text + b"]")
    assert len(features) == kept
    expected = [shapely.Polygon(np.round(ring, 1)) for ring in rings]
    assert kept == sum(bool(shape.is_valid and shape.area >= 0.01) for shape in expected)
    for feature in features:
        check(feature)
        assert ("Nucleus: Circularity" in feature["properties"]["measurements"]) == (abs(value) < 1e12)


@settings(max_examples=300, deadline=None)
@given(st.integers(-(10**15), 10**15), st.integers(0, 4))
def test_numbers_are_written_as_python_would(value, decimals):
    out = np.zeros(40, np.uint8)
    text = out[: geojson._put_decimal(out, 0, value, decimals)].tobytes().decode()
    assert json.loads(text) == value / 10**decimals
    assert "." not in text or not text.endswith("0")


def test_a_value_that_is_not_finite_is_left_out_and_the_others_keep_their_order(tmp_path):
    nuclei = changed(made_nuclei(scattered(3)), area_um2=[math.nan, math.inf, 5], eosin_mean=[math.nan] * 3)
    path = tmp_path / "nuclei.geojson"
    write_geojson(made_table(tmp_path, nuclei), path)
    for feature in loaded(path)["features"]:
        check(feature)
    areas = ["Nucleus: Area µm^2" in feature["properties"]["measurements"] for feature in loaded(path)["features"]]
    assert sorted(areas) == [False, False, True]


def test_an_outline_that_qupath_would_refuse_is_dropped_counted_and_told(tmp_path, caplog):
    bow_tie = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    thin = shapely.Polygon([(0, 0), (10, 0), (10, 0.04)])
    two = shapely.MultiPolygon([shapely.box(0, 0, 4, 4), shapely.box(8, 8, 9, 9)])
    good = shapely.box(3, 3, 9, 9)
    shapes = [bow_tie, thin, two, shapely.Polygon(), good]
    nuclei = changed(made_nuclei(scattered(5)), geometry=list(shapely.to_wkb(shapes)))
    path = tmp_path / "nuclei.geojson"
    summary = write_geojson(made_table(tmp_path, nuclei), path)
    assert (summary.nuclei, summary.dropped) == (1, 4)
    assert "lacks 4 nuclei" in caplog.text
    (feature,) = loaded(path)["features"]
    assert shapely.equals(shapely.geometry.shape(feature["geometry"]), good)


def test_the_corner_of_the_bounds_is_subtracted_unless_told_otherwise_and_recorded(tmp_path):
    nuclei = made_nuclei([[1000.5, 2000.5]])
    table = made_table(tmp_path, nuclei, bounds=Box(700, 900, 20_000, 20_000))
    for given_offset, used in ((None, (700, 900)), ((0, 0), (0, 0)), ((2000, 1), (2000, 1))):
        for form in ("centroids", "overview"):
            path = tmp_path / "nuclei.geojson"
            write_geojson(table, path, form=form, offset=given_offset)
            collection = loaded(path)
            assert collection["wsipipe"]["offset_px0"] == list(used)
            point = np.ravel(collection["features"][0]["geometry"]["coordinates"])
            assert point.tolist() == [1000.5 - used[0], 2000.5 - used[1]]


def test_the_file_says_what_it_is_made_of(tmp_path):
    path = tmp_path / "nuclei.geojson"
    write_geojson(made_table(tmp_path, made_nuclei(scattered(2)), model={"name": "m", "licence": None}), path)
    provenance = loaded(path)["wsipipe"]
    assert provenance["slide"] == "made up µ.svs"
    assert provenance["fingerprint"] == "c0ffee"
    assert provenance["model"] == {"name": "m"}
    assert provenance["versions"] == {"wsipipe": "0.1.0"}


@pytest.mark.parametrize("form", ["outlines", "centroids", "overview"])
def test_a_slide_without_nuclei_gives_a_valid_empty_collection(tmp_path, form):
    path = tmp_path / "nuclei.geojson.gz"
    summary = write_geojson(made_table(tmp_path, made_nuclei([])), path, form=form)
    assert loaded(path)["features"] == []
    assert summary.nuclei == 0


def test_geopandas_reads_it_as_it_is(tmp_path):
    nuclei = made_nuclei(scattered(40))
    path = tmp_path / "nuclei.geojson"
    write_geojson(made_table(tmp_path, nuclei), path)
    frame = geopandas.read_file(path)
    assert len(frame) == 40
    assert set(frame.geom_type) == {"Polygon"}
    assert set(frame["id"]) == set(nuclei["id"].to_pylist())


def test_a_type_without_name_or_colour_has_no_classification(tmp_path):
    nuclei = changed(made_nuclei(scattered(3)), type_id=[1, 2, 3])
    table = made_table(tmp_path, nuclei, class_names=("background", " ", 'a, "b" µ ', "c"), class_colours=COLOURS[:3])
    path = tmp_path / "nuclei.geojson"
    write_geojson(table, path)
    found = {f["id"]: f["properties"].get("classification") for f in loaded(path)["features"]}
    assert [found[i] for i in nuclei["id"].to_pylist()] == [None, {"name": 'a, "b" µ', "color": list(COLOURS[2])}, None]
    for feature in loaded(path)["features"]:
        check(feature)


def test_an_overview_holds_every_centre_once_in_one_annotation_a_type(tmp_path, monkeypatch):
    monkeypatch.setattr("wsipipe.table.ROW_GROUP", 7)
    nuclei = made_nuclei(scattered(50))
    path = tmp_path / "nuclei.geojson"
    assert write_geojson(made_table(tmp_path, nuclei), path, form="overview", split=10).nuclei == 50
    features = loaded(path)["features"]
    assert [feature["properties"]["classification"]["name"] for feature in features] == list(CLASSES[1:])
    points = sorted(tuple(point) for feature in features for point in feature["geometry"]["coordinates"])
    assert points == sorted(zip(nuclei["x_px0"].to_pylist(), nuclei["y_px0"].to_pylist(), strict=True))
    assert {feature["properties"]["objectType"] for feature in features} == {"annotation"}


def test_an_overview_lacks_no_nucleus_without_a_type_where_a_class_has_its_name(tmp_path):
    nuclei = made_nuclei(scattered(50))
    ids = [i % 2 for i in range(50)]
    table = made_table(
        tmp_path,
        changed(nuclei, type=["nucleus"] * 50, type_id=ids),
        class_names=("background", "nucleus"),
        class_colours=COLOURS[:2],
    )
    path = tmp_path / "nuclei.geojson"
    assert write_geojson(table, path, form="overview").nuclei == 50
    assert [len(feature["geometry"]["coordinates"]) for feature in loaded(path)["features"]] == [25, 25]


@pytest.mark.parametrize("form", ["outlines", "centroids", "overview"])
def test_nuclei_of_a_network_without_types_have_no_classification_and_lose_nothing(tmp_path, form):
    nuclei = changed(made_nuclei(scattered(20)), type=["nucleus"] * 20, type_id=[0] * 20, type_probability=[None] * 20)
    path = tmp_path / "nuclei.geojson"
    table = made_table(tmp_path, nuclei, class_names=("background",), class_colours=COLOURS[:1])
    assert write_geojson(table, path, form=form).nuclei == 20
    features = loaded(path)["features"]
    assert len(features) == (1 if form == "overview" else 20)
    for feature in features:
        assert "classification" not in feature["properties"]
        assert "Type probability" not in feature["properties"].get("measurements", {})


@pytest.mark.parametrize(("split", "sizes"), [(20, [20, 20, 10]), (25, [25, 25]), (50, [50]), (49, [49, 1])])
def test_a_split_gives_whole_collections_that_together_hold_every_nucleus_once(tmp_path, monkeypatch, split, sizes):
    monkeypatch.setattr("wsipipe.geojson.ROWS", 8)
    nuclei = made_nuclei(scattered(50))
    table = made_table(tmp_path, nuclei)
    summary = write_geojson(table, tmp_path / "nuclei.geojson.gz", split=split)
    names = [path.name for path in summary.files]
    assert names == (
        ["nuclei.geojson.gz"] if len(sizes) == 1 else [f"nuclei-{i:03d}.geojson.gz" for i in range(1, len(sizes) + 1)]
    )
    parts = [loaded(path) for path in summary.files]
    assert [len(part["features"]) for part in parts] == sizes
    assert sorted(f["id"] for part in parts for f in part["features"]) == sorted(nuclei["id"].to_pylist())
    assert {path.name for path in tmp_path.iterdir()} == {*names, "nuclei.parquet"}


def test_many_nuclei_in_one_file_are_remarked_upon(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(geojson, "MANY", 10)
    table = made_table(tmp_path, made_nuclei(scattered(24)))
    write_geojson(table, tmp_path / "split.geojson", split=10)
    assert not caplog.records
    write_geojson(table, tmp_path / "whole.geojson")
    assert "--split 10" in caplog.text
    caplog.clear()
    write_geojson(table, tmp_path / "parts.geojson", split=12)
    assert "parts-001.geojson will hold 12 nuclei" in caplog.text


def test_the_same_table_gives_the_same_bytes_at_any_time_under_any_name(tmp_path):
    table = made_table(tmp_path, made_nuclei(scattered(30)))
    files = [write_geojson(table, tmp_path / name).files[0] for name in ("a.geojson.gz", "b.geojson.gz")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes()[4:8] == bytes(4)


@pytest.mark.parametrize("name", ["nuclei.json", "nuclei.geojson.zip", "nuclei", "nuclei.gz"])
def test_a_name_that_qupath_does_not_read_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"ends in \.geojson or \.geojson\.gz"):
        write_geojson(tmp_path / "nuclei.parquet", tmp_path / name)


def test_a_failure_leaves_no_file_behind(tmp_path, monkeypatch):
    table = made_table(tmp_path, made_nuclei(scattered(30)))
    monkeypatch.setattr(geojson, "encode_features", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_geojson(table, tmp_path / "nuclei.geojson", split=10)
    assert [path.name for path in tmp_path.iterdir()] == ["nuclei.parquet"]
