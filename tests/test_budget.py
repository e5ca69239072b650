"""Stages within a budget for memory."""

import logging
import re

import pytest
import torch

from wsipipe.config import Config, MapsConfig
from wsipipe.errors import ConfigError
from wsipipe.folder import ResultFolder
from wsipipe.memory import MB, Choice, Needs, parse_memory
from wsipipe.model.footprint import footprint
from wsipipe.model.inference import prepare_for_inference
from wsipipe.model.registry import SPECS, build
from wsipipe.model.spec import tile_geometry
from wsipipe.model.weights import load_model
from wsipipe.slide import open_slide
from wsipipe.stages import budget
from wsipipe.stages import nuclei as stage
from wsipipe.stages.nuclei import make_nuclei
from wsipipe.stages.segment import segment

CPU = torch.device("cpu")


def test_a_footprint_grows_with_the_tile_and_with_the_bytes_of_a_number():
    spec = SPECS["cellvta-nano"]
    network = build(spec)
    small, large = (tile_geometry(spec, MapsConfig(tile_px=side)) for side in (256, 1024))
    of_small = footprint(network, spec, small, CPU, torch.float32)
    of_large = footprint(network, spec, large, CPU, torch.float32)
    assert of_large.tile == pytest.approx(16 * of_small.tile, rel=0.02)  # but for what does not grow
    # A few layers are as large as the picture; what the whole pass makes one after another is many times that.
    assert 20 * 256**2 * 4 < of_small.tile < 200 * 256**2 * 4
    half = footprint(network, spec, small, CPU, torch.bfloat16)
    assert half.tile == pytest.approx(of_small.tile / 2, rel=0.2)
    copied = sum(weight.nbytes for weight in prepare_for_inference(network, CPU, torch.bfloat16).parameters())
    assert half.weights == pytest.approx(copied, rel=0.1)
    assert of_small.weights < 0.6 * sum(weight.nbytes for weight in network.parameters()) + copied


def test_two_tiles_hold_twice_what_one_does():
    spec = SPECS["cellvta-nano"]
    geometry = tile_geometry(spec, MapsConfig(tile_px=256))
    network = build(spec)
    one = footprint(network, spec, geometry, CPU, torch.float32).tile

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            both = self.inner(torch.cat((image, image)))
            return {name: values[:1] for name, values in both.items()}

    assert footprint(Twice(), spec, geometry, CPU, torch.float32).tile == pytest.approx(2 * one, rel=0.35)


FILES = ("tissue.png", "nuclei.parquet", "nuclei.geojson.gz", "overlay.png")
OPTIONS = {"device": "cpu", "precision": "fp32", "workers": 3}


@pytest.fixture(autouse=True)
def _a_process_of_one_size(monkeypatch):
    """That of the tests holds what other tests left in it."""
    for name in ("WITH_NETWORK", "WITHOUT_NETWORK"):
        monkeypatch.setattr(budget.memory, name, 10**11)


def named_in(error: ConfigError) -> int:
    """The least budget that a refusal names."""
    return parse_memory(str(error).split("this takes ")[1].split(";")[0])


def allowed(caplog) -> str:
    (said,) = [record.getMessage() for record in caplog.records if "--memory" in record.getMessage()]
    return said.split(" allows ")[1].split(";")[0]


def test_a_run_within_the_least_budget_gives_the_nuclei_of_a_run_without(tiny, oracle, tmp_path, caplog):
    model = load_model(oracle)
    with open_slide(tiny.path) as slide:
        whole = segment(slide, model, ResultFolder(tmp_path / "whole"), Config(), **OPTIONS)
        with pytest.raises(ConfigError, match="--memory 1MB is too little") as refused:
            segment(slide, model, ResultFolder(tmp_path / "little"), Config(), memory=MB, **OPTIONS)
        assert not (tmp_path / "little").exists()
        with caplog.at_level(logging.INFO, "wsipipe"):
            memory = named_in(refused.value)
            little = segment(slide, model, ResultFolder(tmp_path / "little"), Config(), memory=memory, **OPTIONS)
    assert allowed(caplog).endswith("networks: 1, readers: 1, workers: 1")
    assert little.maps.batch_size < whole.maps.batch_size
    for name in FILES:
        assert (tmp_path / "little" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_budget_that_is_large_lowers_nothing(tiny, oracle, tmp_path, caplog):
    with open_slide(tiny.path) as slide, caplog.at_level(logging.INFO, "wsipipe"):
        summary = segment(
            slide, load_model(oracle), ResultFolder(tmp_path / "out"), Config(), memory=10**12, batch_size=5, **OPTIONS
        )
    assert summary.maps.batch_size == 5
    assert re.fullmatch(r"batches of 5, networks: \d, readers: \d, workers: 3", allowed(caplog))


def test_nuclei_are_found_by_fewer_workers(tiny, oracle, tmp_path, monkeypatch):
    hired = []

    def hire(scheduler, workers):
        hired.append(workers)
        return real(scheduler, workers)

    real = stage.hired
    with open_slide(tiny.path) as slide:
        folder = ResultFolder(tmp_path / "out")
        segment(slide, load_model(oracle), folder, Config(), **OPTIONS)
        monkeypatch.setattr(stage, "hired", hire)
        for memory in (None, 10**12):
            make_nuclei(slide, folder.maps, tmp_path / "other.parquet", Config().nuclei, workers=3, memory=memory)
        with pytest.raises(ConfigError, match="with workers: 1 this takes") as refused:
            make_nuclei(slide, folder.maps, tmp_path / "little.parquet", Config().nuclei, workers=3, memory=MB)
        memory = named_in(refused.value)
        make_nuclei(slide, folder.maps, tmp_path / "little.parquet", Config().nuclei, workers=30, memory=memory)
    assert hired[:2] == [3, 3]
    assert 1 <= hired[2] < 9  # a step of the figure has room for some
    assert (tmp_path / "little.parquet").read_bytes() == folder.nuclei.read_bytes()


def test_the_workers_of_a_cluster_are_not_counted(tiny):
    geometry = tile_geometry(SPECS["cellvta-nano"], MapsConfig())
    with open_slide(tiny.path) as slide:
        here = budget.of_nuclei(slide, geometry, 5, 128, "threads", 2)
        cluster = budget.of_nuclei(slide, geometry, 5, 128, "tcp://there:8786", 2)
    assert here.most == Choice(workers=2)
    assert cluster.most == Choice()
    assert cluster.needs == Needs(fixed=here.needs.fixed)


def test_a_compiled_network_has_no_budget(tiny, oracle, tmp_path):
    with open_slide(tiny.path) as slide, pytest.raises(ConfigError, match="--compile"):
        segment(slide, load_model(oracle), ResultFolder(tmp_path), Config(), memory=10**12, compiled=True, **OPTIONS)
