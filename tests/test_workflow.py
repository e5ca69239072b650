"""The workflow as users start it: two slides and a broken one, reruns, changed settings, kills in every rule."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest
from comparable import without_run

ROOT = Path(__file__).parents[1]
pytest.importorskip("snakemake")
pytestmark = pytest.mark.timeout(1800)  # a busy machine is no fault of the code
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
RULES = ("tissue", "maps", "nuclei", "export", "report", "summary")
OUTPUTS = {
    "tissue": "tissue.png", "maps": "maps.zarr/zarr.json", "nuclei": "nuclei.parquet", "export": "nuclei.geojson.gz",
    "report": "report.html",
}  # fmt: skip


@dataclass(frozen=True)
class Workflow:
    """A working folder of its own, with a sheet, a `wsipipe` that knows the oracle, and faults on demand."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def faults(self) -> Path:
        return self.folder / "faults"

    def command(self, *arguments: str) -> list[str]:
        return [
            str(SNAKEMAKE), "--snakefile", str(ROOT / "Snakefile"), "--configfile", "wsipipe.yaml", "--cores", "2",
            "--resources", "gpu=1", *arguments,
        ]  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FAULTS": str(self.faults),
            "WSIPIPE_LEASES": str(self.folder / "leases"),
        }
        return {**os.environ, **own}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip

    def wsipipe(self, *arguments: str) -> None:
        subprocess.run(
            ["wsipipe", *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True
        )

    def sheet(self, *slides: str) -> None:
        lines = [f"{slide}\t{slide}.svs\t{'first' if slide < 'b' else 'second'}" for slide in slides]
        (self.folder / "slides.tsv").write_text("\n".join(["slide\tpath\tgroup", *lines]) + "\n")

    def jobs(self, *arguments: str) -> dict[str, int]:
        """What a dry run would do, by rule."""
        said = self.run("--dry-run", *arguments)
        assert said.returncode == 0, said.stdout
        return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", said.stdout, re.M) if rule != "total"}

    def bytes_of(self, slide: str) -> dict[str, bytes]:
        return result_bytes(self.results / slide)


def result_bytes(folder: Path) -> dict[str, bytes]:
    """All files of a slide; without what tells of the run and not of the result: times, commands, what was resumed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name == ".snakemake_timestamp" or name in ("segment.json", "report.html.json"):
            continue
        content = path.read_bytes()
        if path.parent == folder and path.suffix == ".json":
            record = json.loads(content)
            for key in [key for key in record if key in RUN_KEYS or key.startswith("seconds")]:
                del record[key]
            content = json.dumps(record).encode()
        elif name == "report.html":
            content = without_run(content)
        found[name] = content
    return found


RUN_KEYS = ("command", "maps", "chunks", "chunks_before", "megapixels", "tiles")


@pytest.fixture
def workflow(tiny, oracle, tmp_path) -> Workflow:
    folder = tmp_path / "work"
    for name in ("bin", "faults", "leases"):
        (folder / name).mkdir(parents=True)
    (folder / "leases").chmod(0o700)
    command = folder / "bin" / "wsipipe"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).parent / "faulty_wsipipe.py"}" "$@"\n')
    command.chmod(0o755)
    for slide in ("a", "b"):
        shutil.copy(tiny.path, folder / f"{slide}.svs")
    (folder / "broken.svs").write_text("not a slide")
    shutil.copy(oracle, folder / "oracle.safetensors")
    (folder / "wsipipe.yaml").write_text("slides: slides.tsv\nmodel: oracle.safetensors\n")
    return Workflow(folder)


def test_the_workflow_is_without_fault_to_the_linter():
    said = subprocess.run([SNAKEMAKE, "--lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "your workflow is in a good condition" in said.stdout + said.stderr
    sources = "".join(path.read_text() for path in [ROOT / "Snakefile", *(ROOT / "workflows" / "rules").glob("*.smk")])
    assert "lambda" not in sources


def test_out_of_the_box_the_demo_slide_would_be_run():
    said = subprocess.run(
        [SNAKEMAKE, "--cores", "8", "--resources", "gpu=1", "--dry-run"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "profiles/default" in said.stderr
    jobs = re.findall(r"^(\w+) +1$", said.stdout + said.stderr, re.M)
    assert jobs == [] or {"report", "summary"} <= set(jobs)  # somebody may have run it here


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_job_knows_whether_it_was_granted_a_gpu(gpus, workflow):
    workflow.sheet("a")
    said = workflow.run("--dry-run", "--quiet", "host", "--printshellcmds", "--resources", f"gpu={gpus}")
    assert said.returncode == 0, said.stdout
    assert re.findall(r"wsipipe maps .*--device lease:(\d+) ", said.stdout) == [str(gpus)]


def test_every_fault_of_the_sheet_is_told_before_any_job_starts(workflow):
    (workflow.folder / "slides.tsv").write_text("slide\tpath\tmpp\na/b\ta.svs\t\nc\tabsent.svs\tthick\n")
    said = workflow.run()
    assert said.returncode == 1
    for fault in ("slide 'a/b'", "'absent.svs' does not exist", "mpp 'thick'"):
        assert said.stdout.count(fault) == 1, said.stdout
    assert "Traceback" not in said.stdout
    assert not workflow.results.exists()


def test_a_broken_slide_fails_alone_and_changes_run_again_what_depends_on_them(workflow):
    workflow.sheet("a", "broken", "b")
    said = workflow.run("--keep-going", "--cores", "8", "--resources", "gpu=2")
    assert said.returncode == 1, said.stdout
    for slide in ("a", "b"):
        assert (workflow.results / slide / "report.html").exists(), said.stdout
        log = (workflow.folder / "logs" / slide / "maps.log").read_text()
        assert re.search(r"leased cpu \(GPU-(one|two)\)", log)
        for rule in RULES[:-1]:
            assert (workflow.folder / "logs" / slide / f"{rule}.benchmark.tsv").exists()
    table = [line.split("\t") for line in (workflow.results / "summary.tsv").read_text().splitlines()]
    rows = [dict(zip(table[0], line, strict=True)) for line in table[1:]]
    assert [(row["slide"], row["state"], row["failed_stage"], row["nuclei"]) for row in rows] == [
        ("a", "done", "", "12"), ("broken", "failed", "tissue", ""), ("b", "done", "", "12"),
    ]  # fmt: skip
    assert "broken.svs is neither a slide nor a picture" in rows[1]["message"]
    assert "broken.svs is neither a slide nor a picture" in (workflow.results / "summary.html").read_text()

    # by hand, in one process: the same bytes
    workflow.wsipipe(
        "segment", "a.svs", "--model", "oracle.safetensors", "--out", "by-hand/a", "--device", "cpu", "--workers", "2"
    )
    by_rules, by_hand = workflow.bytes_of("a"), result_bytes(workflow.folder / "by-hand" / "a")
    assert by_rules.keys() == by_hand.keys()
    assert [name for name in by_rules if by_rules[name] != by_hand[name]] == []

    # the broken one is what is left; without it nothing but the summary, then nothing
    assert workflow.jobs().keys() == {"all", *RULES}
    assert workflow.jobs()["maps"] == 1
    workflow.sheet("a", "b")
    assert workflow.jobs() == {"summary": 1, "all": 1}
    assert workflow.run().returncode == 0
    assert "broken" not in (workflow.results / "summary.tsv").read_text()
    assert workflow.jobs() == {}

    # there again and out again: Snakemake knows its own summary of these slides, and the one that is there is not that
    workflow.sheet("a", "b", "broken")
    assert workflow.run("--keep-going").returncode == 1
    assert "broken" in (workflow.results / "summary.tsv").read_text()
    workflow.sheet("a", "b")
    assert workflow.jobs() == {"summary": 1, "all": 1}
    assert workflow.run().returncode == 0
    assert workflow.jobs() == {}

    changes = {
        "{nuclei: {np_threshold: 0.6}}": {"nuclei", "export", "report"},
        "{maps: {chunk_tiles: 2}}": {"maps", "nuclei", "export", "report"},
        "{nuclei: {np_threshold: 0.5}}": set(),  # the default, spelled out
    }
    for settings, rules in changes.items():
        expected = {**dict.fromkeys(rules, 2), **({"summary": 1, "all": 1} if rules else {})}
        assert workflow.jobs("--config", f"settings={settings}") == expected, settings
    assert workflow.jobs("--config", "form=centroids").keys() == {"export", "report", "summary", "all"}
    before = (workflow.results / "a" / "maps.zarr" / "zarr.json").stat().st_mtime_ns
    changed = workflow.run("--config", "settings={nuclei: {min_area_um2: 40}}")
    assert changed.returncode == 0, changed.stdout
    assert (workflow.results / "a" / "maps.zarr" / "zarr.json").stat().st_mtime_ns == before
    assert json.loads((workflow.results / "b" / "nuclei.parquet.json").read_text())["nuclei"]["round"] == 3

    packed = workflow.run("--report", "night.zip")
    assert packed.returncode == 0, packed.stdout
    with ZipFile(workflow.folder / "night.zip") as archive:
        pages = [name.rpartition("/")[2] for name in archive.namelist() if "/data/raw/" in name]
    assert (pages.count("report.html"), pages.count("summary.html")) == (2, 1), pages


@pytest.fixture
def undisturbed(workflow) -> dict[str, bytes]:
    """What slide a comes to without any kill."""
    workflow.wsipipe("segment", "a.svs", "--model", "oracle.safetensors", "--out", "by-hand/a", "--device", "cpu")
    return result_bytes(workflow.folder / "by-hand" / "a")


@pytest.mark.parametrize(
    "first", ["snakemake", pytest.param("job", marks=pytest.mark.slow)]
)  # between them every rule sees both
def test_a_kill_in_every_rule_costs_nothing_that_was_finished(first, workflow, undisturbed):
    """Each run is killed in a later rule than the one before: now its job, now Snakemake itself."""
    workflow.sheet("a")
    made: dict[Path, int] = {}
    second = "job" if first == "snakemake" else "snakemake"
    for rule, how in zip(RULES, (first, second) * 3, strict=True):
        (workflow.faults / rule).write_text(how)
        said = workflow.run("--rerun-incomplete")
        assert said.returncode == (-9 if how == "snakemake" else 1), f"{rule}: {said.stdout}"
        assert not (workflow.faults / rule).exists(), f"{rule} did not run: {said.stdout}"
        finished = [workflow.results / "a" / OUTPUTS[earlier] for earlier in RULES[: RULES.index(rule)]]
        made = {output: output.stat().st_mtime_ns for output in finished} | made
    said = workflow.run("--rerun-incomplete")
    assert said.returncode == 0, said.stdout
    assert {output: output.stat().st_mtime_ns for output in made} == made
    assert workflow.bytes_of("a") == undisturbed
    assert "done" in (workflow.results / "summary.tsv").read_text().splitlines()[1]
    assert not list(workflow.results.rglob("*.partial"))
    if first == "snakemake":  # so the job of the maps was killed; the orphan of a killed Snakemake goes on by itself
        assert json.loads((workflow.results / "a" / "maps.zarr.json").read_text())["chunks_before"] >= 3
    assert workflow.jobs() == {}


def test_the_second_of_two_runs_is_refused_by_snakemake_itself(workflow):
    workflow.sheet("a")
    (workflow.faults / "tissue").write_text("hold")
    first = subprocess.Popen(
        workflow.command("--until", "tissue"), cwd=workflow.folder, env=workflow.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not (workflow.faults / "tissue-held").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = workflow.run()
    (workflow.faults / "tissue").unlink()
    said, _ = first.communicate(timeout=240)
    assert first.returncode == 0, said
    assert second.returncode == 1
    assert "Directory cannot be locked" in second.stdout


def test_maps_that_are_not_kept_go_once_their_nuclei_are_found_and_not_before(workflow, undisturbed):
    workflow.sheet("a")
    not_kept = ("--config", "keep_maps=false")
    (workflow.faults / "nuclei").write_text("job")
    said = workflow.run(*not_kept)
    assert said.returncode == 1, said.stdout
    maps = workflow.results / "a" / "maps.zarr"
    assert maps.exists()
    said = workflow.run(*not_kept)
    assert said.returncode == 0, said.stdout
    assert not re.search(r"^maps +1$", said.stdout, re.M)
    assert not maps.exists()
    rest = {name: content for name, content in undisturbed.items() if not name.startswith("maps.zarr/")}
    assert workflow.bytes_of("a") == rest
    assert "done" in (workflow.results / "summary.tsv").read_text().splitlines()[1]
    assert workflow.jobs(*not_kept) == {}
    changed = workflow.jobs(*not_kept, "settings={nuclei: {np_threshold: 0.6}}")
    assert changed == dict.fromkeys(("maps", "nuclei", "export", "report", "summary", "all"), 1)
