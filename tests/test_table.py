"""Tables of nuclei: what goes in comes out, whole, in one order, whatever happened on the way."""

import json
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_nuclei import CLASSES, made_meta, made_nuclei
from scipy.spatial import cKDTree, distance

from wsipipe import table as table_module
from wsipipe.errors import StoreError
from wsipipe.features import NUCLEI_SCHEMA
from wsipipe.geometry import Box
from wsipipe.neighbours import Neighbourhood
from wsipipe.table import TABLE_SCHEMA, NucleiMeta, NucleiSpool, read_nuclei

EMPTY = made_nuclei([])


def scattered(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, (40_000, 30_000), (n, 2)).round(1)


def written(path: Path, *batches: pa.RecordBatch, meta: NucleiMeta | None = None) -> Path:
    spool = NucleiSpool(path, meta or made_meta(), {})
    for block, batch in enumerate(batches):
        spool.add(block, batch)
    spool.finish(range(len(batches)))
    return path


def test_every_nucleus_comes_back_with_its_columns(tmp_path):
    batch = made_nuclei(scattered(300))
    meta, batches = read_nuclei(written(tmp_path / "nuclei.parquet", batch.slice(0, 120), EMPTY, batch.slice(120)))
    found = pa.Table.from_batches(batches).sort_by("id")
    assert found.select(NUCLEI_SCHEMA.names).equals(pa.Table.from_batches([batch]).sort_by("id"))
    assert meta.count == 300
    assert meta.counts == {name: batch["type"].to_pylist().count(name) for name in CLASSES[1:]}
    assert replace(meta, counts={}) == made_meta()


def test_the_description_survives_json_with_bounds_and_without():
    for bounds in (None, Box(5, 6, 700, 800)):
        meta = made_meta(bounds=bounds)
        assert NucleiMeta.from_json(meta.to_json()) == meta


def test_the_file_is_geoparquet_and_opens_in_geopandas_as_it_is(tmp_path):
    batch = made_nuclei(scattered(50))
    path = written(tmp_path / "nuclei.parquet", batch)
    frame = geopandas.read_parquet(path)
    assert frame.crs is None
    assert set(frame.geom_type) == {"Polygon"}
    assert len(frame) == 50
    geo = json.loads(pq.read_metadata(path).metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert geo["columns"]["geometry"]["crs"] is None
    assert geo["columns"]["geometry"]["bbox"] == list(shapely.total_bounds(shapely.from_wkb(batch["geometry"])))


def test_a_slide_without_nuclei_gives_an_empty_table_that_geopandas_opens(tmp_path):
    for name, batches in {"no-blocks": (), "empty-blocks": (EMPTY, EMPTY)}.items():
        path = written(tmp_path / f"{name}.parquet", *batches)
        assert len(geopandas.read_parquet(path)) == 0
        meta, nuclei = read_nuclei(path)
        assert meta.count == 0
        assert sum(batch.num_rows for batch in nuclei) == 0


@settings(max_examples=25, deadline=None)
@given(blocks=st.lists(st.integers(0, 4), min_size=60, max_size=60), order=st.permutations(range(5)))
def test_the_bytes_do_not_tell_how_the_slide_was_cut_nor_who_came_first(tmp_path_factory, blocks, order):
    folder = tmp_path_factory.mktemp("cut")
    batch = made_nuclei(scattered(60))
    whole = written(folder / "whole.parquet", batch).read_bytes()
    spool = NucleiSpool(folder / "parts.parquet", made_meta(), {"side": 5})
    for block in order:
        spool.add(block, batch.take(pa.array(np.flatnonzero(np.equal(blocks, block)))))
    spool.finish(order)
    assert (folder / "parts.parquet").read_bytes() == whole


def test_row_groups_are_full_and_compact_however_small_the_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "ROW_GROUP", 64)
    batch = made_nuclei(scattered(1000))
    path = written(tmp_path / "nuclei.parquet", *(batch.slice(i, 10) for i in range(0, 1000, 10)))
    file = pq.ParquetFile(path)
    rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert rows == [64] * 15 + [40]
    y = [file.read_row_group(i)["y_px0"].to_numpy() for i in range(file.num_row_groups)]
    assert np.median([np.ptp(values) for values in y]) < 5 * table_module.SQUARE_PX0


