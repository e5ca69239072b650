"""The maps stage on a drawn slide, with a network that reads its answer from the colours."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from wsipipe.config import Config, load_config
from wsipipe.errors import ConfigError, ModelError, SettingsError, SlideError, StoreError
from wsipipe.folder import record_of
from wsipipe.geometry import Box, Grid
from wsipipe.maps import Maps, to_input, to_maps
from wsipipe.model.spec import ModelSpec
from wsipipe.stages import maps as stage
from wsipipe.stages.maps import MapsSummary, make_maps
from wsipipe.store import MapStore

HALO = 8
SPEC = ModelSpec(
    name="oracle",
    architecture="oracle",
    settings={},
    mpp=0.5,
    tile_px=48,
    halo_px=HALO,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    class_names=("background", "blue", "green"),
    class_colours=((0, 0, 0), (0, 0, 255), (0, 255, 0)),
    source="drawn",
    licence="Apache-2.0",
)
SHA256 = "ab" * 32
CONFIG = load_config(overrides={"maps": {"chunk_tiles": 2}})
GRID = Grid.over(420, 300, 0.25, 0.25, 0.5)  # 210 x 150 px: 7 x 5 cores, 4 x 3 chunks


class DrawnSlide:
    """Every pixel has a colour of its own; white beyond the border."""

    name = "drawn"
    path = "drawn.svs"
    fingerprint = "cd" * 32
    unread: frozenset[Box] = frozenset()
    skips_unread = False

    def __init__(self) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (GRID.height, GRID.width, 3), np.uint8)
        self.reads: list[Box] = []

    def grid(self, mpp: float) -> Grid:
        assert mpp == SPEC.mpp
        return GRID

    def read(self, box: Box, grid: Grid) -> npt.NDArray[np.uint8]:
        assert grid == GRID
        self.reads.append(box)
        found = np.full((*box.shape, 3), 255, np.uint8)
        inside = box.clipped(grid.box)
        if not inside.is_empty:
            found[inside.within(box).slices] = self.pixels[inside.slices]
        return found


class DrawnTissue:
    """Tissue is where the low-resolution mask says so."""

    def __init__(self, mask: npt.ArrayLike) -> None:
        self.mask = np.asarray(mask, bool)
        height, width = self.mask.shape
        self.grid = Grid(width, height, 420 / width, 300 / height, 0.25, 0.25)
        self.region = None

    def reaches(self, box: Box, grid: Grid) -> bool:
        (x0, y0), (x1, y1) = self.grid.from_px0(grid.to_px0([[box.x0, box.y0], [box.x1, box.y1]]))
        return bool(self.mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))].any())


TISSUE = DrawnTissue([[1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1]])


class Oracle(nn.Module):
    """NP, HV and NC from the mean colour round a pixel: wrong near the border of what it is shown."""

    def __init__(self, before: Callable[[int, torch.Tensor], None] = lambda call, x: None) -> None:
        super().__init__()
        self.calls = 0
        self.before = before

    def __deepcopy__(self, memo: dict[int, Any]) -> "Oracle":
        return self  # so that its calls can be counted, whoever makes them

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        self.before(self.calls, x)
        mean = nn.functional.avg_pool2d(x, 2 * HALO + 1, stride=1, padding=HALO) + 0.5 * x
        return {"nuclei": 4 * mean[:, :2], "offsets": 2 * mean[:, 1:], "types": 3 * mean}


def run(out: Path, network: nn.Module | None = None, **options: Any) -> MapsSummary:
    slide, tissue = options.pop("slide", DrawnSlide()), options.pop("tissue", TISSUE)
    spec, config = options.pop("spec", SPEC), options.pop("config", CONFIG)
    options = {"device": "cpu", "precision": "fp32", "batch_size": 4, "readers": 2, **options}
    return make_maps(slide, tissue, (network or Oracle(), spec, SHA256), out, config, **options)


def files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def whole_slide(slide: DrawnSlide) -> Maps:
    """The network's answer to the whole slide at once."""
    pixels = torch.from_numpy(slide.read(GRID.box.grown(HALO), GRID))[None]
    x = to_input(pixels, SPEC.mean, SPEC.std, device=torch.device("cpu"), dtype=torch.float32)
    maps = to_maps(Oracle()(x), HALO)
    return Maps(*(values[0].numpy() for values in maps[:3]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "maps.zarr"
    run(out)
    return out


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_run() -> Any:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("reader", "writer"))]


