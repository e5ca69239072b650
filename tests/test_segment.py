"""From a slide file to all its results: with a network that reads the truth from the colours."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import cv2
import geopandas
import numpy as np
import pyarrow as pa
import pytest
import shapely
from shapely.geometry import mapping

from wsipipe.config import Config, TissueConfig, load_config
from wsipipe.errors import ConfigError, SettingsError, StoreError
from wsipipe.folder import ResultFolder, record_of
from wsipipe.lock import Lock
from wsipipe.model.weights import load_model
from wsipipe.slide import open_slide
from wsipipe.stages.export import make_export
from wsipipe.stages.maps import make_maps
from wsipipe.stages.nuclei import find_nuclei, make_nuclei
from wsipipe.stages.report import make_report
from wsipipe.stages.segment import segment
from wsipipe.stages.tissue import find_tissue, make_tissue, read_tissue, write_tissue
from wsipipe.stages.workers import AHEAD
from wsipipe.store import MapStore
from wsipipe.table import NucleiSpool, read_nuclei
from wsipipe.tissue import TissueMask

FILES = ("tissue.png", "nuclei.parquet", "nuclei.geojson.gz", "overlay.png")


def run(slide_path, out, model, config=None, mpp=None, **options):
    with open_slide(slide_path, mpp) as slide:
        options = {"device": "cpu", "precision": "fp32", **options}
        return segment(slide, load_model(model), ResultFolder(out), config or Config(), **options)


def results(out: Path) -> dict[str, bytes]:
    """All that a run leaves but its records, which tell times and commands."""
    kept = [out / name for name in FILES] + sorted((out / "maps.zarr").rglob("*"))
    return {str(file.relative_to(out)): file.read_bytes() for file in kept if file.is_file() and file.name != "commits"}


def test_twelve_discs_in_twelve_nuclei_out(tiny, oracle, tmp_path):
    summary = run(tiny.path, tmp_path / "out", oracle)
    assert summary.nuclei.counts == {"round": 12, "other": 0}
    table = geopandas.read_parquet(tmp_path / "out" / "nuclei.parquet").sort_values(["x_px0", "y_px0"])
    for disc, (_, nucleus) in zip(sorted(tiny.discs, key=lambda d: (d.x, d.y)), table.iterrows(), strict=True):
        assert np.hypot(nucleus.x_px0 - disc.x, nucleus.y_px0 - disc.y) < 0.5
        assert nucleus.area_um2 == pytest.approx(np.pi * (disc.radius * tiny.mpp) ** 2, rel=0.06)
        assert nucleus.geometry.contains(shapely.Point(disc.x, disc.y))
        assert nucleus.type == "round"
        assert nucleus.probability > 0.9
    assert summary.tissue_mm2 == pytest.approx(np.pi * 350 * 300 * 0.25**2 / 1e6, rel=0.2)  # at 8 µm/px


def test_the_stages_one_by_one_give_the_bytes_of_the_whole(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "whole", oracle)
    folder = ResultFolder(tmp_path / "steps")
    folder.prepare()
    with open_slide(tiny.path) as slide:
        make_tissue(slide, folder.tissue, Config().tissue)
        tissue = read_tissue(folder.tissue, slide)
        make_maps(slide, tissue, load_model(oracle), folder.maps, Config(), device="cpu", precision="fp32")
        make_nuclei(slide, folder.maps, folder.nuclei, Config().nuclei, workers=1)
        make_export(slide, tissue, folder.nuclei, folder.geojson, folder.overlay)
    assert results(folder.path) == results(tmp_path / "whole")


def test_chunks_change_no_byte_of_the_table(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "large", oracle)
    run(tiny.path, tmp_path / "small", oracle, load_config(overrides={"maps": {"chunk_tiles": 1}}))
    tables = {(tmp_path / name / "nuclei.parquet").read_bytes() for name in ("large", "small")}
    assert len(tables) == 1


def test_parts_of_an_earlier_export_go_and_what_others_put_there_stays(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    folder = ResultFolder(tmp_path / "out")
    (folder.path / "nuclei-009.geojson.gz").touch()

    def exported(**options):
        with open_slide(tiny.path) as slide:
            tissue = read_tissue(folder.tissue, slide)
            make_export(slide, tissue, folder.nuclei, folder.geojson, folder.overlay, **options)
        return sorted(file.name.removesuffix(".geojson.gz") for file in folder.path.glob("*.geojson.gz"))

    assert exported(split=4) == ["nuclei-001", "nuclei-002", "nuclei-003", "nuclei-009"]
    assert exported(split=6) == ["nuclei-001", "nuclei-002", "nuclei-009"]
    assert exported() == ["nuclei", "nuclei-009"]


def test_parts_go_though_an_export_failed_meanwhile(tiny, oracle, tmp_path, monkeypatch):
    run(tiny.path, tmp_path / "out", oracle)
    folder = ResultFolder(tmp_path / "out")

    def exported(**options):
        with open_slide(tiny.path) as slide:
            tissue = read_tissue(folder.tissue, slide)
            make_export(slide, tissue, folder.nuclei, folder.geojson, folder.overlay, **options)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("wsipipe.stages.export.draw_overlay", full)
    with pytest.raises(OSError, match="no space"):
        exported(split=4)
    monkeypatch.undo()
    exported()
    assert [file.name for file in folder.path.glob("*.geojson.gz")] == ["nuclei.geojson.gz"]


def test_no_record_tells_of_a_table_that_it_was_not_written_for(tiny, oracle, tmp_path, monkeypatch):
    run(tiny.path, tmp_path / "out", oracle)
    folder, few = ResultFolder(tmp_path / "out"), Config().nuclei.model_copy(update={"min_area_um2": 50.0})

    def made(**options):
        with open_slide(tiny.path) as slide:
            return make_nuclei(slide, folder.maps, folder.nuclei, few, **options).meta.counts

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("wsipipe.stages.nuclei.check_seams", killed)
    with pytest.raises(KeyboardInterrupt):
        made(overwrite=True)
    assert not record_of(folder.nuclei).exists()
    monkeypatch.undo()
    counts = made()
    assert 0 < sum(counts.values()) < 12
    assert json.loads(record_of(folder.nuclei).read_bytes())["nuclei"] == counts


def test_a_fresh_start_that_is_refused_loses_nothing(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    folder, before = ResultFolder(tmp_path / "out"), results(tmp_path / "out")
    lock = Lock(folder.maps)
    with pytest.raises(StoreError, match="in use by process"):
        run(tiny.path, folder.path, oracle, overwrite=True)
    lock.release()
    with pytest.raises(ConfigError, match="no Dask scheduler answers"):
        run(tiny.path, folder.path, oracle, overwrite=True, scheduler="tcp://127.0.0.1:9")
    with open_slide(tiny.path) as slide, pytest.raises(ConfigError, match="no Dask scheduler answers"):
        make_nuclei(slide, folder.maps, folder.nuclei, Config().nuclei, scheduler="tcp://127.0.0.1:9", overwrite=True)
    assert results(folder.path) == before


def test_what_goes_by_times_finds_nothing_to_do_after_one_run_or_two(tiny, oracle, tmp_path):
    folder = ResultFolder(tmp_path / "out")
    for _ in range(2):
        run(tiny.path, folder.path, oracle)
        made = [folder.tissue, folder.maps, folder.nuclei, folder.geojson, folder.report]
        times = [path.stat().st_mtime for path in made]
        assert times == sorted(times)


def test_a_second_run_leaves_everything_as_it_is(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    before = results(tmp_path / "out")
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in ("nuclei.parquet", "maps.zarr")}
    summary = run(tiny.path, tmp_path / "out", oracle)
    assert summary.maps.tiles == 0
    assert results(tmp_path / "out") == before
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times}


def test_other_settings_are_refused_with_both_values_and_the_remedy(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    larger = load_config(overrides={"nuclei": {"min_area_um2": 20.0}})
    with pytest.raises(StoreError, match=r"config.min_area_um2 was 3.0 and is now 20.0; .*nuclei --overwrite"):
        run(tiny.path, tmp_path / "out", oracle, larger)
    with open_slide(tiny.path) as slide:
        folder = ResultFolder(tmp_path / "out")
        summary = make_nuclei(slide, folder.maps, folder.nuclei, larger.nuclei, overwrite=True)
    assert summary.meta.count < 12


def test_a_refused_run_changes_nothing(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    before = results(tmp_path / "out")
    with pytest.raises(StoreError, match="tissue_mask"):
        run(tiny.path, tmp_path / "out", oracle, everywhere=True)
    assert results(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"maps": {"tile_px": 128}}, r"maps.tile_px was 96 and is now 128"), ({}, r"maps.tissue was '\w+' and is now")],
)
def test_nuclei_of_other_maps_are_refused_whether_the_table_is_finished_or_begun(
    changed, named, tiny, oracle, tmp_path
):
    folder = ResultFolder(tmp_path / "out")
    run(tiny.path, folder.path, oracle)
    other = load_config(overrides=changed)
    with open_slide(tiny.path) as slide:
        tissue = read_tissue(folder.tissue, slide)
        if not changed:
            tissue = find_tissue(slide, other.tissue, everywhere=True)
        options = {"device": "cpu", "precision": "fp32", "overwrite": True}
        make_maps(slide, tissue, load_model(oracle), folder.maps, other, **options)
        with pytest.raises(StoreError, match=named):
            make_nuclei(slide, folder.maps, folder.nuclei, other.nuclei)
        begun = NucleiSpool(folder.nuclei, read_nuclei(folder.nuclei)[0], {"chunk_px": 1, "halo_px": 1})
        folder.nuclei.unlink()
        with pytest.raises(StoreError, match=named):
            make_nuclei(slide, folder.maps, folder.nuclei, other.nuclei)
        begun.discard(folder.nuclei)
        assert make_nuclei(slide, folder.maps, folder.nuclei, other.nuclei).meta.count == 12


def test_a_table_that_does_not_tell_of_its_maps_is_refused_and_left_as_it_is(tiny, oracle, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("wsipipe.stages.nuclei._made_of", lambda store: {})
        run(tiny.path, tmp_path / "out", oracle)
    before = results(tmp_path / "out")
    with pytest.raises(StoreError, match=r"maps.tile_px was None and is now 96"):
        run(tiny.path, tmp_path / "out", oracle)
    assert results(tmp_path / "out") == before


def test_stages_that_were_given_different_resolutions_are_refused(tiny, oracle, tmp_path):
    folder = ResultFolder(tmp_path / "out")
    run(tiny.path, folder.path, oracle)
    with open_slide(tiny.path, 0.5) as slide:
        message = r"was made with 0.25 µm/px .* now taken to have 0.5; give every stage the same --mpp"
        with pytest.raises(StoreError, match=rf"tissue\.png {message}"):
            read_tissue(folder.tissue, slide)
        with pytest.raises(StoreError, match=rf"maps\.zarr {message}"):
            make_nuclei(slide, folder.maps, folder.nuclei, Config().nuclei)


def test_a_run_that_is_stopped_does_not_first_work_off_the_blocks_that_wait(tiny, oracle, tmp_path, monkeypatch):
    begun: list[int] = []
    stopped = threading.Event()

    def slow(sources, core, config):
        begun.append(core.x0)
        stopped.wait(10)
        return find_nuclei(sources, core, config)

    monkeypatch.setattr("wsipipe.stages.nuclei.find_nuclei", slow)
    small = load_config(overrides={"maps": {"chunk_tiles": 1, "tile_px": 128}})

    def interrupted(*_, **__):
        threading.Timer(0.5, stopped.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr("wsipipe.stages.segment.write_tissue", interrupted)  # the maps are all there
    with pytest.raises(KeyboardInterrupt):
        run(tiny.path, tmp_path / "out", oracle, small, workers=1)
    blocks = len(MapStore.open(tmp_path / "out" / "maps.zarr").wanted)
    assert 0 < len(begun) <= 2 * AHEAD < blocks


def test_maps_of_another_slide_are_refused(tiny, oracle, make_svs, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    other = make_svs(tmp_path / "tiny.svs", tiny.pixels[:512])
    (tmp_path / "out" / "slide.json").unlink()  # made before folders said whose they are
    with pytest.raises(StoreError, match="fingerprint"):
        run(other, tmp_path / "out", oracle)


def test_nuclei_outside_the_region_are_left_out(tiny, oracle, tmp_path):
    left = {"type": "Polygon", "coordinates": [[[0, 0], [470, 0], [470, 768], [0, 768], [0, 0]]]}
    roi = tmp_path / "roi.geojson"
    roi.write_text(json.dumps({"type": "Feature", "geometry": left, "properties": {}}))
    run(tiny.path, tmp_path / "out", oracle, roi=roi)
    table = geopandas.read_parquet(tmp_path / "out" / "nuclei.parquet")
    assert len(table) == sum(disc.x < 470 for disc in tiny.discs)
    assert (table.x_px0 < 470).all()


@pytest.mark.parametrize("x", [252, 256, 505, 512, 517])
def test_a_region_that_ends_where_tiles_meet_cuts_no_nucleus(tiny, oracle, tmp_path, x):
    roi = tmp_path / "roi.geojson"
    roi.write_text(json.dumps(mapping(shapely.box(0, 0, x, 768))))
    config = load_config(overrides={"maps": {"tile_px": 128, "halo_px": 32, "chunk_tiles": 2}})
    run(tiny.path, tmp_path / "whole", oracle, config)
    run(tiny.path, tmp_path / "region", oracle, config, roi=roi)
    whole, region = (read_nuclei(tmp_path / name / "nuclei.parquet")[1] for name in ("whole", "region"))
    columns = ["id", "area_um2", "geometry"]
    found = pa.Table.from_batches(whole)
    inside = found.filter(pa.array(found["x_px0"].to_numpy() < x)).select(columns)
    assert pa.Table.from_batches(region).select(columns).to_pylist() == inside.to_pylist()


def test_a_region_beside_the_slide_is_refused_before_anything_is_made(tiny, oracle, tmp_path):
    roi = tmp_path / "roi.geojson"
    roi.write_text(json.dumps(mapping(shapely.box(5000, 100, 6000, 900))))
    with pytest.raises(ConfigError, match=r"lie at x 5000 to 6000 and y 100 to 900, not on .* of 1024 x 768 px"):
        run(tiny.path, tmp_path / "out", oracle, roi=roi)
    assert not (tmp_path / "out" / "tissue.png").exists()


def test_what_tells_of_areas_is_not_made_with_tissue_other_than_that_of_the_nuclei(tiny, oracle, tmp_path):
    out, region = tmp_path / "out", tmp_path / "region.geojson"
    run(tiny.path, out, oracle)
    region.write_text(
        json.dumps({"type": "Feature", "geometry": mapping(shapely.box(0, 0, 300, 300)), "properties": {}})
    )
    before = {path: path.read_bytes() for path in (out / "report.html", out / "overlay.png", out / "nuclei.geojson.gz")}
    with open_slide(tiny.path) as slide:
        folder = ResultFolder(out)
        tissue = make_tissue(slide, folder.tissue, TissueConfig(), roi=region)
        with pytest.raises(SettingsError, match=r"was made in other tissue than tissue\.png"):
            make_report(slide, folder, tissue)
        with pytest.raises(SettingsError, match=r"was made in other tissue than tissue\.png"):
            make_export(slide, tissue, folder.nuclei, folder.geojson, folder.overlay)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_region_of_very_many_corners_is_read_back(tiny, tmp_path):
    region = shapely.Point(500, 500).buffer(300, quad_segs=30_000)
    with open_slide(tiny.path) as slide:
        grid = slide.grid(8.0)
        written = TissueMask(np.ones(grid.box.shape, bool), grid).restricted(region)
        write_tissue(written, tmp_path / "tissue.png", slide, TissueConfig(), 0.0, ())
        read = read_tissue(tmp_path / "tissue.png", slide)
    assert len(region.wkt) > 1 << 20
    assert read.region.equals_exact(region)
    np.testing.assert_array_equal(read.mask, written.mask)


def test_a_coarser_scan_of_the_same_tissue_has_its_nuclei_in_the_same_places(tiny, oracle, make_svs, tmp_path):
    coarse = make_svs(
        tmp_path / "coarse.svs", cv2.resize(tiny.pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), mpp=0.5
    )
    places = {}
    for name, path in {"fine": tiny.path, "coarse": coarse}.items():
        run(path, tmp_path / name, oracle)
        table = geopandas.read_parquet(tmp_path / name / "nuclei.parquet").sort_values(["x_um", "y_um"])
        places[name] = table[["x_um", "y_um"]].to_numpy()
    np.testing.assert_allclose(places["coarse"], places["fine"], atol=0.25)  # one working px


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (300, 1), (1, 4000)])
def test_slides_of_the_oddest_shapes_go_through(shape, oracle, make_svs, tmp_path):
    path = make_svs(tmp_path / "odd.svs", np.full((*shape, 3), (90, 50, 140), np.uint8), levels=1)
    run(path, tmp_path / "out", oracle, everywhere=True)
    assert all((tmp_path / "out" / name).exists() for name in FILES)


def test_a_slide_without_tissue_has_empty_results(oracle, make_svs, tmp_path):
    path = make_svs(tmp_path / "white.svs", np.full((512, 512, 3), 255, np.uint8))
    summary = run(path, tmp_path / "out", oracle)
    assert (summary.nuclei.count, summary.tissue_mm2, summary.maps.tiles) == (0, 0.0, 0)
    assert len(geopandas.read_parquet(tmp_path / "out" / "nuclei.parquet")) == 0


def test_an_error_while_nuclei_are_found_stops_the_run_with_its_block(tiny, oracle, tmp_path, monkeypatch):
    from wsipipe.stages import nuclei as stage

    def broken(*_):
        raise StoreError("the disk is gone")

    monkeypatch.setattr(stage, "nuclei_of_block", broken)
    with pytest.raises(StoreError, match=r"block \d+: the disk is gone"):
        run(tiny.path, tmp_path / "out", oracle, load_config(overrides={"maps": {"chunk_tiles": 1}}))
    assert not (tmp_path / "out" / "nuclei.parquet").exists()


@pytest.mark.parametrize(("scheduler", "message"), [("fibres", "is none of threads"), ("tcp://127.0.0.1:9", "no Dask")])
@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_is_not_there_is_refused(scheduler, message, tiny, oracle, tmp_path, monkeypatch):
    monkeypatch.setattr("wsipipe.stages.workers.ANSWER_S", 1)
    with pytest.raises(ConfigError, match=message):
        run(tiny.path, tmp_path / "out", oracle, scheduler=scheduler)


KILLED = """
import sys, torch
from pathlib import Path
from torch import nn
sys.path.insert(0, sys.argv[4])
import conftest
from wsipipe.config import load_config
from wsipipe.folder import ResultFolder
from wsipipe.model import registry
from wsipipe.model.weights import load_model
from wsipipe.slide import open_slide
from wsipipe.stages.segment import segment

