"""Two sets of nuclei to scores: those of the pixels, from any two kinds of file."""

import gzip
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_maps import crowd
from made_nuclei import CLASSES, made_meta, made_nuclei
from PIL import Image
from scipy.spatial import distance

from wsipipe import cli
from wsipipe.comparison import OutlinedNuclei, compare, pair_within, to_table
from wsipipe.errors import ConfigError, DataError, StoreError
from wsipipe.geojson import write_geojson
from wsipipe.geometry import Box
from wsipipe.metrics import UNKNOWN_TYPE, aggregated_jaccard, dice, panoptic_quality
from wsipipe.stages import compare as stage
from wsipipe.stages.compare import make_comparison, mask_outlines, read_features, read_nuclei_file
from wsipipe.table import NucleiSpool
from wsipipe.training.scores import TypedNuclei, score_image


def outlined(labels: npt.NDArray[np.int32], types: list[str] | None = None) -> OutlinedNuclei:
    outlines = mask_outlines(labels)
    return OutlinedNuclei(outlines, np.array(types or [""] * len(outlines), str))


def moved(labels: npt.NDArray[np.int32], seed: int) -> npt.NDArray[np.int32]:
    """The same nuclei shifted, some lost, some new."""
    rng = np.random.default_rng(seed)
    lost = rng.random(labels.max() + 1) < 0.2
    lost[0] = False
    found = np.roll(np.where(lost[labels], 0, labels), rng.integers(-4, 5, 2), (0, 1))
    return np.unique(found, return_inverse=True)[1].reshape(found.shape).astype(np.int32)


# -- scores -------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_scores_of_outlines_are_those_of_the_pixels(seed: int) -> None:
    true = crowd((160, 190), 27, seed)
    found = moved(true, seed)
    rng = np.random.default_rng(seed)
    kinds = [rng.integers(1, 3, labels.max()) for labels in (true, found)]
    of = compare(outlined(true, [f"t{k}" for k in kinds[0]]), outlined(found, [f"t{k}" for k in kinds[1]]), 12)
    quality = panoptic_quality(true, found)
    assert (of["all"].pq, of["all"].dq, of["all"].sq) == pytest.approx((quality.pq, quality.dq, quality.sq), abs=1e-9)
    assert of["all"].paired == len(quality.pairs)
    assert of["all"].aji == pytest.approx(aggregated_jaccard(true, found))
    assert of["all"].dice == pytest.approx(dice(true > 0, found > 0))
    by_type = score_image(TypedNuclei(true, kinds[0]), TypedNuclei(found, kinds[1]), 3, 12).type_quality
    for k in (1, 2):
        assert (of[f"t{k}"].dq, of[f"t{k}"].sq, of[f"t{k}"].pq) == pytest.approx(tuple(by_type[:, k - 1]), abs=1e-9)
        only = np.isin(true, 1 + np.flatnonzero(kinds[0] == k)), np.isin(found, 1 + np.flatnonzero(kinds[1] == k))
        assert of[f"t{k}"].dice == pytest.approx(dice(*only))
        assert of[f"t{k}"].true == (kinds[0] == k).sum()


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 40), st.sampled_from([1.0, 4.0, 30.0]))
def test_centres_pair_as_often_as_can_be_and_then_as_close(seed: int, n: int, m: int, radius: float) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.uniform(0, 25, (n, 2)).round(), rng.uniform(0, 25, (m, 2)).round()
    pairs = pair_within(one, other, radius)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    apart = distance.cdist(one, other)
    assert (apart[pairs[:, 0], pairs[:, 1]] <= radius).all()
    if n and m:
        from scipy.optimize import linear_sum_assignment

        gain = np.where(apart <= radius, 1e4 - apart, 0)
        rows, columns = linear_sum_assignment(gain, maximize=True)
        assert (1e4 - apart[pairs[:, 0], pairs[:, 1]]).sum() == pytest.approx(gain[rows, columns].sum())


