"""Budgets against peaks: what commands hold within `--memory`, and whether the nuclei are those of a run without.

Usage: python benchmarks/memory.py [--side 4096] [--workers 4] [--model NAME|PATH]

The slide is one of benchmarks/segment.py. `segment` runs with the tiles of the model and with small ones in batches of
four, `nuclei` over its maps: each without a budget, with the least that it takes, as the refusal of a smaller one names
it, and with something more. Every command runs in a process of its own. The last line is
JSON: by command and budget `peak_mb`, whether that is `within` the budget, and `moved`, the share of nuclei that are
not at the same place as in the run without.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from segment import write_slide

from wsipipe.memory import MB, parse_memory, shown

MORE = 400 * MB
CASES = {
    "segment": ("segment",),
    "segment, small tiles": ("segment", "--set", "maps.tile_px=256", "--set", "maps.halo_px=32"),
    "nuclei": ("nuclei", "--overwrite"),
}


def run(command: list[str]) -> tuple[int, str, float]:
    """Exit code of a command, what it said, and the most that it held, bytes."""
    with subprocess.Popen(
        [sys.executable, "-m", "wsipipe", *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, said, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def least(command: list[str]) -> int:
    """The least budget that a command takes, as it says itself."""
    code, said, _ = run([*command, "--memory", "1MB"])
    named = re.search(r"this takes (\S+);", said)
    if code != 1 or named is None:
        raise SystemExit(f"no refusal, but {code}: {said}")
    return parse_memory(named[1])


def places(table: Path) -> set[tuple[float, float]]:
    rows = pq.read_table(table, columns=["x_px0", "y_px0"])
    return set(zip(rows["x_px0"].to_pylist(), rows["y_px0"].to_pylist(), strict=True))


def measure(name: str, arguments: tuple[str, ...], slide: Path, out: Path, more: list[str]) -> dict[str, Any]:
    """One command within several budgets."""
    figures: dict[str, Any] = {}
    before: set[tuple[float, float]] = set()
    command = [arguments[0], str(slide), *arguments[1:], *more]
    floor = least([*command, "--out", str(out)])
    for budget in (None, floor, floor + MORE):
        folder = out if arguments[0] == "nuclei" else out.with_name(f"{out.name}-{budget}")
        given = [] if budget is None else ["--memory", shown(budget)]
        code, said, peak = run([*command, *given, "--out", str(folder)])
        if code:
            raise SystemExit(said)
        allowed = re.search(r"allows (.*); without", said)
        found = places(folder / "nuclei.parquet")
        before = before or found
        key = "none" if budget is None else shown(budget)
        figures[key] = {
            "peak_mb": round(peak / MB),
            "within": budget is None or peak <= budget,
            "moved": round(len(found ^ before) / 2 / len(before), 5),
        }
        print(f"{name}, {key}: {allowed[1] if allowed else 'all'}, {figures[key]}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    model = ["--model", arguments.model] if arguments.model else []
    figures = {}
    with tempfile.TemporaryDirectory() as root:
        slide, maps = Path(root) / "slide.svs", Path(root) / "out-None"
        write_slide(slide, arguments.side)
        for name, case in CASES.items():
            of_nuclei = case[0] == "nuclei"
            out = maps if of_nuclei else Path(root) / ("out" if name == "segment" else "small")
            more = ["--workers", str(arguments.workers), *([] if of_nuclei else model)]
            figures[name] = measure(name, case, slide, out, more)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
