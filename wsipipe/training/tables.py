"""Many assessments as one table: a row an experiment, mean and spread over splits, published figures beside ours."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wsipipe.errors import ConfigError, StoreError, one_line

# Name in the tables and in published.yaml, and where `scores.json` has it.
COLUMNS = {
    "mPQ": ("mPQ",),
    "bPQ": ("bPQ",),
    "tissue_mPQ": ("tissue_mean", "mPQ"),
    "tissue_bPQ": ("tissue_mean", "bPQ"),
    "pooled_mPQ": ("pooled", "mPQ"),
    "mDQ": ("mDQ",),
    "mSQ": ("mSQ",),
    "aji": ("aji",),
    "dice": ("dice",),
    "jaccard": ("jaccard",),
    "f1": ("detection", "f1"),
}
TITLES = {"tissue_mPQ": "mPQ (tissues)", "tissue_bPQ": "bPQ (tissues)", "pooled_mPQ": "mPQ+", "aji": "AJI"}


@dataclass(frozen=True)
class Row:
    """An experiment: its assessments, one a split."""

    experiment: str
    protocol: str
    runs: tuple[Mapping[str, Any], ...]

    def values(self, counting: str, path: Sequence[str]) -> list[float]:
        """A score of every split that has it."""
        found = []
        for run in self.runs:
            value: Any = run["scores"][counting]
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                found.append(float(value))
        return found


def read_rows(results: Path) -> list[Row]:
    """Every `<data set>/<experiment>/<split>/scores.json` below a folder.

    Raises
    ------
    StoreError
        If there is none, one cannot be read, or the splits of an experiment were scored by several protocols.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*/*/*/scores.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            run["scores"]["published"], run["protocol"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} holds no scores of 'wsipipe evaluate': {error}") from error
        groups.setdefault("/".join(path.relative_to(results).parts[:2]), []).append(run)
    if not groups:
        raise StoreError(
            f"{results} holds no <data set>/<experiment>/<split>/scores.json; run 'wsipipe evaluate' first"
        )
    rows = []
    for experiment, runs in groups.items():
        protocols = {run["protocol"] for run in runs}
        if len(protocols) > 1:
            raise StoreError(f"{results / experiment} was scored by {sorted(protocols)}; score its splits alike")
        rows.append(Row(experiment, protocols.pop(), tuple(runs)))
    return rows


def read_published(path: Path) -> dict[str, Any]:
    """Published figures by experiment.

    Raises
    ------
    ConfigError
        If the file cannot be read, or an entry does not say its source and protocol.
    """
    try:
        published = yaml.safe_load(path.read_text(encoding="utf-8"))
        faults = [
            f"{name}: {key} is missing"
            for name, entry in published.items()
            for key in ("source", "protocol", "scores")
            if key not in entry
        ]
        faults += [
            f"{name}: there is no score '{key}'"
            for name, entry in published.items()
            for key in entry.get("scores", {})
            if key not in COLUMNS
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as published figures: {one_line(error)}") from error
    if faults:
        raise ConfigError(f"{path}: {'; '.join(faults)}")
    return dict(published)


def write_tables(rows: Sequence[Row], published: Mapping[str, Any]) -> str:
    """Markdown: scores and PQ by type of every data set, then the strict counting; sources below."""
    lines = ["# Ours beside the published", ""]
    notes: list[str] = []
    for data in sorted({row.experiment.split("/")[0] for row in rows}):
        of_data = [row for row in rows if row.experiment.startswith(f"{data}/")]
        for protocol in sorted({row.protocol for row in of_data}):
            alike = [row for row in of_data if row.protocol == protocol]
            for counting in ("published", "strict"):
                lines += [f"## {data}: protocol {protocol}, counted {counting}", ""]
                lines += _score_table(alike, counting, published, notes)
                lines += ["", f"### PQ by type: protocol {protocol}, counted {counting}", ""]
                lines += [*_type_table(alike, counting, published, notes), ""]
    lines += ["Ours: mean over splits, ± standard deviation where there are several.", ""]
    lines += [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    return "\n".join(lines) + "\n"


def _score_table(rows: Sequence[Row], counting: str, published: Mapping[str, Any], notes: list[str]) -> list[str]:
    lines = _head([f"{rows[0].protocol}, {counting}", "splits", *(TITLES.get(name, name) for name in COLUMNS)])
    for row in rows:
        name = row.experiment.split("/")[1]
        ours = [_spread(row.values(counting, path)) for path in COLUMNS.values()]
        lines.append(_line([f"{name}, ours", str(len(row.runs)), *ours]))
        said = published.get(row.experiment)
        if said and counting == "published" and said["protocol"] == row.protocol:
            figures = [f"{said['scores'][key]:.4f}" if key in said["scores"] else "-" for key in COLUMNS]
            lines.append(_line([f"{name}, published [{_note(notes, said['source'])}]", "", *figures]))
    return lines


def _type_table(rows: Sequence[Row], counting: str, published: Mapping[str, Any], notes: list[str]) -> list[str]:
    types = list(rows[0].runs[0]["scores"][counting]["types"])
    lines = _head([f"{rows[0].protocol}, {counting}", *types])
    for row in rows:
        name = row.experiment.split("/")[1]
        lines.append(_line([f"{name}, ours", *(_spread(row.values(counting, ("types", of, "PQ"))) for of in types)]))
        said = published.get(row.experiment)
        if said and "types" in said and counting == "published" and said["protocol"] == row.protocol:
            figures = [f"{said['types'][of]:.3f}" if of in said["types"] else "-" for of in types]
            source = "; ".join([said["source"], *([said["types_source"]] if "types_source" in said else [])])
            lines.append(_line([f"{name}, published [{_note(notes, source)}]", *figures]))
    return lines


def _note(notes: list[str], text: str) -> int:
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "| --- " + "| ---: " * (len(titles) - 1) + "|"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