def test_a_nucleus_with_itself_scores_one_and_nothing_with_nothing_scores_nothing() -> None:
    labels = crowd((200, 200), 30, 1)
    of = compare(outlined(labels, ["a"] * labels.max()), outlined(labels, ["a"] * labels.max()), 12)
    for scores in of.values():
        assert (scores.pq, scores.aji, scores.dice, scores.f1) == pytest.approx((1, 1, 1, 1), abs=1e-5)
    nothing = outlined(np.zeros((9, 9), np.int32))
    assert np.isnan(compare(nothing, nothing, 12)["all"].pq)
    assert compare(outlined(labels), nothing, 12)["all"].pq == 0
    assert compare(nothing, outlined(labels), 12)["all"].f1 == 0


def test_a_nucleus_found_twice_pairs_once() -> None:
    labels = crowd((200, 200), 45, 1)
    once = outlined(labels)
    twice = OutlinedNuclei(np.repeat(once.outlines, 2), np.repeat(once.types, 2))
    scores = compare(once, twice, 12)["all"]
    assert (scores.true, scores.found, scores.paired) == (labels.max(), 2 * labels.max(), labels.max())
    assert scores.precision == 0.5
    assert compare(twice, once, 12)["all"].paired == labels.max()


def test_types_of_one_side_alone_score_nothing() -> None:
    labels = crowd((100, 100), 30, 1)
    assert list(compare(outlined(labels, ["a"] * labels.max()), outlined(labels), 12)) == ["all"]


def test_what_is_found_on_a_true_nucleus_of_unknown_type_is_no_false_alarm_of_any_type() -> None:
    labels = crowd((160, 190), 27, 5)
    found = moved(labels, 5)
    kinds = [np.arange(1, labels.max() + 1) % 3, np.arange(1, found.max() + 1) % 2 + 1]
    kinds[0][kinds[0] == 0] = UNKNOWN_TYPE
    names = {1: "t1", 2: "t2", UNKNOWN_TYPE: ""}
    of = compare(outlined(labels, [names[k] for k in kinds[0]]), outlined(found, [names[k] for k in kinds[1]]), 12)
    by_type = score_image(TypedNuclei(labels, kinds[0]), TypedNuclei(found, kinds[1]), 3, 12).type_quality
    for k in (1, 2):
        assert (of[f"t{k}"].dq, of[f"t{k}"].sq, of[f"t{k}"].pq) == pytest.approx(tuple(by_type[:, k - 1]), abs=1e-9)
    of = compare(outlined(labels, ["a", *[""] * (labels.max() - 1)]), outlined(labels, ["a"] * labels.max()), 12)
    assert (of["a"].pq, of["a"].f1, of["a"].aji, of["a"].dice) == pytest.approx((1, 1, 1, 1), abs=1e-5)
    assert (of["a"].true, of["a"].found) == (1, 1)


def test_more_types_than_a_byte_counts_are_told_apart() -> None:
    names = [f"t{number}" for number in range(UNKNOWN_TYPE + 2)]
    left = 20 * np.arange(len(names))
    nuclei = OutlinedNuclei(shapely.box(left, 0, left + 10, 10), np.array(names))
    scores = compare(nuclei, nuclei, 12)
    assert all((scores[name].found, scores[name].paired, scores[name].f1) == (1, 1, 1) for name in names)


def test_outlines_of_a_mask_have_the_area_of_its_pixels_whatever_their_shape() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, (25, 30)).astype(np.int32)  # pieces, holes, corners
    labels[5:20, 5:20] = 4
    labels[9:12, 9:12] = 0
    outlines = mask_outlines(labels)
    np.testing.assert_array_equal(shapely.area(outlines), np.bincount(labels.ravel())[1:])
    assert shapely.is_valid(outlines).all()
    assert shapely.area(shapely.intersection(outlines[0], outlines[1])) == 0


# -- files --------------------------------------------------------------------------------------------------------

CENTRES = np.random.default_rng(0).permutation(np.argwhere(np.ones((20, 20))))[:150] * 30.0 + 100


def table(folder: Path, name: str, centres: npt.NDArray[Any] = CENTRES, **meta: Any) -> Path:
    spool = NucleiSpool(folder / f"{name}.parquet", replace(made_meta(), **meta), {})
    spool.add(0, made_nuclei(centres))
    spool.finish([0])
    return spool.path


