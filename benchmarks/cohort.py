"""How long Snakemake takes to plan a cohort: `snakemake --dry-run` over a sheet of empty slides.

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
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
    if said.returncode:
        sys.exit(said.stdout + said.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(f"{count} slides: {seconds:.1f} s, {cpu:.1f} s of CPU, {used.ru_maxrss / 1024:.0f} MB")
    print(
        json.dumps(
            {"slides": count, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "mb": used.ru_maxrss // 1024}
        )
    )


if __name__ == "__main__":
    main()
