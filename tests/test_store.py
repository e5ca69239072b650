"""The map store: what is there is complete, what is not says so."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import wsipipe.store as store_module
from wsipipe.errors import StoreError
from wsipipe.geometry import Box, Grid
from wsipipe.lock import Lock
from wsipipe.maps import Maps
from wsipipe.model.spec import ModelSpec
from wsipipe.provenance import StoreMeta
from wsipipe.store import MapStore
from wsipipe.tiles import TileGeometry

SPEC = ModelSpec(
    name="oracle",
    architecture="oracle",
    settings={"width": 3},
    mpp=0.25,
    tile_px=32,
    halo_px=8,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    class_names=("background", "blue", "green"),
    class_colours=((0, 0, 0), (0, 0, 255), (0, 255, 0)),
    source="drawn",
    licence="Apache-2.0",
)
META = StoreMeta(
    slide="tiny",
    fingerprint="ab" * 32,
    grid=Grid(70, 50, 1.0, 1.0, 0.25, 0.2501),
    geometry=TileGeometry(32, 8, 2),
    spec=SPEC,
    weights_sha256="cd" * 32,
    precision="fp32",
    tissue_grid=Grid(3, 2, 32.0, 32.0, 0.25, 0.2501),
    tissue_settings={"mpp": 8.0},
    config_hash="1234",
)
TISSUE = np.array([[1, 0, 1], [1, 1, 0]], bool)
WANTED = {0: 4, 2: 2, 4: 1}  # of 3 x 2 chunks of 32 px


def some_maps(box: Box, seed: int = 0) -> Maps:
    rng = np.random.default_rng((seed, box.x0, box.y0))
    return Maps(
        rng.integers(0, 256, box.shape, np.uint8),
        rng.integers(-127, 128, (2, *box.shape), np.int8),
        rng.integers(0, 256, (3, *box.shape), np.uint8),
    )


def begin(path: Path, meta: StoreMeta = META, **options: bool) -> MapStore:
    return MapStore.resume_or_create(path, meta, WANTED, TISSUE, **options)


def complete(path: Path) -> MapStore:
    with begin(path) as store:
        for index in sorted(store.missing):
            store.write_chunk(index, some_maps(META.chunk_box(index)))
        store.finish()
    return store


def same(found: Maps, expected: Maps) -> bool:
    pairs = ((found.nuclei, expected.nuclei), (found.offsets, expected.offsets), (found.types, expected.types))
    return all(one.dtype == other.dtype and np.array_equal(one, other) for one, other in pairs)


def test_what_is_written_is_read_and_all_else_is_zero(tmp_path: Path) -> None:
    complete(tmp_path / "maps.zarr")
    store = MapStore.open(tmp_path / "maps.zarr")
    whole = store.read(META.grid.box)
    drawn = Maps(*(np.zeros_like(values) for values in (whole.nuclei, whole.offsets, whole.types)))
    for index in WANTED:
        box = META.chunk_box(index)
        maps = some_maps(box)
        drawn.nuclei[box.slices] = maps.nuclei
        drawn.offsets[:, *box.slices] = maps.offsets
        drawn.types[:, *box.slices] = maps.types
    assert same(whole, drawn)
    assert (store.meta, store.wanted, store.committed) == (META, WANTED, set(WANTED))
    np.testing.assert_array_equal(store.tissue, TISSUE)


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> MapStore:
    return complete(tmp_path_factory.mktemp("store") / "maps.zarr")


@given(st.integers(-40, 90), st.integers(-40, 90), st.integers(0, 90), st.integers(0, 90))
def test_a_box_reads_as_that_part_of_the_whole_with_zeros_around(
    whole_store: MapStore, x: int, y: int, width: int, height: int
) -> None:
    box = Box(x, y, x + width, y + height)
    far = META.grid.box.grown(200)
    whole = whole_store.read(far)
    place = (..., *box.within(far).slices)
    expected = Maps(whole.nuclei[place], whole.offsets[place], whole.types[place])
    assert same(whole_store.read(box), expected)


def test_chunks_without_tissue_take_no_room(whole_store: MapStore) -> None:
    stored = {
        str(file.relative_to(whole_store.path / "np" / "c")) for file in (whole_store.path / "np" / "c").glob("*/*")
    }
    assert stored == {"0/0", "0/2", "1/1"}


def test_a_store_is_not_finished_while_chunks_are_missing(tmp_path: Path) -> None:
    with begin(tmp_path / "maps.zarr") as store:
        store.write_chunk(2, some_maps(META.chunk_box(2)))
        with pytest.raises(StoreError, match=r"lacks 2 of 3 chunks \(0, 4"):
            store.finish()
    with pytest.raises(StoreError, match="does not exist"):
        MapStore.open(tmp_path / "maps.zarr")


def test_an_interrupted_store_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    with begin(path) as store:
        store.write_chunk(2, some_maps(META.chunk_box(2)))
    with begin(path) as store:
        assert store.missing == {0, 4}
    assert same(complete(path).read(META.chunk_box(2)), some_maps(META.chunk_box(2)))


def test_a_torn_last_line_of_the_log_is_no_commit(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    with begin(path) as store:
        store.write_chunk(2, some_maps(META.chunk_box(2)))
    log = tmp_path / "maps.zarr.partial" / "commits"
    with log.open("a") as file:
        file.write("4")
    with begin(path) as store:
        assert store.committed == {2}
        store.write_chunk(0, some_maps(META.chunk_box(0)))
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["2", "0"]


def test_a_beginning_torn_before_its_log_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    begin(path).close()
    (tmp_path / "maps.zarr.partial" / "commits").unlink()
    (tmp_path / "maps.zarr.partial" / "hv" / "zarr.json").unlink()
    assert complete(path).is_finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: replace(meta, geometry=TileGeometry(24, 4, 2)), "tiles.halo_px 8 there and 4 now"),
        (
            lambda meta: replace(meta, weights_sha256="ef" * 32),
            "weights_sha256 cdcdcdcdcdcd there and efefefefefef now",
        ),
        (lambda meta: replace(meta, precision="bf16"), "precision fp32 there and bf16 now"),
        (lambda meta: replace(meta, spec=replace(SPEC, mean=(0.5, 0.5, 0.6))), r"model.mean \[0.5, 0.5, 0.5\] there"),
        (lambda meta: replace(meta, tissue_settings={"mpp": 4.0}), "tissue.mpp 8.0 there and 4.0 now"),
    ],
)
@pytest.mark.parametrize("prepare", [lambda path: begin(path).close(), complete], ids=["partial", "finished"])
def test_other_settings_are_refused_by_name_with_the_way_to_start_afresh(
    tmp_path: Path, prepare: Callable[[Path], None], change: Callable[[StoreMeta], StoreMeta], message: str
) -> None:
    path = tmp_path / "maps.zarr"
    prepare(path)
    with pytest.raises(StoreError, match=f"{message}.*--overwrite"):
        begin(path, change(META))
    with begin(path, change(META), overwrite=True) as store:
        assert store.committed == set()
        assert not path.exists()


def test_another_tissue_mask_is_refused(tmp_path: Path) -> None:
    begin(tmp_path / "maps.zarr").close()
    with pytest.raises(StoreError, match="tissue_mask"):
        MapStore.resume_or_create(tmp_path / "maps.zarr", META, WANTED, ~TISSUE)


def test_a_finished_store_is_returned_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    renamed = replace(META, slide="the same file elsewhere", config_hash="other")
    assert begin(path, renamed).is_finished
    assert begin(path, replace(META, precision="bf16"), any_precision=True).is_finished
    assert sorted(file.name for file in tmp_path.iterdir()) == ["maps.zarr"]


def test_what_other_tools_leave_in_the_folder_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    (path / ".snakemake_timestamp").touch()
    assert MapStore.open(path).committed == set(WANTED)


def test_a_lost_chunk_is_told_and_not_read_as_empty(tmp_path: Path) -> None:
    store = complete(tmp_path / "maps.zarr")
    (tmp_path / "maps.zarr" / "nc" / "c" / "0" / "1" / "1").unlink()
    with pytest.raises(StoreError, match=r"lacks its chunks \[4\]"):
        store.read(META.grid.box)
    MapStore.open(tmp_path / "maps.zarr").read(META.chunk_box(0))


def store_file(path: Path, array: str, index: int) -> Path:
    place = [] if array == "np" else ["0"]
    return path.joinpath(array, "c", *place, *map(str, divmod(index, META.columns)))


@pytest.mark.parametrize("array", ["np", "hv", "nc"])
@pytest.mark.parametrize("harm", ["lost", "cut", "flipped", "swapped", "of another slide"])
def test_a_chunk_that_is_not_as_it_was_written_is_told_and_never_read(tmp_path: Path, array: str, harm: str) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    victim, other = store_file(path, array, 0), store_file(path, array, 2)
    content = victim.read_bytes()
    if harm == "lost":
        victim.unlink()
    elif harm == "cut":
        victim.write_bytes(content[:-1])
    elif harm == "flipped":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "swapped":
        victim.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        with begin(tmp_path / "other.zarr") as store:
            store.write_chunk(0, some_maps(META.chunk_box(0), seed=1))
        victim.write_bytes(store_file(tmp_path / "other.zarr.partial", array, 0).read_bytes())
    with pytest.raises(StoreError, match=r"lacks its chunks \[0\]" if harm == "lost" else r"chunks \[0.*are damaged"):
        MapStore.open(path).read(META.grid.box)
    MapStore.open(path).read(META.chunk_box(4))


@pytest.mark.parametrize("name", ["np", "hv", "nc", "tissue", "wanted"])
def test_an_array_of_another_size_is_told_before_it_fills_the_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    place = path / name / "zarr.json"
    about = json.loads(place.read_text())
    about["shape"][-1] = 10**12
    place.write_text(json.dumps(about))
    with pytest.raises(StoreError, match="is damaged"):
        MapStore.open(path)


@pytest.mark.parametrize("name", ["np", "hv", "nc"])
@pytest.mark.parametrize("change", ["fill value", "turned"])
def test_an_array_that_would_be_read_otherwise_than_it_was_written_is_told(
    tmp_path: Path, name: str, change: str
) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    place = path / name / "zarr.json"
    about = json.loads(place.read_text())
    if change == "fill value":
        about["fill_value"] = 7
    else:
        order = [*range(len(about["shape"]) - 2), len(about["shape"]) - 1, len(about["shape"]) - 2]
        about["codecs"].insert(0, {"name": "transpose", "configuration": {"order": order}})
    place.write_text(json.dumps(about))
    with pytest.raises(StoreError, match=f"damaged.*its array {name} is"):
        MapStore.open(path)


@pytest.mark.parametrize(
    "change", [{"grid": {"mpp_x0": 0.5}}, {"slide": {"fingerprint": "ee"}}, {"counts": {"tiles": 1}}, {"new": {"a": 1}}]
)
def test_attributes_that_were_changed_are_told(tmp_path: Path, change: dict[str, dict[str, object]]) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    about = json.loads((path / "zarr.json").read_text())
    for key, values in change.items():
        about["attributes"].setdefault(key, {}).update(values)
    (path / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(StoreError, match="attributes do not have their checksum"):
        MapStore.open(path)


@pytest.mark.parametrize("name", ["tissue", "wanted"])
def test_a_changed_mask_or_table_of_chunks_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    array = zarr.open_group(path, mode="r+")[name]
    array[0, 0] = 7 * (array[0, 0] == 0)
    with pytest.raises(StoreError, match="damaged"):
        _ = MapStore.open(path).tissue


def test_empty_maps_of_a_chunk_with_tissue_are_not_taken_for_lost(tmp_path: Path) -> None:
    with MapStore.resume_or_create(tmp_path / "maps.zarr", META, {0: 4}, TISSUE) as store:
        maps = some_maps(META.chunk_box(0))
        store.write_chunk(0, Maps(maps.nuclei * 0, maps.offsets * 0, maps.types * 0))
        store.finish()
    assert not store.read(META.grid.box).types.any()


def test_a_reader_follows_a_store_that_is_finished_under_its_hands(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    with begin(path) as store:
        store.write_chunk(0, some_maps(META.chunk_box(0)))
        reader = MapStore.open(path, unfinished=True)
        assert same(reader.read(META.chunk_box(0)), some_maps(META.chunk_box(0)))
        with pytest.raises(StoreError, match="lacks"):
            reader.read(META.chunk_box(2))
        for index in store.missing:
            store.write_chunk(index, some_maps(META.chunk_box(index)))
        store.finish()
    np.testing.assert_array_equal(reader.tissue, TISSUE)
    assert same(reader.read(META.chunk_box(2)), some_maps(META.chunk_box(2)))


def test_a_store_that_is_finished_while_a_reader_looks_for_its_log_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "maps.zarr", Path.read_text
    with begin(path) as store:
        reader = MapStore.open(path, unfinished=True)
        for index in store.missing:
            store.write_chunk(index, some_maps(META.chunk_box(index)))

        def read_text(file: Path, *rest: str, **options: str) -> str:
            if file.name == "commits" and not path.exists():
                store.finish()
            return original(file, *rest, **options)

        monkeypatch.setattr(Path, "read_text", read_text)
        assert same(reader.read(META.chunk_box(2)), some_maps(META.chunk_box(2)))
    assert path.exists()


def test_a_store_that_is_finished_while_it_is_being_opened_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "maps.zarr", store_module.read_attributes
    with begin(path) as store:
        for index in store.missing:
            store.write_chunk(index, some_maps(META.chunk_box(index)))

        def read_attributes(root: Path) -> dict[str, Any]:
            if not path.exists():
                store.finish()
            return original(root)

        monkeypatch.setattr(store_module, "read_attributes", read_attributes)
        assert MapStore.open(path, unfinished=True).is_finished


def test_a_store_that_another_process_finishes_before_it_is_locked_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other, original = tmp_path / "maps.zarr", begin(tmp_path / "maps.zarr"), store_module.Lock
    for index in other.missing:
        other.write_chunk(index, some_maps(META.chunk_box(index)))

    def lock(place: Path) -> Lock:
        other.finish()
        return original(place)

    monkeypatch.setattr(store_module, "Lock", lock)
    with begin(path) as store:
        assert store.is_finished
    assert [file.name for file in tmp_path.iterdir()] == ["maps.zarr"]


def test_a_torn_list_of_unread_places_is_mended_as_its_chunk_is_made_again(tmp_path: Path) -> None:
    path, place = tmp_path / "maps.zarr", Box(512, 0, 768, 256)
    with begin(path) as store:
        (path.with_name("maps.zarr.partial") / "unread").write_text("1024 2048 12")
    with begin(path) as store:
        for index in sorted(store.missing):
            store.write_chunk(index, some_maps(META.chunk_box(index)), unread=[place])
        store.finish()
    assert MapStore.open(path).unread == [place]


def test_threads_that_share_a_reader_see_no_holes_while_the_store_is_finished(tmp_path: Path) -> None:
    whole = META.grid.box
    for attempt in range(10):
        path = tmp_path / f"{attempt}.zarr"
        with begin(path) as store, ThreadPoolExecutor(4) as pool:
            for index in store.missing:
                store.write_chunk(index, some_maps(META.chunk_box(index)))
            reader, expected = MapStore.open(path, unfinished=True), store.read(whole)
            reads = [pool.submit(reader.read, whole) for _ in range(40)]
            store.finish()
            assert all(same(read.result(), expected) for read in reads)


@pytest.mark.parametrize("files", [{}, {"zarr.json": "{"}, {"zarr.json": "{}"}, {"zarr.json": '{"attributes": {}}'}])
def test_a_folder_of_others_is_neither_read_nor_deleted(tmp_path: Path, files: dict[str, str]) -> None:
    path = tmp_path / "results"
    path.mkdir()
    (path / "thesis.txt").write_text("all of it")
    for name, text in files.items():
        (path / name).write_text(text)
    with pytest.raises(StoreError, match="not a map store"):
        MapStore.open(path)
    with pytest.raises(StoreError, match="not a map store"):
        begin(path, overwrite=True)
    assert (path / "thesis.txt").read_text() == "all of it"
    assert not (tmp_path / "results.lock").exists()


def test_another_format_version_is_refused_but_may_be_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    attributes = json.loads((path / "zarr.json").read_text())
    attributes["attributes"]["wsipipe"]["format"] = 99
    (path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(StoreError, match="format version 99"):
        MapStore.open(path)
    begin(path, overwrite=True).close()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("zarr.json", ""),
        ("zarr.json", '{"attributes": {"wsipipe": {"format": 1}}}'),
        ("np/zarr.json", ""),
        ("commits", "rubbish\n"),
    ],
)
def test_what_cannot_be_gone_on_with_is_begun_again_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, text: str
) -> None:
    path = tmp_path / "maps.zarr"
    with begin(path) as store:
        store.write_chunk(0, some_maps(META.chunk_box(0)))
    (tmp_path / "maps.zarr.partial" / file).write_text(text)
    (tmp_path / "maps.zarr.discarded" / "np").mkdir(parents=True)  # left by a kill
    with begin(path) as store:
        assert store.missing == WANTED.keys()
    assert "starting afresh" in caplog.text
    assert not (tmp_path / "maps.zarr.discarded").exists()


def test_what_another_moment_or_a_newer_version_could_go_on_with_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, about = tmp_path / "maps.zarr", tmp_path / "maps.zarr.partial" / "zarr.json"
    with begin(path) as store:
        store.write_chunk(0, some_maps(META.chunk_box(0)))
    real = Path.read_bytes

    def failing(file: Path) -> bytes:
        if file == about:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(file)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match="Too many open files"):
        begin(path)
    monkeypatch.undo()
    text = about.read_text()
    attributes = json.loads(text)
    attributes["attributes"]["wsipipe"]["format"] = 99
    about.write_text(json.dumps(attributes))
    with pytest.raises(StoreError, match="format version 99"):
        begin(path)
    about.write_text(text)
    with begin(path) as store:
        assert store.committed == {0}


def test_a_store_of_ours_may_be_overwritten_whatever_became_of_it(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    (path / "zarr.json").write_text("")
    (tmp_path / "maps.zarr.discarded" / "np").mkdir(parents=True)  # left by a kill
    begin(path, overwrite=True).close()
    assert not (tmp_path / "maps.zarr.discarded").exists()


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError(errno.EIO, "Input/output error"), OSError, "^(?!.*damaged)"),
        (MemoryError("5 GiB"), StoreError, "there is not the memory to read"),
        (ValueError("zstd"), StoreError, "is damaged .*--overwrite"),
    ],
)
def test_only_what_is_damaged_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], says: str
) -> None:
    store = complete(tmp_path / "maps.zarr")

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(store, "_read", failing)
    with pytest.raises(kind, match=says):
        store.read(META.grid.box)


def test_a_damaged_store_is_told(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    complete(path)
    (path / "hv" / "zarr.json").unlink()
    with pytest.raises(StoreError, match="is damaged"):
        MapStore.open(path)


def test_two_writers_of_one_store_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    store = begin(path)
    with pytest.raises(StoreError, match=f"in use by process {os.getpid()} on"):
        begin(path)
    with pytest.raises(StoreError, match="in use"):
        begin(path, overwrite=True)
    store.close()
    begin(path).close()
    assert not (tmp_path / "maps.zarr.lock").exists()


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from wsipipe.lock import Lock; "
        "lock = Lock(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "maps.zarr"
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -9
    assert (tmp_path / "maps.zarr.lock").exists()
    begin(path).close()


def test_maps_of_another_shape_or_place_are_refused(tmp_path: Path) -> None:
    with begin(tmp_path / "maps.zarr") as store:
        with pytest.raises(ValueError, match="not those of chunk 2"):
            store.write_chunk(2, some_maps(META.chunk_box(0)))
        with pytest.raises(ValueError, match="not those of chunk 1"):
            store.write_chunk(1, some_maps(META.chunk_box(1)))


def test_a_slide_without_tissue_makes_an_empty_complete_store(tmp_path: Path) -> None:
    empty: npt.NDArray[np.bool_] = np.zeros((2, 3), bool)
    with MapStore.resume_or_create(tmp_path / "maps.zarr", META, {}, empty) as store:
        store.finish()
    assert not MapStore.open(tmp_path / "maps.zarr").read(META.grid.box).types.any()