def mask_of(path: Path, nuclei: Path, size: int = 800, at: int = 0) -> Path:
    """The nuclei of a table, painted."""
    frame = geopandas.read_parquet(nuclei)
    y, x = np.mgrid[:size, :size] + 0.5 + at
    labels = np.zeros((size, size), np.uint16)
    for number, outline in enumerate(frame.geometry, 1):
        labels[shapely.contains_xy(outline, x, y)] = number
    Image.fromarray(labels).save(path)
    lines = [f"{number},{name}" for number, name in enumerate(frame["type"], 1)]
    path.with_suffix(".csv").write_text("\n".join(["id,type", *lines]))
    return path


@pytest.mark.parametrize("ending", ["geojson", "geojson.gz"])
def test_a_table_agrees_with_its_own_geojson_wherever_the_bounds_are(tmp_path: Path, ending: str) -> None:
    path = table(tmp_path, "nuclei", bounds=Box(50, 60, 40_000, 30_000))
    exported = write_geojson(path, tmp_path / f"nuclei.{ending}").files[0]
    scores, shown = make_comparison(path, exported, tmp_path / "scores")
    assert list(scores) == ["all", *sorted(CLASSES[1:])]
    assert all(of.pq == pytest.approx(1, abs=1e-5) and of.f1 == 1 for of in scores.values())
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["scores"]["all"]["paired"] == 150
    assert record["radius_um"] == 3
    assert shown in (tmp_path / "scores.md").read_text()
    assert len({len(line) for line in shown.splitlines()}) == 1


def test_a_table_agrees_with_a_mask_of_it_and_what_lies_beside_the_mask_does_not_count(tmp_path: Path) -> None:
    path = table(tmp_path, "nuclei")
    scores, _ = make_comparison(mask_of(tmp_path / "mask.png", path), path, tmp_path / "whole")
    assert scores["all"].true == scores["all"].found == 150
    assert scores["all"].pq > 0.93
    assert scores[CLASSES[1]].dq > 0.99
    part = mask_of(tmp_path / "part.png", path, 300, 205)
    scores, _ = make_comparison(part, path, tmp_path / "part", at=(205, 205))
    assert 30 < scores["all"].found < 150
    assert scores["all"].f1 > 0.95


def test_any_geoparquet_of_outlines_will_do(tmp_path: Path) -> None:
    ours = table(tmp_path, "nuclei")
    frame = geopandas.read_parquet(ours)[["geometry"]]
    frame.to_parquet(tmp_path / "foreign.parquet")
    scores, _ = make_comparison(tmp_path / "foreign.parquet", ours, tmp_path / "scores")
    assert scores["all"].pq == pytest.approx(1, abs=1e-5)
    assert list(scores) == ["all"]


def test_geojson_that_qupath_wrote_counts_from_the_corner_of_the_bounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wsipipe")
    path = table(tmp_path, "nuclei", bounds=Box(50, 60, 40_000, 30_000))
    ours, uncropped = (tmp_path / name for name in ("ours.geojson", "uncropped.geojson"))
    write_geojson(path, ours)
    write_geojson(path, uncropped, offset=(0, 0))
    for file in (ours, uncropped):
        theirs = {key: value for key, value in json.loads(file.read_text()).items() if key != "wsipipe"}
        file.with_stem(f"q-{file.stem}").write_text(json.dumps(theirs))
    for true, found, options in (
        (path, tmp_path / "q-ours.geojson", {}),
        (tmp_path / "q-ours.geojson", ours, {}),
        (path, tmp_path / "q-uncropped.geojson", {"crop_to_bounds": False}),
        (tmp_path / "q-ours.geojson", tmp_path / "q-ours.geojson", {"mpp": 0.25}),
    ):
        assert make_comparison(true, found, tmp_path / "scores", **options)[0]["all"].pq > 0.99
    assert "corner of the slide's bounds, 50, 60" in caplog.text


