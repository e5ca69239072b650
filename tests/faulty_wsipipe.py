"""`wsipipe` as the workflow's tests call it: it knows the oracle, sees fake GPUs, and fails where a test wants it to.

A file in the folder FAULTS, named after a stage, makes that stage stop in its midst, once; its text says how:
"job" kills this process, "snakemake" kills the Snakemake above it and lets this process go on, "hold" waits until the
file is gone.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ColourOracle

from wsipipe import atomic, cli, lease, store, summary, table
from wsipipe.model import registry
from wsipipe.stages import export, report


def stop() -> None:
    stage, faults = sys.argv[1], Path(os.environ["FAULTS"])
    fault = faults / stage
    if not fault.exists():
        return
    how = fault.read_text()
    if how == "hold":
        (faults / f"{stage}-held").touch()
        while fault.exists():
            time.sleep(0.05)
        return
    fault.unlink()
    if how == "snakemake":
        for parent in psutil.Process().parents():
            if "snakemake" in " ".join(parent.cmdline()):
                parent.kill()
                return
        raise RuntimeError("no Snakemake above")
    os.kill(os.getpid(), signal.SIGKILL)


def after(place: Any, name: str, times: int) -> None:
    """Stop after so many calls of a function."""
    real: Callable[..., Any] = getattr(place, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = real(*args, **kwargs)
        calls += 1
        if calls == times:
            stop()
        return result

    setattr(place, name, counted)


def main() -> None:
    registry.ARCHITECTURES["oracle"] = ColourOracle
    lease.visible_gpus = lambda: [lease.Gpu("cpu", name) for name in ("GPU-one", "GPU-two")]
    match sys.argv[1]:
        case "tissue":  # the mask is written and has not its name
            after(atomic, "to_disk", 2)
        case "maps":
            after(store.MapStore, "write_chunk", 3)
        case "nuclei":
            after(table.NucleiSpool, "add", 3)
        case "export":  # the GeoJSON is there, the picture is not
            after(export, "write_geojson", 1)
        case "report":
            after(report, "draw_report", 1)
        case "summary":  # the table is there, the page is not
            after(summary, "as_page", 1)
    cli.main()


if __name__ == "__main__":
    main()