def test_a_run_that_was_killed_goes_on_where_it_was_with_the_same_bytes(tmp_path):
    batch = made_nuclei(scattered(90))
    parts = [batch.slice(0, 40), EMPTY, batch.slice(40)]
    whole = written(tmp_path / "whole.parquet", *parts).read_bytes()
    path = tmp_path / "nuclei.parquet"
    first = NucleiSpool(path, made_meta(), {})
    first.add(2, parts[2])
    first.add(1, parts[1])
    (first.folder / "00000000.arrow.partial").write_bytes(b"torn while it was written")
    second = NucleiSpool(path, made_meta(), {})
    assert second.done() == {1, 2}
    assert not path.exists()
    second.add(0, parts[0])
    second.finish(range(3))
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("nuclei")] == ["nuclei.parquet"]


def test_what_the_blocks_report_is_summed_and_empty_blocks_count_too(tmp_path):
    spool = NucleiSpool(tmp_path / "nuclei.parquet", made_meta(), {})
    spool.add(0, made_nuclei(scattered(5)), {"small": 2, "wide": 0})
    spool.add(1, EMPTY, {"small": 1, "wide": 1})
    assert spool.finish(range(2)).qc == {"small": 3, "wide": 1}
    assert read_nuclei(spool.path)[0].qc == {"small": 3, "wide": 1}


def test_a_missing_block_is_named_and_nothing_is_written(tmp_path):
    spool = NucleiSpool(tmp_path / "nuclei.parquet", made_meta(), {})
    spool.add(0, EMPTY)
    with pytest.raises(StoreError, match="lacks 2 of 3 blocks, first 1"):
        spool.finish(range(3))
    assert not (tmp_path / "nuclei.parquet").exists()
    assert spool.done() == {0}


def test_a_spool_made_with_other_settings_is_refused_naming_both_values_and_the_flag(tmp_path):
    path = tmp_path / "nuclei.parquet"
    NucleiSpool(path, made_meta(), {"block_px": 2048}).add(0, EMPTY)
    other = replace(made_meta(), config={"nuclei": {"min_area_um2": 9.0}})
    with pytest.raises(StoreError, match=r"config\.nuclei\.min_area_um2 was 6\.0 and is now 9\.0; pass --overwrite"):
        NucleiSpool(path, other, {"block_px": 2048})
    with pytest.raises(StoreError, match=r"blocks\.block_px was 2048 and is now 4096"):
        NucleiSpool(path, made_meta(), {"block_px": 4096})
    assert NucleiSpool(path, made_meta(), {"block_px": 2048}).done() == {0}
    NucleiSpool.discard(path)
    assert NucleiSpool(path, other, {"block_px": 4096}).done() == set()


def test_blocks_of_which_the_settings_are_gone_are_not_taken_over(tmp_path):
    path = tmp_path / "nuclei.parquet"
    first = NucleiSpool(path, made_meta(), {"block_px": 2048})
    first.add(0, EMPTY)
    (first.folder / "settings.json").unlink()  # as a kill leaves a folder that is being deleted
    assert NucleiSpool(path, made_meta(), {"block_px": 4096}).done() == set()


def test_nuclei_of_other_columns_are_a_mistake_of_the_caller(tmp_path):
    spool = NucleiSpool(tmp_path / "nuclei.parquet", made_meta(), {})
    with pytest.raises(ValueError, match="NUCLEI_SCHEMA"):
        spool.add(0, EMPTY.drop_columns(["id"]))


def test_a_missing_torn_or_foreign_file_is_refused_with_the_remedy(tmp_path):
    good = written(tmp_path / "good.parquet", made_nuclei(scattered(20)))
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(good.read_bytes()[:-100])
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"a": [1]}), foreign)
    newer = tmp_path / "newer.parquet"
    text = made_meta().to_json().replace('"version": 2', '"version": 3')
    pq.write_table(TABLE_SCHEMA.empty_table().replace_schema_metadata({"wsipipe": text}), newer)
    for path, why in {
        tmp_path / "none.parquet": "does not exist",
        torn: "cannot be read as Parquet",
        foreign: "not a table of nuclei",
        newer: "version 3; this wsipipe reads 2",
    }.items():
        again = "" if why in ("does not exist", "not a table of nuclei") else " --overwrite"
        with pytest.raises(StoreError, match=f"{why}.*wsipipe nuclei{again}'"):
            read_nuclei(path)


def test_only_the_wanted_columns_are_read(tmp_path):
    _, batches = read_nuclei(written(tmp_path / "nuclei.parquet", made_nuclei(scattered(20))), ["x_px0", "type"])
    assert next(batches).schema.names == ["x_px0", "type"]


