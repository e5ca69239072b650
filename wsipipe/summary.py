"""summary.tsv and summary.html: every slide of a sheet, how far it came, why it failed, and what was found.

Read from the records beside the outputs and from the logs of the stages; no slide and no table of nuclei is opened.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wsipipe.atomic import finished
from wsipipe.cohort import SlideRow
from wsipipe.folder import ResultFolder, record_of, unread_in
from wsipipe.lock import is_held
from wsipipe.pages import render

State = Literal["done", "failed", "running", "not run"]
STAGES = ("tissue", "maps", "nuclei", "export", "report")
LOG_END = 64 * 1024  # bytes: what a stage has to say of its end is at the end
SILENT = "the job ended without a word: killed, or out of memory?"


@dataclass(frozen=True, slots=True)
class SlideSummary:
    """A line of the summary.

    Attributes
    ----------
    stage, message : str
        Where and why it failed; empty otherwise.
    nuclei : dict of str to int, or None
        Counts by type; None as long as they are not known.
    seconds : dict of str to float
        By stage, of those that have ended.
    wide, unread : int or None
        Nuclei too large for the halo; places of the slide that could not be read.
    """

    slide: str
    group: str
    state: State
    stage: str = ""
    message: str = ""
    tissue_mm2: float | None = None
    nuclei: dict[str, int] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    wide: int | None = None
    unread: int | None = None
    seams_show: bool | None = None
    device: str = ""
    model: str = ""
    version: str = ""

    @property
    def count(self) -> int | None:
        return None if self.nuclei is None else sum(self.nuclei.values())

    @property
    def per_mm2(self) -> float | None:
        return self.count / self.tissue_mm2 if self.count is not None and self.tissue_mm2 else None


def summarise(slides: Mapping[str, SlideRow], results: Path, logs: Path) -> list[SlideSummary]:
    """How far each slide came, in the order of the sheet."""
    return [_of_slide(name, row.group or "", ResultFolder(results / name), logs / name) for name, row in slides.items()]


def write_summary(slides: Mapping[str, SlideRow], results: Path, logs: Path) -> list[SlideSummary]:
    """Write summary.tsv and summary.html to `results`, and return what they say."""
    summaries = summarise(slides, results, logs)
    with finished(results / "summary.tsv") as partial:
        partial.write_text(as_table(summaries), encoding="utf-8")
    with finished(results / "summary.html") as partial:
        partial.write_text(as_page(summaries), encoding="utf-8")
    return summaries


def as_table(summaries: Iterable[SlideSummary]) -> str:
    """Tab-separated text, a line a slide; what is not known is empty."""
    summaries = list(summaries)
    types = _types(summaries)
    columns = [
        "slide", "group", "state", "failed_stage", "message", "tissue_mm2", "nuclei",
        *(f"nuclei_{name}" for name in types), "nuclei_per_mm2", *(f"per_mm2_{name}" for name in types),
        *(f"seconds_{stage}" for stage in STAGES), "seconds", "too_large", "unread", "seams_show", "device",
        "model", "wsipipe",
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    for one in summaries:
        counts = [None if one.nuclei is None else one.nuclei.get(name, 0) for name in types]
        area = one.tissue_mm2
        writer.writerow(
            [
                one.slide, one.group, one.state, one.stage, one.message, _number(area, 6), one.count,
                *counts, _number(one.per_mm2, 1),
                *(_number(n / area if n is not None and area else None, 1) for n in counts),
                *(_number(one.seconds.get(stage), 1) for stage in STAGES),
                _number(sum(one.seconds.values()) if one.seconds else None, 1),
                one.wide, one.unread, "" if one.seams_show is None else str(one.seams_show).lower(), one.device,
                one.model, one.version,
            ]
        )  # fmt: skip
    return text.getvalue()


def as_page(summaries: Iterable[SlideSummary]) -> str:
    """One self-contained page of HTML."""
    summaries = list(summaries)
    groups: dict[str, list[SlideSummary]] = {}
    for one in summaries:
        groups.setdefault(one.group, []).append(one)
    return render(
        "summary.html.jinja",
        slides=summaries,
        types=_types(summaries),
        states={
            state: sum(one.state == state for one in summaries) for state in ("done", "failed", "running", "not run")
        },
        groups=[_group(name, members) for name, members in groups.items()] if len(groups) > 1 else [],
        versions=sorted({one.version for one in summaries if one.version}),
        models=sorted({one.model for one in summaries if one.model}),
        nuclei=sum(one.count or 0 for one in summaries),
        tissue_mm2=sum(one.tissue_mm2 or 0.0 for one in summaries),
        seconds=sum(sum(one.seconds.values()) for one in summaries),
    )


def _of_slide(name: str, group: str, folder: ResultFolder, logs: Path) -> SlideSummary:
    outputs = {
        "tissue": folder.tissue, "maps": folder.maps, "nuclei": folder.nuclei, "export": folder.geojson,
        "report": folder.report,
    }  # fmt: skip
    there = {**outputs, "maps": _maps_or_nuclei(folder, logs), "export": _first_exported(folder)}
    state, stage, message = _state(there, folder, logs)
    # A record outlives its output where a job failed, and what follows that job is of a run before.
    known = STAGES[: STAGES.index(stage)] if stage else STAGES
    records = {
        stage: _read(record_of(output)) if stage in known and there[stage].exists() else {}
        for stage, output in outputs.items()
    }
    tissue, maps, nuclei = records["tissue"], records["maps"], records["nuclei"]
    model, seams = nuclei.get("model", {}), nuclei.get("seams", {})
    return SlideSummary(
        slide=name,
        group=group,
        state=state,
        stage=stage,
        message=message,
        tissue_mm2=tissue.get("mm2"),
        nuclei=nuclei.get("nuclei"),
        seconds={stage: record["seconds"] for stage, record in records.items() if "seconds" in record},
        wide=nuclei.get("qc", {}).get("wide"),
        unread=len(unread_in(tissue, maps)) if "unread_px0" in maps else None,
        seams_show=seams.get("shows"),
        device=maps.get("device", ""),
        model=f"{model['name']} {model['weights_sha256'][:12]}" if "weights_sha256" in model else "",
        version=nuclei.get("wsipipe", ""),
    )


def _state(outputs: Mapping[str, Path], folder: ResultFolder, logs: Path) -> tuple[State, str, str]:
    """State, and where and why a slide failed: at the first stage whose output is not there."""
    for stage, output in outputs.items():
        if output.exists():
            continue
        log = logs / f"{stage}.log"
        if not log.exists():
            return "not run", "", ""
        if is_held(folder.path if stage == "maps" else output):
            return "running", stage, ""
        return "failed", stage, _last_words(log)
    return "done", "", ""


def _maps_or_nuclei(folder: ResultFolder, logs: Path) -> Path:
    """What tells that maps were made: they may be deleted once their nuclei are found, but not before a later try."""
    log = logs / "maps.log"
    try:
        found = folder.nuclei.stat().st_mtime_ns
    except FileNotFoundError:
        return folder.maps
    return folder.maps if log.exists() and log.stat().st_mtime_ns > found else folder.nuclei


def _first_exported(folder: ResultFolder) -> Path:
    """The GeoJSON, or the first of its parts where `wsipipe export --split` made several."""
    files = _read(record_of(folder.geojson)).get("files")
    return folder.path / str(files[0]) if isinstance(files, list) and files else folder.geojson


def _last_words(log: Path) -> str:
    """What a stage that failed said at last: its own sentence, or the end of a traceback."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_END))
        lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        for opening in ("wsipipe: ", "Error: "):  # the latter of wrong usage
            if line.startswith(opening):
                return line.removeprefix(opening)
    # A log line begins with the time; the last line of a traceback names an exception.
    if lines and re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b", lines[-1]):
        return lines[-1]
    return f"{SILENT} The end of {log}: {lines[-1]}" if lines else f"{SILENT} {log} is empty"


def _read(path: Path) -> dict[str, Any]:
    """A record; empty if it is missing or torn, for a summary must tell of broken results too."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _types(summaries: Iterable[SlideSummary]) -> list[str]:
    """All types of all slides, in the order of their first coming."""
    return list(dict.fromkeys(name for one in summaries for name in one.nuclei or {}))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _group(name: str, members: list[SlideSummary]) -> dict[str, Any]:
    done = [one for one in members if one.count is not None and one.tissue_mm2]
    area = sum(one.tissue_mm2 or 0.0 for one in done)
    count = sum(one.count or 0 for one in done)
    return {
        "name": name or "(no group)",
        "slides": len(members),
        "done": sum(one.state == "done" for one in members),
        "failed": sum(one.state == "failed" for one in members),
        "tissue_mm2": area,
        "nuclei": count,
        "per_mm2": count / area if area else None,
    }
