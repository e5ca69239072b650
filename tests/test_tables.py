"""Tables of many assessments, and the experiments that lead to them."""

import json
from pathlib import Path

import pytest
import yaml

from wsipipe.errors import ConfigError, StoreError
from wsipipe.model.registry import SPECS
from wsipipe.training.config import load_experiment
from wsipipe.training.network import spec_of
from wsipipe.training.tables import COLUMNS, read_published, read_rows, write_tables

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(p for p in (ROOT / "configs/experiments").glob("*/*.yaml") if p.stem != "base")
ROWS = {
    "pannuke": {
        "cellvta-uni", "cellvta-sam-l", "cellvit-uni", "cellvit-uni-full", "cellvit-sam-l", "cellvit-sam-l-frozen",
        "hovernet", "ciscnet", "pointnu-net",
    },
}  # fmt: skip
ROWS["conic"] = ROWS["pannuke"] | {f"cellvit-sam-l-{magnification}" for magnification in ("10x", "20x", "40x")}


def scores(value: float, protocol: str = "pannuke") -> dict:
    one = {"mPQ": value, "bPQ": None, "detection": {"f1": 0.5}, "types": {"dead": {"PQ": value}, "round": {"PQ": None}}}
    return {"protocol": protocol, "scores": {"published": one, "strict": {**one, "mPQ": value / 2}}}


def write_scores(folder: Path, **values: dict) -> Path:
    for name, value in values.items():
        place = folder / "pannuke" / "cellvta-uni" / name
        place.mkdir(parents=True)
        (place / "scores.json").write_text(json.dumps(value))
    return folder


def test_published_figures_stand_beside_ours_with_their_source(tmp_path):
    results = write_scores(tmp_path, split1=scores(0.4), split2=scores(0.6))
    published = {
        "pannuke/cellvta-uni": {
            "source": "a log",
            "protocol": "pannuke",
            "scores": {"mPQ": 0.506},
            "types": {"dead": 0.1},
        }
    }
    text = write_tables(read_rows(results), published)
    assert "| cellvta-uni, ours | 2 | 0.5000 ± 0.1414 | - |" in text
    assert "| cellvta-uni, published [1] |  | 0.5060 | - |" in text
    assert "[1] a log" in text
    assert "| cellvta-uni, ours | 2 | 0.2500 ± 0.0707 | - |" in text
    headers = [line for line in text.splitlines() if line.startswith("|") and "splits" in line]
    assert [header.split("|")[1].strip() for header in headers] == ["pannuke, published", "pannuke, strict"]


def test_figures_of_another_protocol_are_not_set_beside_ours(tmp_path):
    results = write_scores(tmp_path, split1=scores(0.4, "segment"))
    published = {"pannuke/cellvta-uni": {"source": "a log", "protocol": "pannuke", "scores": {"mPQ": 0.506}}}
    assert "a log" not in write_tables(read_rows(results), published)


def test_splits_scored_unalike_and_torn_scores_are_refused(tmp_path):
    with pytest.raises(StoreError, match="'wsipipe evaluate' first"):
        read_rows(tmp_path)
    write_scores(tmp_path, split1=scores(0.4), split2=scores(0.4, "segment"))
    with pytest.raises(StoreError, match=r"scored by \['pannuke', 'segment'\]"):
        read_rows(tmp_path)
    (tmp_path / "pannuke/cellvta-uni/split1/scores.json").write_text("{")
    with pytest.raises(StoreError, match=r"split1/scores\.json holds no scores"):
        read_rows(tmp_path)


def test_published_figures_must_say_where_they_are_from(tmp_path):
    published = read_published(ROOT / "configs/experiments/published.yaml")
    assert published["pannuke/cellvta-uni"]["scores"]["mPQ"] == pytest.approx(0.506, abs=5e-4)
    assert published["conic/cellvta-uni"]["scores"]["mPQ"] == pytest.approx(0.538, abs=5e-4)
    assert all(key in COLUMNS for entry in published.values() for key in entry["scores"])
    path = tmp_path / "published.yaml"
    path.write_text("a/b: {protocol: conic, scores: {beauty: 1}}\n")
    with pytest.raises(ConfigError, match=r"source is missing; .*'beauty'"):
        read_published(path)


@pytest.mark.parametrize("data", ROWS)
def test_every_row_of_the_papers_tables_has_an_experiment(data):
    assert {path.stem for path in EXPERIMENTS if path.parent.name == data} == ROWS[data]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_experiment_says_what_it_is_and_can_be_read(path):
    text = path.read_text()
    assert text.startswith("# "), "its first line says which row it is"
    config = load_experiment(path)
    if path.parent.name in ROWS:
        assert yaml.safe_load(text)["base"]
        assert len([line for line in text.splitlines() if not line.startswith("#")]) <= 15
    if config.model in SPECS:
        assert spec_of(config, None, ("Colon",)).architecture
    if path.parent.name == "pannuke" and path.stem.startswith("cell"):
        assert (config.decay, config.batch_size, config.epochs, config.sampling) == (0.95, 8, 100, "cell+tissue")
        assert (config.learning_rate, config.betas, config.weight_decay, config.decays) == (
            3e-4,
            (0.85, 0.95),
            1e-4,
            "all",
        )
