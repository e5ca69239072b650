"""The summary of a cohort: every slide, its state by its files and logs, and the figures of its records."""

import csv
import json
import os
from pathlib import Path

import pytest

from wsipipe.cohort import SlideRow
from wsipipe.lock import Lock
from wsipipe.summary import SILENT, SlideSummary, as_page, as_table, summarise, write_summary

BAD = [{"x0": 0, "y0": 0, "x1": 256, "y1": 256}, {"x0": 256, "y0": 0, "x1": 512, "y1": 256}]
RECORDS = {
    "tissue.png": {"mm2": 2.0, "seconds": 1.0, "unread_px0": BAD[:1]},
    "maps.zarr": {"seconds": 10.5, "device": "cuda:1", "unread_px0": BAD},
    "nuclei.parquet": {
        "nuclei": {"round": 30, "long": 10}, "qc": {"wide": 2}, "seams": {"shows": False}, "seconds": 4.0,
        "model": {"name": "m", "weights_sha256": "0123456789abcdef"}, "wsipipe": "0.1.0",
    },
    "nuclei.geojson.gz": {"seconds": 2.0},
    "report.html": {"seconds": 0.5},
}  # fmt: skip


def made(folder: Path, *outputs: str) -> None:
    """Outputs of a slide with their records."""
    folder.mkdir(parents=True, exist_ok=True)
    for output in outputs:
        (folder / output).touch()
        (folder / f"{output}.json").write_text(json.dumps(RECORDS[output]))


def logged(logs: Path, slide: str, stage: str, text: str) -> None:
    (logs / slide).mkdir(parents=True, exist_ok=True)
    (logs / slide / f"{stage}.log").write_text(text)


@pytest.fixture
def cohort(tmp_path) -> list[SlideSummary]:
    results, logs = tmp_path / "results", tmp_path / "logs"
    made(results / "whole", *RECORDS)
    made(results / "no-maps", *(output for output in RECORDS if output != "maps.zarr"))
    made(results / "told", "tissue.png")
    logged(logs, "told", "tissue", "12:00:00 I fine\n")
    logged(logs, "told", "maps", "12:00:01 I begins\nwsipipe: the disk is full; make room\n")
    logged(logs, "crashed", "tissue", "Traceback (most recent call last):\n  File x\nValueError: a defect\n")
    logged(logs, "killed", "tissue", "12:00:01 I begins\n")
    logged(logs, "misused", "tissue", "Usage: wsipipe tissue\nError: No such option: -d\n")
    logged(logs, "busy", "tissue", "12:00:01 I begins\n")
    slides = {
        name: SlideRow(slide=name, path="x", group="g" if name == "whole" else None)
        for name in ("whole", "no-maps", "told", "crashed", "killed", "misused", "busy", "new")
    }
    (results / "busy").mkdir()
    lock = Lock(results / "busy" / "tissue.png")
    found = summarise(slides, results, logs)
    lock.release()
    write_summary({"whole": slides["whole"]}, results, logs)
    return found


def test_each_slide_is_done_failed_with_the_reason_running_or_not_run(cohort):
    states = {one.slide: (one.state, one.stage, one.message) for one in cohort}
    assert list(states) == ["whole", "no-maps", "told", "crashed", "killed", "misused", "busy", "new"]
    assert states["misused"] == ("failed", "tissue", "No such option: -d")
    assert states["whole"] == states["no-maps"] == ("done", "", "")
    assert states["told"] == ("failed", "maps", "the disk is full; make room")
    assert states["crashed"] == ("failed", "tissue", "ValueError: a defect")
    assert states["killed"][:2] == ("failed", "tissue")
    assert states["killed"][2].startswith(SILENT)
    assert states["busy"] == ("running", "tissue", "")
    assert states["new"] == ("not run", "", "")


