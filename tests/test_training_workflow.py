"""The whole way on data in miniature: prepare, train, evaluate, tables; and what was trained segments a slide."""

import subprocess
import sys
from pathlib import Path

import pytest

from wsipipe.config import Config
from wsipipe.folder import ResultFolder
from wsipipe.model.weights import load_model
from wsipipe.slide import open_slide
from wsipipe.stages.segment import segment
from wsipipe.table import read_nuclei
from wsipipe.training.config import load_experiment
from wsipipe.training.loop import train
from wsipipe.training.miniature import make_pannuke
from wsipipe.training.sources.pannuke import prepare_pannuke

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.timeout(1800)  # a busy machine is no fault of the code


def test_a_trained_model_segments_a_slide_without_any_other_step(tiny_slide, tmp_path):
    make_pannuke(tmp_path / "src", images=3, side=64)
    data = prepare_pannuke(tmp_path / "src", tmp_path / "data").folder
    changes = {"data": {str(data): 1.0}, "crop_px": 64, "epochs": None, "steps": 2, "batch_size": 2, "workers": 0}
    changes |= {"encoder": None, "device": "cpu", "tensorboard": False, "model": "cellvta-nano"}
    best = train(load_experiment(ROOT / "configs/experiments/pannuke/cellvta-uni.yaml", changes), tmp_path / "run")
    with open_slide(tiny_slide) as slide:
        summary = segment(slide, load_model(best), ResultFolder(tmp_path / "results"), Config(), device="cpu")
    meta, _ = read_nuclei(summary.folder.nuclei, ["type_id"])
    assert list(meta.counts) == ["neoplastic", "inflammatory", "connective", "dead", "epithelial"]
    assert summary.geojson[0].exists()


def test_the_workflow_plans_every_row_of_the_papers_tables(tmp_path):
    for data in ("pannuke", "conic"):
        (tmp_path / "data/raw" / data).mkdir(parents=True)
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflows/training.smk"), "--cores", "9", "-n"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    jobs = dict(line.split() for line in (run.stdout + run.stderr).splitlines() if len(line.split()) == 2)
    assert jobs["train"] == jobs["evaluate"] == str(9 * 3 + 12)
    assert jobs["prepare"] == "2"
    for settings in ("conic/cellvta-uni.yaml", "conic/base.yaml", "published.yaml"):  # a change of which is seen
        assert str(ROOT / "configs/experiments" / settings) in run.stdout + run.stderr


def run_mini(folder: Path, *settings: str) -> str:
    """The tables of the workflow on data in miniature."""
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflows/training.smk"), "--cores", "2"]
    run = subprocess.run(
        [*command, "--config", "scale=mini", *settings], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return (folder / "results/mini/tables.md").read_text()


def test_a_row_of_each_data_set_goes_from_raw_data_to_tables(tmp_path):
    text = run_mini(tmp_path, "experiments=pannuke/ciscnet,conic/cellvta-uni", "splits=1", "epochs=1")
    assert "## pannuke: protocol pannuke, counted published" in text
    assert "## conic: protocol conic, counted strict" in text
    assert "| ciscnet, ours | 1 |" in text
    assert "| cellvta-uni, ours | 1 |" in text
    assert "| cellvta-uni, published [" in text


@pytest.mark.slow
def test_every_kind_of_row_goes_from_raw_data_to_tables(tmp_path):
    text = run_mini(tmp_path)
    for row in ("cellvta-uni", "cellvit-uni", "ciscnet", "pointnu-net"):
        assert f"| {row}, ours | 3 |" in text
    assert "| hovernet, ours | 1 |" in text
    assert "| cellvta-uni, published [" in text
