"""The workflow on a real SLURM: `make test-slurm` starts one with a single node. Never on a cluster unasked."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_workflow import ROOT, SNAKEMAKE, Workflow, workflow  # noqa: F401 - a fixture

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]


@pytest.fixture(autouse=True)
def _slurm() -> None:
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, check=False).returncode:
        pytest.skip("no SLURM answers here; `make test-slurm` starts one")


def test_two_slides_take_one_gpu_job_and_one_cpu_job_each(workflow):  # noqa: F811
    workflow.sheet("a", "b")
    command = [
        str(SNAKEMAKE), "--snakefile", str(ROOT / "Snakefile"), "--configfile", "wsipipe.yaml",
        "--workflow-profile", str(ROOT / "workflows" / "profiles" / "slurm"), "--set-threads", "maps=1", "nuclei=1",
        "--set-resources", "maps:mem_mb=3000", "nuclei:mem_mb=3000", "--default-resources", "mem_mb=2000", "runtime=30",
        "--slurm-no-account", "--slurm-status-command", "squeue",
        "--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "10",
    ]  # fmt: skip
    said = subprocess.run(
        command, cwd=workflow.folder, env=workflow.environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout
    jobs = set(re.findall(r"SLURM jobid (\d+)", said.stdout))
    assert len(jobs) == 4, said.stdout
    shown = subprocess.run(["scontrol", "show", "job", "--details"], capture_output=True, text=True, check=True).stdout
    ours = [text for text in shown.split("\n\n") if any(f"JobId={job} " in text for job in jobs)]
    assert sorted("gres/gpu" in text or "gpu:1" in text for text in ours) == [False, False, True, True], shown
    assert all("JobState=COMPLETED" in text for text in ours), shown
    table = (workflow.results / "summary.tsv").read_text().splitlines()
    assert [line.split("\t")[:3] for line in table[1:]] == [["a", "first", "done"], ["b", "second", "done"]]
    for slide in ("a", "b"):
        assert "leased cpu (GPU-one)" in Path(workflow.folder, "logs", slide, "maps.log").read_text()


def test_memory_and_time_grow_with_the_slide_and_with_each_attempt():
    profile = (ROOT / "workflows" / "profiles" / "slurm" / "config.yaml").read_text()
    for rule in ("maps", "nuclei"):
        section = re.search(rf"^  {rule}:\n((?:    .*\n?)+)", profile, re.M)
        assert section is not None
        assert section[1].count("attempt") == section[1].count("input.slide") == 2