def test_the_table_has_a_line_a_slide_with_counts_densities_and_seconds(cohort):
    rows = list(csv.DictReader(as_table(cohort).splitlines(), delimiter="\t"))
    assert [row["slide"] for row in rows] == [one.slide for one in cohort]
    whole = rows[0]
    expected = {
        "group": "g", "state": "done", "tissue_mm2": "2.000000", "nuclei": "40", "nuclei_round": "30",
        "nuclei_long": "10", "nuclei_per_mm2": "20.0", "per_mm2_round": "15.0", "per_mm2_long": "5.0",
        "seconds_tissue": "1.0", "seconds_maps": "10.5", "seconds_report": "0.5", "seconds": "18.0", "too_large": "2",
        "unread": "2", "seams_show": "false", "device": "cuda:1", "model": "m 0123456789ab", "wsipipe": "0.1.0",
    }  # fmt: skip
    assert {key: whole[key] for key in expected} == expected
    assert {rows[-1][key] for key in ("nuclei", "nuclei_round", "seconds", "tissue_mm2", "too_large", "unread")} == {""}


def test_the_page_names_failures_first_and_links_what_is_there(cohort):
    page = as_page(cohort)
    failed = page[page.index("<h2>Failed</h2>") : page.index("<h2>All slides</h2>")]
    assert "the disk is full; make room" in failed
    assert "../logs/told/maps.log" in failed
    assert 'href="whole/report.html"' in page
    assert 'href="told/report.html"' not in page
    assert "(no group)" in page
    assert "http" not in page.replace("data:", "")
    assert "<script>" in SlideSummary("x", "", "failed", "maps", "<script>").message
    assert "<script>" not in as_page([SlideSummary("x", "", "failed", "maps", "<script>")])


def test_the_summary_of_a_sheet_is_written_beside_the_slides(cohort, tmp_path):
    assert (tmp_path / "results" / "summary.tsv").read_text().startswith("slide\tgroup\tstate")
    assert "<h1>1 slide</h1>" in (tmp_path / "results" / "summary.html").read_text()


def test_a_torn_record_does_not_stop_the_summary(tmp_path):
    made(tmp_path / "results" / "a", *RECORDS)
    (tmp_path / "results" / "a" / "nuclei.parquet.json").write_text('{"nuclei": ')
    (one,) = summarise({"a": SlideRow(slide="a", path="x")}, tmp_path / "results", tmp_path / "logs")
    assert (one.state, one.count, one.tissue_mm2) == ("done", None, 2.0)


def test_records_whose_output_a_failed_job_took_away_do_not_count(tmp_path):
    results, logs = tmp_path / "results", tmp_path / "logs"
    made(results / "a", *RECORDS)
    for output in ("maps.zarr", "nuclei.parquet", "nuclei.geojson.gz", "report.html"):
        (results / "a" / output).unlink()
    logged(logs, "a", "maps", "wsipipe: the disk is full; make room\n")
    (one,) = summarise({"a": SlideRow(slide="a", path="x")}, results, logs)
    assert (one.state, one.stage, one.count, one.seconds) == ("failed", "maps", None, {"tissue": 1.0})
    (results / "a" / "nuclei.parquet").touch()
    (one,) = summarise({"a": SlideRow(slide="a", path="x")}, results, logs)
    assert (one.count, one.seconds) == (40, {"tissue": 1.0, "maps": 10.5, "nuclei": 4.0})


def test_a_rerun_whose_maps_failed_is_not_done_by_what_the_run_before_left(tmp_path):
    results, logs = tmp_path / "results", tmp_path / "logs"
    made(results / "a", *(output for output in RECORDS if output != "maps.zarr"))
    logged(logs, "a", "maps", "wsipipe: cuda:0 has too little memory\n")
    later = (results / "a" / "nuclei.parquet").stat().st_mtime_ns + 10**9
    os.utime(logs / "a" / "maps.log", ns=(later, later))
    (one,) = summarise({"a": SlideRow(slide="a", path="x")}, results, logs)
    assert (one.state, one.stage, one.message) == ("failed", "maps", "cuda:0 has too little memory")
    assert (one.count, one.per_mm2, one.seconds) == (None, None, {"tissue": 1.0})


def test_an_export_in_parts_is_done_too(tmp_path):
    results, logs = tmp_path / "results", tmp_path / "logs"
    made(results / "a", *RECORDS)
    logged(logs, "a", "export", "12 nuclei\n")
    exported = results / "a" / "nuclei.geojson.gz"
    exported.rename(results / "a" / "nuclei-001.geojson.gz")
    record = results / "a" / "nuclei.geojson.gz.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "files": ["nuclei-001.geojson.gz"]}))
    (one,) = summarise({"a": SlideRow(slide="a", path="x")}, results, logs)
    assert (one.state, one.count) == ("done", 40)