def test_overlapping_outlines_share_no_more_than_they_are(tmp_path: Path) -> None:
    twice = drawn(tmp_path / "twice.geojson", *({"geometry": ring(20 * i)} for i in (0, 1, 2, 0, 1, 2)))
    once = drawn(tmp_path / "once.geojson", *({"geometry": ring(20 * i)} for i in (0, 1, 2)))
    for true, found in ((once, twice), (twice, once), (twice, twice)):
        assert make_comparison(true, found, tmp_path / "scores", mpp=0.25)[0]["all"].dice == pytest.approx(1)


def test_a_type_called_all_and_a_file_called_features_are_read(tmp_path: Path) -> None:
    kinds = [{"geometry": ring(20 * i), "properties": {"classification": kind}} for i, kind in enumerate(("all", "b"))]
    features = [{"type": "Feature", **one} for one in kinds]
    path = tmp_path / "features.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "name": "features", "features": features}))
    scores, _ = make_comparison(path, path, tmp_path / "scores", mpp=0.25)
    assert {name: of.true for name, of in scores.items()} == {"all": 2, "the type all": 1, "b": 1}


def test_masks_of_two_sizes_or_of_numbers_that_were_not_kept_are_refused(tmp_path: Path) -> None:
    for name, side in (("a.png", 8), ("b.png", 4), ("c.jpg", 8)):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / name)
    for name, why in (("b.png", r"are of \(8, 8\) and \(4, 4\) px; make them alike"), ("c.jpg", "is a JPEG")):
        with pytest.raises(DataError, match=why):
            make_comparison(tmp_path / "a.png", tmp_path / name, tmp_path / "scores", mpp=0.25)


def test_types_of_any_geoparquet_may_be_categories_some_of_them_missing(tmp_path: Path) -> None:
    squares = shapely.box([0, 20, 40], 0, [10, 30, 50], 10)
    frame = geopandas.GeoDataFrame({"type": pd.Categorical(["round", None, "long"])}, geometry=squares)
    frame.to_parquet(tmp_path / "foreign.parquet")
    assert read_nuclei_file(tmp_path / "foreign.parquet").nuclei.types.tolist() == ["round", "", "long"]


def ring(x: float, side: float = 10) -> dict[str, Any]:
    corners = [[x, 0], [x + side, 0], [x + side, side], [x, side], [x, 0]]
    return {"type": "Polygon", "coordinates": [corners]}


def drawn(path: Path, *objects: dict[str, Any], bare: bool = False) -> Path:
    """A GeoJSON file of these objects."""
    features = [{"type": "Feature", "properties": {}, **one} for one in objects]
    path.write_text(json.dumps(features if bare else {"type": "FeatureCollection", "features": features}))
    return path


def test_an_outline_that_crosses_itself_keeps_all_its_area(tmp_path: Path) -> None:
    bow_tie = {"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}
    spiked = {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [9, 30], [9, 9], [0, 9], [0, 0]]]}
    line = {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [4, 0], [0, 0]]]}
    path = drawn(tmp_path / "a.geojson", *({"geometry": geometry} for geometry in (bow_tie, spiked, line)))
    outlines = read_nuclei_file(path).nuclei.outlines
    assert shapely.area(outlines).tolist() == [50, 81]
    assert set(shapely.get_type_id(outlines).tolist()) <= {3, 6}
    scores, _ = make_comparison(path, path, tmp_path / "scores", mpp=0.25)
    assert scores["all"].pq == pytest.approx(1, abs=1e-5)


def test_of_the_objects_of_qupath_the_nuclei_are_read_with_their_classes(tmp_path: Path) -> None:
    classes: list[Any] = [
        {"name": "Tumor"}, {"names": ["Tumor", "Positive"]}, {"name": None}, {}, None, "Stroma", {"name": "Region*"},
        {"name": "region"}, {"name": "Regional"}, {"name": "Ignore*"},
    ]  # fmt: skip
    objects = [{"geometry": ring(20 * i), "properties": {"classification": kind}} for i, kind in enumerate(classes)]
    cell = {"geometry": ring(300, 30), "nucleusGeometry": ring(310), "properties": {"objectType": "cell"}}
    area = {"geometry": {"type": "LineString", "coordinates": [[0, 0], [9, 9]]}, "properties": objects[6]["properties"]}
    nuclei = read_nuclei_file(drawn(tmp_path / "a.geojson", *objects, cell, area)).nuclei
    assert nuclei.types.tolist() == ["Tumor", "Tumor Positive", "", "", "", "Stroma", "Regional", ""]
    assert shapely.bounds(nuclei.outlines[-1]).tolist() == [310, 0, 320, 10]