def test_memory_does_not_grow_with_the_number_of_nuclei(tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "ROW_GROUP", 1000)
    groups, held = table_module._groups, []

    def watched(tables):
        for group in groups(tables):
            held.append(pa.total_allocated_bytes())
            yield group

    monkeypatch.setattr(table_module, "_groups", watched)

    def peak(blocks: int) -> int:
        spool = NucleiSpool(tmp_path / f"{blocks}.parquet", made_meta(), {})
        batch = made_nuclei(scattered(1000))
        column = batch.schema.get_field_index("y_px0")
        for block in range(blocks):
            y = pa.array(batch["y_px0"].to_numpy() + 30_000 * block)
            spool.add(block, batch.set_column(column, batch.schema.field(column), y))
        held.clear()
        before = pa.total_allocated_bytes()
        spool.finish(range(blocks))
        return max(held) - before

    assert peak(40) < 1.5 * peak(8)


# -- surroundings -------------------------------------------------------------------------------------------------


def surroundings(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres in µm, neighbours and distances of a table; NaN where there is no other nucleus."""
    nuclei = pa.Table.from_batches(read_nuclei(path)[1], TABLE_SCHEMA)
    places = np.stack([nuclei["x_um"].to_numpy(), nuclei["y_um"].to_numpy()], axis=1)
    return places, nuclei["neighbors_50um"].to_numpy(), nuclei["nearest_um"].to_numpy()


def clustered(n: int, seed: int) -> np.ndarray:
    """Crowds, pairs and nuclei a long way from any other, on and off the lines between rows of squares, in px0."""
    rng = np.random.default_rng(seed)
    crowds = rng.uniform(0, (40_000, 30_000), (4, 2))
    crowds[:, 1] = np.round(crowds[:, 1] / table_module.SQUARE_PX0) * table_module.SQUARE_PX0
    near = crowds[rng.integers(0, 4, n)] + rng.normal(0, 300, (n, 2))
    far = rng.uniform(0, (40_000, 30_000), (n // 10 + 1, 2))
    return np.clip(np.concatenate([near, far]), 0, (40_000, 30_000)).round(1)


@pytest.mark.parametrize("n", [1, 5, 2000])
def test_neighbours_and_the_nearest_nucleus_are_those_of_the_whole_slide(tmp_path, n):
    path = written(tmp_path / "nuclei.parquet", made_nuclei(clustered(n, n)))
    places, counts, nearest = surroundings(path)
    apart = distance.cdist(places, places)
    np.testing.assert_array_equal(counts, (apart <= 50).sum(0) - 1)
    np.fill_diagonal(apart, np.inf)
    np.testing.assert_array_equal(nearest, apart.min(0).astype(np.float32))


def test_a_nucleus_alone_on_a_slide_has_no_nearest(tmp_path):
    _, counts, nearest = surroundings(written(tmp_path / "nuclei.parquet", made_nuclei([[500, 700]])))
    assert counts.tolist() == [0]
    assert np.isnan(nearest).all()


def test_a_nucleus_as_far_as_the_reach_is_a_neighbour_and_one_in_the_same_place_too(tmp_path):
    places = [[1000, 1024], [1200, 1024], [1200, 1024], [1000, 1224.1]]  # 50 µm are 200 px0
    _, counts, nearest = surroundings(written(tmp_path / "nuclei.parquet", made_nuclei(places)))
    assert sorted(counts.tolist()) == [0, 2, 2, 2]
    assert sorted(nearest.tolist()) == [0, 0, 50, pytest.approx(50.025)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.floats(0.2, 30), st.floats(0.5, 40))
def test_rows_of_any_height_give_what_a_tree_over_all_points_gives(seed, n, height, reach):
    points = np.random.default_rng(seed).uniform(0, (60, 90), (n, 2)).round(1)
    row_of = np.floor(points[:, 1] / height).astype(int)
    rows = Neighbourhood(set(row_of.tolist()), lambda row: points[row_of == row], height, reach)
    tree = cKDTree(points)
    for row in np.unique(row_of):
        counts, nearest = rows.of_row(row)
        mine = points[row_of == row]
        np.testing.assert_array_equal(counts, tree.query_ball_point(mine, reach, return_length=True) - 1)
        np.testing.assert_array_equal(nearest, tree.query(mine, [2])[0][:, 0])


def test_a_file_that_gives_fewer_nuclei_than_it_counts_is_refused(tmp_path, monkeypatch):
    """A damaged footer may lose its row groups and keep their number of rows."""
    path = written(tmp_path / "nuclei.parquet", made_nuclei(scattered(50)))
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, **options: iter(()))
    with pytest.raises(StoreError, match=r"0 of its 50 nuclei are there.*wsipipe nuclei"):
        list(read_nuclei(path)[1])
