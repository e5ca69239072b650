"""Kill each stage and `segment` at random moments, run the same command again, and compare every byte with a whole run.

Usage: python tests/torture.py [--kills 50] [--stages tissue maps nuclei export segment] [--seed 0]     make torture

The slide is the tiny one of the tests with the network that reads the truth from its colours. Runs are forked from one
process that has imported everything, so a run takes about a second. Kills are SIGKILL; SIGTERM and Ctrl-C are sent too,
an eighth as often each, and their exit codes and last words looked at. Compared is every file but the locks, records
without what they say of the run itself (`OF_THE_RUN`). How much work was done twice is counted in tiles and blocks.
The last line is JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from comparable import without_run

from wsipipe.device import choose_device, choose_networks, network_threads
from wsipipe.memory import WRITES_AHEAD

STAGES = ("tissue", "maps", "nuclei", "export", "segment")
OF_THE_RUN = (  # what a record tells of how long it took and how much was left to do
    "seconds", "seconds_network", "seconds_readers", "seconds_writer", "peak_mb", "megapixels", "tiles", "chunks",
    "chunks_before", "started", "bottleneck",
)  # fmt: skip
BATCH = 4
CHUNK_TILES = 2
CONFIG = f"maps: {{chunk_tiles: {CHUNK_TILES}}}\n"


@dataclass
class Stage:
    """What came of the kills of one command."""

    kills: int = 0
    identical: int = 0
    early: int = 0  # it had not begun to write
    tiles_twice: list[int] = field(default_factory=list)
    blocks_twice: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Bench:
    """One slide, one network, and commands over them in processes of their own."""

    def __init__(self, root: Path) -> None:
        import conftest
        import numpy as np

        self.root, self.out = root, root / "out"
        self.slide, self.model = root / "tiny.svs", root / "oracle.safetensors"
        pixels = np.full((768, 1024, 3), 255, np.uint8)
        y, x = np.ogrid[:768, :1024]
        pixels[((x - 450) / 350) ** 2 + ((y - 360) / 300) ** 2 < 1] = conftest.TinySlide.tissue
        for disc in conftest.DISCS:
            pixels[conftest.inside(disc, (768, 1024))] = conftest.TinySlide.nucleus
        conftest.write_svs(self.slide, pixels)
        conftest.save_checkpoint(self.model, conftest.ColourOracle(3), conftest.ORACLE)
        (root / "wsipipe.yaml").write_text(CONFIG)
        self._count_work()

    def _count_work(self) -> None:
        """Let the network and the search for nuclei leave a byte for each tile and block, before anything is stored."""
        import conftest

        from wsipipe.model import registry
        from wsipipe.stages import nuclei as stage

        tiles = os.open(self.root / "tiles", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        blocks = os.open(self.root / "blocks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        find_nuclei = stage.find_nuclei

        class Counted(conftest.ColourOracle):
            def forward(self, image: Any) -> Any:
                os.write(tiles, b"." * len(image))
                return super().forward(image)

        def counted(*arguments: Any) -> Any:
            os.write(blocks, b".")
            return find_nuclei(*arguments)

        registry.ARCHITECTURES["oracle"] = Counted
        stage.find_nuclei = counted

    def work(self) -> tuple[int, int]:
        """Tiles and blocks worked on since this was last asked."""
        counts = tuple((self.root / name).stat().st_size for name in ("tiles", "blocks"))
        for name in ("tiles", "blocks"):
            os.truncate(self.root / name, 0)
        return counts[0], counts[1]

    def arguments(self, stage: str) -> list[str]:
        more = ["--config", str(self.root / "wsipipe.yaml")] if stage != "export" else []
        if stage in ("maps", "segment"):
            more += ["--model", str(self.model), "--device", "cpu", "--precision", "fp32", "--batch-size", str(BATCH)]
        return ["-q", stage, str(self.slide), "-o", str(self.out), *more]

    @contextmanager
    def running(self, stage: str) -> Iterator[int]:
        """The process of a command; it is for the caller to wait for."""
        pid = os.fork()
        if pid:
            yield pid
            return
        code = 70
        try:
            said = os.open(self.root / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            from wsipipe import cli

            sys.argv = ["wsipipe", *self.arguments(stage)]
            cli.main(sys.argv[1:])
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # noqa: BLE001 - this process ends here, whatever it was
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self, stage: str) -> float:
        """Run a command to its end; seconds."""
        started = time.monotonic()
        with self.running(stage) as pid:
            _, status = os.waitpid(pid, 0)
        if status:
            raise AssertionError(f"{stage} ended with {status}: {self.said()}")
        return time.monotonic() - started

    def said(self) -> str:
        return (self.root / "said").read_text()

    def files(self) -> dict[str, bytes]:
        """Every file of the results; records without what is of the run."""
        found = {}
        for path in sorted(self.out.rglob("*")):
            if path.is_file() and path.suffix != ".lock":
                content = path.read_bytes()
                if path.parent == self.out and path.suffix == ".json":
                    record = json.loads(content)
                    content = json.dumps({k: v for k, v in record.items() if k not in OF_THE_RUN}).encode()
                elif path.suffix == ".html":
                    content = without_run(content)
                found[str(path.relative_to(self.out))] = content
        return found

    def begin_from(self, kept: Path | None) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if kept is not None:
            shutil.copytree(kept, self.out)


def torture(bench: Bench, stage: str, kept: Path | None, kills: int, rng: random.Random) -> Stage:
    """Kill `stage`, begun from the results `kept`, at random moments."""
    bench.begin_from(kept)
    bench.run(stage)
    bench.begin_from(kept)
    bench.work()
    seconds = bench.run(stage)
    whole, (tiles, blocks) = bench.files(), bench.work()
    result = Stage()
    polite = max(1, kills // 8)
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * polite + [signal.SIGINT] * polite
    for number in signals:
        bench.begin_from(kept)
        bench.work()
        moment = rng.uniform(0, seconds)
        with bench.running(stage) as pid:
            time.sleep(moment)
            os.kill(pid, number)
            status = os.waitpid(pid, 0)[1]
        if number != signal.SIGKILL:
            said = bench.said().strip().splitlines()
            code, expected = os.waitstatus_to_exitcode(status), 128 + number
            ended_well = code == 0  # it came too late
            if code == -number:  # it came before the command had begun
                result.early += 1
            elif not ended_well and (code != expected or len(said) != 1 or "run the same command again" not in said[0]):
                result.faults.append(f"{number.name} after {moment:.2f} s: code {code}, said {said[-5:]}")
        before = {path.name for path in bench.out.iterdir()} if bench.out.exists() else set()
        bench.run(stage)
        result.kills += 1
        found = bench.files()
        differing = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
        if differing:
            result.faults.append(f"{number.name} after {moment:.2f} s, which left {sorted(before)}: {differing[:4]}")
        else:
            result.identical += 1
        tiles_now, blocks_now = bench.work()
        result.tiles_twice.append(tiles_now - tiles)
        result.blocks_twice.append(blocks_now - blocks)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # All that a run imports, so that a fork need not. No thread may start in this process.
    import numba  # noqa: F401

    import wsipipe.cli
    import wsipipe.slide
    import wsipipe.stages.export
    import wsipipe.stages.segment  # noqa: F401

    # Tiles that are worked on and not yet stored: of a chunk under way, of batches in the network, of one that waits
    # for it, and of those that the writer has not yet taken.
    networks = choose_networks(network_threads(choose_device("cpu")))
    in_flight = CHUNK_TILES**2 + (networks + 1 + WRITES_AHEAD + 1) * BATCH
    summary: dict[str, Any] = {}
    faults = 0
    with tempfile.TemporaryDirectory(prefix="torture-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:  # noqa: PTH112
        bench = Bench(Path(root))
        kept: Path | None = None
        for stage in STAGES:
            start = None if stage in ("tissue", "segment") else kept
            if stage in arguments.stages:
                began = time.monotonic()
                result = torture(bench, stage, start, arguments.kills, random.Random(f"{stage}/{arguments.seed}"))
                tiles, blocks = max(result.tiles_twice), max(result.blocks_twice)
                print(
                    f"{stage:8}{result.identical} of {result.kills} identical; twice at most {tiles} tiles "
                    f"({in_flight} in flight) and {blocks} blocks; {time.monotonic() - began:.0f} s",
                    flush=True,
                )
                for fault in result.faults:
                    print(f"    {fault}", flush=True)
                summary[stage] = {
                    "kills": result.kills, "identical": result.identical, "tiles_twice": tiles, "blocks_twice": blocks,
                }  # fmt: skip
                faults += len(result.faults)
            if stage != "segment":
                bench.begin_from(start)
                bench.run(stage)
                kept = Path(root) / f"after-{stage}"
                shutil.copytree(bench.out, kept)
    print(json.dumps(summary))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