def test_tiles_with_tissue_hold_the_maps_of_the_whole_slide_and_others_nothing(undisturbed: Path) -> None:
    store = MapStore.open(undisturbed)
    found, expected = store.read(GRID.box), whole_slide(DrawnSlide())
    tiles = 0
    for y in range(0, GRID.height, 32):
        for x in range(0, GRID.width, 32):
            core = Box(x, y, x + 32, y + 32).clipped(GRID.box)
            has_tissue = TISSUE.reaches(core, GRID)
            tiles += has_tissue
            for one, other in (
                (found.nuclei, expected.nuclei),
                (found.offsets, expected.offsets),
                (found.types, expected.types),
            ):
                answer = other[..., *core.slices] if has_tissue else 0 * other[..., *core.slices]
                np.testing.assert_array_equal(one[..., *core.slices], answer)
    assert 0 < tiles < 35
    assert sum(store.wanted.values()) == tiles


def test_the_store_tells_of_what_it_was_made(undisturbed: Path) -> None:
    store = MapStore.open(undisturbed)
    assert (store.meta.slide, store.meta.fingerprint) == ("drawn", DrawnSlide.fingerprint)
    assert (store.meta.grid, store.meta.spec, store.meta.weights_sha256) == (GRID, SPEC, SHA256)
    assert store.meta.geometry.chunk_px == 64
    np.testing.assert_array_equal(store.tissue, TISSUE.mask)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 5, "readers": 1}, {"batch_size": 64}])
def test_batches_and_readers_change_nothing(tmp_path: Path, undisturbed: Path, options: dict[str, int]) -> None:
    run(tmp_path / "maps.zarr", **options)
    assert files(tmp_path / "maps.zarr") == files(undisturbed)


@pytest.mark.parametrize(("tile_px", "halo_px"), [(64, 8), (32, 8)])
def test_the_cut_into_tiles_changes_nothing_where_both_have_tissue(
    tmp_path: Path, undisturbed: Path, tile_px: int, halo_px: int
) -> None:
    config = load_config(overrides={"maps": {"tile_px": tile_px, "halo_px": halo_px, "chunk_tiles": 3}})
    run(tmp_path / "maps.zarr", config=config)
    other = MapStore.open(tmp_path / "maps.zarr").read(GRID.box)
    maps = MapStore.open(undisturbed).read(GRID.box)
    both = (other.types > 0).any(0) & (maps.types > 0).any(0)
    assert both.any()
    np.testing.assert_array_equal(other.types[:, both], maps.types[:, both])


def test_neighbouring_tiles_are_read_at_once_and_distant_ones_singly(tmp_path: Path) -> None:
    slide = DrawnSlide()
    run(tmp_path / "maps.zarr", slide=slide, tissue=DrawnTissue([[1]]), batch_size=4)
    read = sum(box.width * box.height for box in slide.reads)
    assert len(slide.reads) < 35
    assert read < 35 * SPEC.tile_px**2
    config = load_config(overrides={"maps": {"chunk_tiles": 7}})
    corners = DrawnTissue([[1, 0, 0, 0, 0, 0, 1], *[[0] * 7] * 3, [1, 0, 0, 0, 0, 0, 1]])
    slide = DrawnSlide()
    run(tmp_path / "corners.zarr", slide=slide, tissue=corners, config=config, batch_size=64)
    assert {box.shape for box in slide.reads} == {(SPEC.tile_px, SPEC.tile_px)}


def fail_at(call: int) -> Callable[[int, torch.Tensor], None]:
    def before(now: int, _: torch.Tensor) -> None:
        if now == call:
            raise RuntimeError("the network broke")

    return before


def test_a_run_that_failed_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsipipe.device.MOST_NETWORKS", 1)  # so that calls come in the order of batches
    out = tmp_path / "maps.zarr"
    with pytest.raises(RuntimeError, match="the network broke") as caught:
        run(out, Oracle(fail_at(4)))
    assert "running the network: the tile at x" in caught.value.__notes__[0]
    assert not out.exists()
    left = MapStore.open(out, unfinished=True)
    assert 0 < len(left.committed) < len(left.wanted)
    oracle = Oracle()
    summary = run(out, oracle)
    assert summary.chunks_before == len(left.committed)
    assert summary.tiles == sum(tiles for index, tiles in left.wanted.items() if index not in left.committed)
    assert oracle.calls < 5
    assert files(out) == files(undisturbed)