def test_a_bare_list_of_features_is_read_as_a_collection_of_them(tmp_path: Path) -> None:
    objects = [{"geometry": ring(20 * i)} for i in range(5)]
    lists = [read_nuclei_file(drawn(tmp_path / f"{bare}.geojson", *objects, bare=bare)) for bare in (False, True)]
    assert shapely.equals(*(of.nuclei.outlines for of in lists)).tolist() == [True] * 5
    (tmp_path / "one.geojson").write_text(json.dumps({"type": "Feature", "geometry": ring(0)}))
    with pytest.raises(DataError, match="export them as a FeatureCollection"):
        read_nuclei_file(tmp_path / "one.geojson")


def painted(folder: Path, types: str) -> Path:
    """A mask of the nuclei 1, 2 and 7, and its table of types."""
    Image.fromarray(np.repeat(np.array([[0, 1, 2, 7]], np.uint8), 4, axis=0)).save(folder / "mask.png")
    (folder / "mask.csv").write_text(types, encoding="utf-8-sig")
    return folder / "mask.png"


def test_the_types_of_a_mask_may_hold_blanks_commas_and_quotes(tmp_path: Path) -> None:
    path = painted(tmp_path, 'id,type\n1,plasma cell\n\n7,"round, ""large"""\n9,"lost"\n')
    assert read_nuclei_file(path).nuclei.types.tolist() == ["plasma cell", "", 'round, "large"']


@pytest.mark.parametrize(
    ("types", "why"),
    [
        ("", "does not begin with the columns id,type"),
        ("id;type\n1;round\n", "does not begin with the columns id,type"),
        ("id,type\n1\n", "line 2"),
        ("id,type\n1,round\none,round\n", "line 3"),
        ("id,type\n1,round\n1,long\n", r"the ids \[1\] repeat"),
        ('id,type\n1,"round\n2,long\n', "must be a table of id and type"),
        ('id,type\n1,"round\n2,long"\n', "type goes over two lines; is a quotation mark left open"),
    ],
)
def test_a_table_of_types_that_cannot_be_read_is_named(tmp_path: Path, types: str, why: str) -> None:
    with pytest.raises(DataError, match=why) as refusal:
        read_nuclei_file(painted(tmp_path, types))
    assert str(tmp_path / "mask.csv") in str(refusal.value)


def test_files_that_cannot_be_compared_are_refused_with_the_remedy(tmp_path: Path) -> None:
    ours = table(tmp_path, "nuclei")
    points = write_geojson(ours, tmp_path / "points.geojson", form="centroids").files[0]
    torn = tmp_path / "torn.geojson.gz"
    torn.write_bytes(gzip.compress(points.read_bytes())[:-200])
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colours.png")
    (tmp_path / "text.txt").write_text("nothing")
    for path, why in {
        tmp_path / "none.parquet": "does not exist",
        points: "compare outlines",
        torn: "cannot be read as GeoJSON",
        tmp_path / "colours.png": "no mask of one whole number a pixel",
        tmp_path / "text.txt": "neither a table, nor GeoJSON, nor a mask",
        table(tmp_path, "other", fingerprint="beef"): "different slides",
    }.items():
        with pytest.raises((DataError, StoreError), match=why):
            make_comparison(ours, path, tmp_path / "scores")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "empty.png")
    with pytest.raises(ConfigError, match=r"pass --mpp"):
        make_comparison(tmp_path / "empty.png", tmp_path / "empty.png", tmp_path / "scores")
    assert not list(tmp_path.glob("scores*"))


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_resolution_that_no_slide_has_is_refused(tmp_path: Path, mpp: float) -> None:
    ours = table(tmp_path, "nuclei")
    with pytest.raises(ConfigError, match="no resolution of a slide"):
        make_comparison(ours, ours, tmp_path / "scores", mpp=mpp)