class Slow(conftest.ColourOracle):
    def forward(self, image):
        import time
        time.sleep(0.03)
        return super().forward(image)

registry.ARCHITECTURES["oracle"] = Slow
config = load_config(overrides={"maps": {"chunk_tiles": 1}})
with open_slide(sys.argv[1]) as slide:
    segment(slide, load_model(sys.argv[2]), ResultFolder(Path(sys.argv[3])), config, device="cpu", precision="fp32")
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tiny, oracle, tmp_path):
    small = load_config(overrides={"maps": {"chunk_tiles": 1}})
    run(tiny.path, tmp_path / "undisturbed", oracle, small)
    out = tmp_path / "killed"
    arguments = [str(tiny.path), str(oracle), str(out), str(Path(__file__).parent)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments])
    commits = out / "maps.zarr.partial" / "commits"
    while process.poll() is None and not (commits.exists() and commits.stat().st_size > 20):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert commits.exists()
    assert not (out / "nuclei.parquet").exists()
    summary = run(tiny.path, out, oracle, small)
    assert 0 < summary.maps.chunks < summary.maps.chunks + summary.maps.chunks_before
    assert summary.maps.chunks_before > 0
    assert results(out) == results(tmp_path / "undisturbed")


def test_a_model_of_another_name_is_not_mixed_into_a_run(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    network, spec, _ = load_model(oracle)
    other = (network, replace(spec, notes={"run": 2}), "ff" * 32)
    with open_slide(tiny.path) as slide, pytest.raises(StoreError, match="weights_sha256"):
        segment(slide, other, ResultFolder(tmp_path / "out"), Config(), device="cpu", precision="fp32")


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"device": "nonsense"}, {}, "device 'nonsense' is not here"),
        ({"precision": "fp7"}, {}, "precision 'fp7' is unknown"),
        ({"scheduler": "nobody"}, {}, "--scheduler nobody"),
        ({"workers": 0}, {}, "0 workers"),
        ({}, {"maps": {"halo_px": 48}}, "maps.tile_px and maps.halo_px"),
    ],
)
def test_what_cannot_be_is_refused_before_the_slide_is_read(
    options, settings, message, tiny, oracle, tmp_path, monkeypatch
):
    monkeypatch.setattr("wsipipe.stages.segment.find_tissue", lambda *_, **__: pytest.fail("the tissue was looked for"))
    with open_slide(tiny.path) as slide, pytest.raises(ConfigError, match=message):
        segment(slide, load_model(oracle), ResultFolder(tmp_path / "out"), Config(**settings), **options)
    assert not (tmp_path / "out").exists()