def test_a_resumed_run_shows_the_network_the_batches_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsipipe.device.MOST_NETWORKS", 1)  # so that they come in their order
    seen: dict[str, list[bytes]] = {"undisturbed": [], "resumed": []}

    def recorder(name: str) -> Oracle:
        return Oracle(lambda _, x: seen[name].append(x.numpy().tobytes()))

    run(tmp_path / "a.zarr", recorder("undisturbed"), batch_size=3)
    with pytest.raises(RuntimeError):
        run(tmp_path / "b.zarr", Oracle(fail_at(5)), batch_size=3)
    run(tmp_path / "b.zarr", recorder("resumed"), batch_size=3)
    assert seen["resumed"] == seen["undisturbed"][-len(seen["resumed"]) :]
    assert len(seen["resumed"]) < len(seen["undisturbed"])


@pytest.mark.parametrize(("how", "code"), [("SIGKILL", -9), ("SIGTERM", 143)])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, how: str, code: int
) -> None:
    script = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_stage_maps as here
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
def kill(call, _):
    if call == 4:
        while not here.MapStore.open(Path(sys.argv[2]), unfinished=True).committed:
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
here.run(Path(sys.argv[2]), here.Oracle(kill))
"""
    out = tmp_path / "maps.zarr"
    command = [sys.executable, "-W", "error", "-c", script, str(Path(__file__).parent), str(out), how]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    assert not out.exists()
    committed = MapStore.open(out, unfinished=True).committed
    assert len(committed) >= 1
    assert run(out).chunks_before == len(committed)
    assert files(out) == files(undisturbed)


def test_an_interrupted_run_keeps_what_it_has_computed(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsipipe.device.MOST_NETWORKS", 1)  # so that calls come in the order of batches

    def before(call: int, _: torch.Tensor) -> None:
        if call == 4:
            raise KeyboardInterrupt

    out = tmp_path / "maps.zarr"
    with pytest.raises(KeyboardInterrupt):
        run(out, Oracle(before))
    left = MapStore.open(out, unfinished=True)
    computed = 3 * 4
    assert sum(left.wanted[index] for index in left.committed) > computed - CONFIG.maps.chunk_tiles**2
    run(out)
    assert files(out) == files(undisturbed)


@pytest.mark.parametrize("at", range(2, 9))
def test_a_run_that_is_interrupted_as_it_hands_over_a_tile_counts_no_tile_twice(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    class Interrupted(ThreadPoolExecutor):
        calls = 0

        def submit(self, *arguments: Any, **named: Any) -> Any:
            submitted = super().submit(*arguments, **named)
            if self._thread_name_prefix == "writer":
                self.calls += 1
                if self.calls == at:
                    raise KeyboardInterrupt
            return submitted

    out, options = tmp_path / "maps.zarr", {"batch_size": 1, "readers": 1}
    with monkeypatch.context() as patched:
        patched.setattr("wsipipe.stages.pipeline.ThreadPoolExecutor", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(out, **options)
    run(out, **options)
    assert files(out) == files(undisturbed)


def test_a_finished_store_is_left_as_it_is_and_the_network_not_asked(tmp_path: Path) -> None:
    out = tmp_path / "maps.zarr"
    run(out)
    before, oracle = files(out), Oracle()
    calls: list[int] = []
    summary = run(out, oracle, on_chunk=calls.append)
    assert (oracle.calls, summary.tiles, summary.chunks, calls) == (0, 0, 0, [])
    assert files(out) == before
    with pytest.raises(StoreError, match=r"weights_sha256.*--overwrite"):
        make_maps(DrawnSlide(), TISSUE, (oracle, SPEC, "ef" * 32), out, CONFIG, device="cpu")  # type: ignore[arg-type]
    run(out, oracle, overwrite=True)
    assert oracle.calls > 0


def test_no_record_tells_of_maps_that_it_was_not_written_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "maps.zarr"
    run(out)
    before = record_of(out).read_bytes()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "write_record", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out, config=load_config(overrides={"maps": {"chunk_tiles": 1}}), overwrite=True)
    monkeypatch.undo()
    assert not record_of(out).exists()
    run(out, config=load_config(overrides={"maps": {"chunk_tiles": 1}}))
    assert record_of(out).read_bytes() != before


def test_white_for_what_could_not_be_read_is_not_kept_where_it_was_not_asked_for(tmp_path: Path) -> None:
    out, slide = tmp_path / "maps.zarr", DrawnSlide()
    run(out)
    (out / "unread").write_text("0 0 256 256\n")
    with pytest.raises(SettingsError, match=r"is white where .*--skip-bad-tiles.*--overwrite"):
        run(out)
    slide.skips_unread = True
    make_maps(slide, TISSUE, (Oracle(), SPEC, SHA256), out, CONFIG, device="cpu")  # type: ignore[arg-type]


def test_a_slide_without_tissue_has_a_complete_and_empty_store(tmp_path: Path) -> None:
    oracle = Oracle()
    summary = run(tmp_path / "maps.zarr", oracle, tissue=DrawnTissue(np.zeros((3, 4))))
    assert (summary.tiles, summary.chunks, oracle.calls) == (0, 0, 0)
    assert not MapStore.open(tmp_path / "maps.zarr").read(GRID.box).types.any()


def test_chunks_are_announced_once_when_they_can_be_read_also_those_of_an_earlier_run(tmp_path: Path) -> None:
    out = tmp_path / "maps.zarr"
    with pytest.raises(RuntimeError):
        run(out, Oracle(fail_at(4)))
    told: list[int] = []

    def on_chunk(index: int) -> None:
        store = MapStore.open(out, unfinished=True)
        assert store.read(store.meta.chunk_box(index)).types.any()
        told.append(index)

    run(out, on_chunk=on_chunk)
    assert told == sorted(MapStore.open(out).wanted)


def test_what_a_listener_raises_stops_the_run_and_the_chunk_stays(tmp_path: Path) -> None:
    def on_chunk(index: int) -> None:
        raise LookupError("no worker")

    out = tmp_path / "maps.zarr"
    with pytest.raises(LookupError, match="no worker"):
        run(out, on_chunk=on_chunk)
    assert MapStore.open(out, unfinished=True).committed
    run(out)


def test_a_slide_that_cannot_be_read_stops_the_run_and_names_the_place(tmp_path: Path, undisturbed: Path) -> None:
    class TornSlide(DrawnSlide):
        def read(self, box: Box, grid: Grid) -> npt.NDArray[np.uint8]:
            if box.y0 >= 50:
                raise SlideError("strip 7 is torn")
            return super().read(box, grid)

    out, oracle = tmp_path / "maps.zarr", Oracle()
    with pytest.raises(SlideError, match=r"strip 7 is torn \(reading: the tile at x \d+, y 128 px of level 0"):
        run(out, oracle, slide=TornSlide())
    assert MapStore.open(out, unfinished=True).committed  # what came before is kept
    run(out)
    assert files(out) == files(undisturbed)


def test_a_full_disk_stops_the_run_and_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write_chunk(store: MapStore, index: int, *rest: Any) -> None:
        written.append(index)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        original(store, index, *rest)

    original = MapStore.write_chunk
    monkeypatch.setattr(MapStore, "write_chunk", write_chunk)
    out = tmp_path / "maps.zarr"
    with pytest.raises(OSError, match="No space left") as caught:
        run(out)
    assert "writing: the tile at x" in caught.value.__notes__[0]
    assert MapStore.open(out, unfinished=True).committed == {written[0]}  # in order: none after the one that failed


def test_too_little_room_is_told_before_the_first_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "FREE_BYTES_PER_PX", 1e15)
    oracle = Oracle()
    with pytest.raises(StoreError, match="make room"):
        run(tmp_path / "maps.zarr", oracle)
    assert oracle.calls == 0


def test_out_of_memory_halves_the_batch_and_changes_nothing(
    tmp_path: Path, undisturbed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsipipe.device.MOST_NETWORKS", 1)  # as on a GPU
    sizes = []

    def before(_: int, x: torch.Tensor) -> None:
        sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with caplog.at_level(logging.WARNING):
        run(tmp_path / "maps.zarr", Oracle(before), batch_size=8)
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[2:]) == 2
    assert "going on with batches of 2 tiles" in caplog.messages[-1]
    assert files(tmp_path / "maps.zarr") == files(undisturbed)


def test_batches_that_run_out_of_memory_together_halve_their_size_once(
    tmp_path: Path, undisturbed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsipipe.device.usable_cpus", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together, left = threading.Barrier(3), iter(range(3))

    def before(_: int, x: torch.Tensor) -> None:
        if next(left, None) is not None:
            together.wait(30)
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with caplog.at_level(logging.WARNING):
        run(tmp_path / "maps.zarr", Oracle(before))
    assert [message.endswith("batches of 2 tiles") for message in caplog.messages] == [True] * 3
    assert files(tmp_path / "maps.zarr") == files(undisturbed)


def test_a_single_tile_out_of_memory_is_told_with_the_remedy(tmp_path: Path) -> None:
    def before(_: int, x: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match="too little memory for one tile of 48 px; take smaller tiles"):
        run(tmp_path / "maps.zarr", Oracle(before))


def test_an_answer_that_is_no_number_is_never_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsipipe.device.MOST_NETWORKS", 1)  # so that calls come in the order of batches

    def before(call: int, x: torch.Tensor) -> None:
        if call == 2:
            x[1] = torch.nan

    out = tmp_path / "maps.zarr"
    with pytest.raises(ModelError, match=r"no number at the tile at x \d+, y \d+ px .* try --precision fp32"):
        run(out, Oracle(before))
    assert len(MapStore.open(out, unfinished=True).committed) <= 1


@pytest.mark.parametrize("types", [2, 1])
def test_a_network_that_answers_otherwise_than_described_is_refused(tmp_path: Path, types: int) -> None:
    change = {"class_names": SPEC.class_names[:types], "class_colours": SPEC.class_colours[:types]}
    with pytest.raises(ModelError, match="do not belong together"):
        run(tmp_path / "maps.zarr", spec=replace(SPEC, **change))


def test_a_network_without_types_has_background_alone(tmp_path: Path) -> None:
    class NoTypes(Oracle):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: values for name, values in super().forward(x).items() if name != "types"}

    run(tmp_path / "maps.zarr", NoTypes(), spec=replace(SPEC, class_names=("background",), class_colours=((0, 0, 0),)))
    assert np.unique(MapStore.open(tmp_path / "maps.zarr").read(GRID.box).types).tolist() == [0, 255]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"readers": 0}, {"precision": "int8"}, {"device": "tpu"}])
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        run(tmp_path / "maps.zarr", **options)
    assert not list(tmp_path.iterdir())


def test_a_chunk_that_fits_no_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"maps\.chunk_tiles: chunks of 16416 px .* at most 512 tiles a side"):
        run(tmp_path / "maps.zarr", config=load_config(overrides={"maps": {"chunk_tiles": 513}}))
    assert not list(tmp_path.iterdir())


def test_a_tile_all_halo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"maps\.halo_px"):
        run(tmp_path / "maps.zarr", config=Config.model_validate({"maps": {"halo_px": 24}}))


def test_the_summary_names_the_bottleneck(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class SlowSlide(DrawnSlide):
        def read(self, box: Box, grid: Grid) -> npt.NDArray[np.uint8]:
            threading.Event().wait(0.2)
            return super().read(box, grid)

    with caplog.at_level(logging.INFO, logger="wsipipe"):
        summary = run(tmp_path / "maps.zarr", slide=SlowSlide(), readers=1, tissue=DrawnTissue([[1]]), progress=True)
    assert summary.bottleneck == "readers"
    assert summary.seconds_readers > 0.5 * summary.seconds
    assert (summary.tiles, summary.chunks) == (35, 12)
    assert summary.megapixels == GRID.width * GRID.height / 1e6
    assert "the bottleneck is the readers" in caplog.messages[-1]
    assert any("maps of drawn" in line for line in caplog.messages)


def test_memory_in_flight_is_bounded_whatever_the_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsipipe.device.MOST_NETWORKS", 1)
    begun, answered = [0], [0]
    most = [0]

    class CountedSlide(DrawnSlide):
        def read(self, box: Box, grid: Grid) -> npt.NDArray[np.uint8]:
            begun[0] += 1
            most[0] = max(most[0], begun[0] - answered[0])
            return super().read(box, grid)

    def before(_: int, x: torch.Tensor) -> None:
        threading.Event().wait(0.02)
        answered[0] += 1

    run(tmp_path / "maps.zarr", Oracle(before), slide=CountedSlide(), batch_size=1, tissue=DrawnTissue([[1]]))
    assert begun[0] == 35
    assert most[0] <= 6  # readers + 1 ahead, the one being cut, one that waits for the network, one in it


def test_a_batch_runs_on_each_core_and_the_maps_are_the_same(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsipipe.device.usable_cpus", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together, left = threading.Barrier(3), iter(range(3))

    def before(_: int, x: torch.Tensor) -> None:
        if next(left, None) is not None:
            together.wait(30)  # breaks unless three are in the network at a time

    run(tmp_path / "maps.zarr", Oracle(before))
    assert files(tmp_path / "maps.zarr") == files(undisturbed)


def test_a_run_in_another_process_is_told(tmp_path: Path) -> None:
    def before(_: int, x: torch.Tensor) -> None:
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
            run(tmp_path / "maps.zarr")

    run(tmp_path / "maps.zarr", Oracle(before))


def test_signals_are_left_to_the_caller(tmp_path: Path) -> None:
    handlers = [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)]
    run(tmp_path / "maps.zarr")
    assert [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)] == handlers
