"""How long Snakemake takes to plan a cohort: `snakemake --dry-run` over a sheet of empty slides.

The plan is made before the first job starts; a dry run then tells of each job, which a real run does as it goes.

python benchmarks/cohort.py [--slides 2000] [--all]     --all: 10,000
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=2000)
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    count = 10_000 if arguments.all else arguments.slides
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slides").mkdir()
        names = [f"s{n:05d}" for n in range(count)]
        for slide in names:
            (folder / "slides" / f"{slide}.svs").touch()
        lines = ["slide\tpath", *(f"{slide}\tslides/{slide}.svs" for slide in names)]
        (folder / "slides.tsv").write_text("\n".join(lines) + "\n")
        command = [
            sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile",
            str(ROOT / "configs" / "wsipipe.yaml"), "--config", "slides=slides.tsv", "--cores", "8", "--resources",
            "gpu=1", "--dry-run",
        ]  # fmt: skip
        started = time.monotonic()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            assert run.stdout is not None
            said, planned = [], (0.0, 0.0)
            for line in run.stdout:
                said.append(line)
                if line.startswith("Job stats"):  # the first thing said once the jobs and their order are known
                    planned = (time.monotonic() - started, sum(psutil.Process(run.pid).cpu_times()[:2]))
        seconds = time.monotonic() - started
    if run.returncode:
        sys.exit("".join(said))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(
        f"{count} slides: planned in {planned[0]:.1f} s, {planned[1]:.1f} s of CPU; with telling of every job "
        f"{seconds:.1f} s, {cpu:.1f} s of CPU; {used.ru_maxrss / 1024:.0f} MB"
    )
    told = {
        "slides": count,
        "planned_seconds": round(planned[0], 1),
        "planned_cpu_seconds": round(planned[1], 1),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "mb": used.ru_maxrss // 1024,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
