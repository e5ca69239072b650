"""The whole way on data in miniature: prepare, train, evaluate, tables; and what was trained segments a slide."""

import re
import shutil
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
    jobs = jobs_of(run.stdout + run.stderr)
    assert jobs["train"] == jobs["evaluate"] == str(9 * 3 + 12)
    assert jobs["prepare"] == "2"


def jobs_of(said: str) -> dict[str, str]:
    """What a dry run would do: how often, by rule."""
    return dict(line.split() for line in said.splitlines() if re.fullmatch(r"[a-z]+ +\d+", line))


FEW = ("experiments=pannuke/ciscnet,conic/cellvta-uni", "splits=1", "epochs=1")


def run_mini(folder: Path, *arguments: str, settings: tuple[str, ...] = FEW, root: Path = ROOT) -> str:
    """What the workflow says on data in miniature."""
    command = [sys.executable, "-m", "snakemake", "-s", str(root / "workflows/training.smk"), "--cores", "2"]
    run = subprocess.run(
        [*command, *arguments, "--config", "scale=mini", *settings],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_a_row_of_each_data_set_goes_from_raw_data_to_tables_and_again_where_settings_change(tmp_path):
    for folder in ("workflows", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / "repository" / folder)
    run_mini(tmp_path, root=tmp_path / "repository")
    text = (tmp_path / "results/mini/tables.md").read_text()
    assert "## pannuke: protocol pannuke, counted published" in text
    assert "## conic: protocol conic, counted strict" in text
    assert "| ciscnet, ours | 1 |" in text
    assert "| cellvta-uni, ours | 1 |" in text
    assert "| cellvta-uni, published [" in text

    assert jobs_of(run_mini(tmp_path, "-n", root=tmp_path / "repository")) == {}
    for changed, jobs in {
        "published.yaml": {"tables": "1", "total": "1"},
        "conic/base.yaml": {"train": "1", "evaluate": "1", "tables": "1", "total": "3"},
    }.items():
        with (tmp_path / "repository/configs/experiments" / changed).open("a") as file:
            file.write("# another\n")
        assert jobs_of(run_mini(tmp_path, "-n", root=tmp_path / "repository")) == jobs


@pytest.mark.slow
def test_every_kind_of_row_goes_from_raw_data_to_tables(tmp_path):
    run_mini(tmp_path, settings=())
    text = (tmp_path / "results/mini/tables.md").read_text()
    for row in ("cellvta-uni", "cellvit-uni", "ciscnet", "pointnu-net"):
        assert f"| {row}, ours | 3 |" in text
    assert "| hovernet, ours | 1 |" in text
    assert "| cellvta-uni, published [" in text