def test_what_is_compared_is_not_overwritten_and_an_earlier_comparison_is(tmp_path: Path) -> None:
    ours = table(tmp_path, "nuclei")
    truth = write_geojson(ours, tmp_path / "truth.geojson").files[0].rename(tmp_path / "truth.json")
    before = truth.read_bytes()
    with pytest.raises(ConfigError, match="is there and no comparison; give another name"):
        make_comparison(truth, ours, tmp_path / "truth")
    assert truth.read_bytes() == before
    with pytest.raises(ConfigError, match="need a name"):
        make_comparison(truth, ours, Path())
    for _ in range(2):
        make_comparison(truth, ours, tmp_path / "scores")


@pytest.mark.parametrize(
    "files",
    [
        {"a.md": "notes of mine"},
        {"a.json": '{"wsipipe": "0.1.0", "scores": {"strict": {}}}', "a.md": "of another command"},
        {"a.json": '{"wsipipe": "0.1.0", "true": "", "found": "", "scores": {}}'},
        {"a.json": '["true", "found", "radius_um", "scores"]'},
    ],
)
def test_what_is_no_comparison_is_not_overwritten(tmp_path: Path, files: dict[str, str]) -> None:
    ours = table(tmp_path, "nuclei")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=r"a\.(md|json) is there and no comparison; give another name"):
        make_comparison(ours, ours, tmp_path / "a")
    assert {path.name: path.read_text() for path in tmp_path.glob("a.*")} == files


@pytest.mark.parametrize("ending", ["json", "md"])
def test_a_comparison_that_is_stopped_between_its_files_can_be_made_again(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = table(tmp_path, "nuclei")
    named = Path.replace

    def stopped(partial: Path, path: Path) -> Path:
        if path.name == f"scores.{ending}":
            raise KeyboardInterrupt
        return named(partial, path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            make_comparison(ours, ours, tmp_path / "scores")
    make_comparison(ours, ours, tmp_path / "scores")
    assert (tmp_path / "scores.json").exists()
    assert (tmp_path / "scores.md").exists()


def test_the_command_shows_the_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path, "nuclei")
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(path), str(path), "-o", str(tmp_path / "scores")])
    assert not stop.value.code
    said = capfd.readouterr().out
    assert "| all " in said
    assert " PQ |" in said
    assert (tmp_path / "scores.md").exists()


# -- features one by one ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 30), st.integers(1, 90), st.booleans())
def test_features_are_read_one_by_one_whatever_a_read_gives(n: int, piece: int, indented: bool) -> None:
    features = [{"type": "Feature", "name": 'a "], \\', "geometry": None, "k": [i, {}]} for i in range(n)]
    value = {"type": "FeatureCollection", "made": {"by": "µ"}, "features": features, "after": [1]}
    text = json.dumps(value, indent=1 if indented else None)
    told: dict[str, Any] = {}
    before, stage.PIECE = stage.PIECE, piece
    try:
        assert list(read_features(io.StringIO(text), told)) == features
        bare = json.dumps(features, indent=1 if indented else None) + "\n"
        assert list(read_features(io.StringIO(bare), {})) == features
    finally:
        stage.PIECE = before
    assert told == {"type": "FeatureCollection", "made": {"by": "µ"}, "after": [1]}


@pytest.mark.parametrize(
    "text",
    [
        "", "[] []", "[", "[{}", "[{}, ]", "[{}]]", '{"features": 3}', '{"features": [', '{"features": [{}',
        '{"features": [{} {}]}', '{"features": [{}]', '{"features": [{},]}', '{"features": [{}]} {}',
        '{"features": [{"a": 1]}',
    ],
)  # fmt: skip
def test_what_is_no_feature_collection_to_its_last_byte_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whatever json says
        list(read_features(io.StringIO(text), {}))


def test_scores_that_are_not_there_are_shown_as_such() -> None:
    nothing = outlined(np.zeros((9, 9), np.int32))
    assert "nan" in to_table(compare(nothing, nothing, 1))
