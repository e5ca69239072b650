"""Feed every reader of foreign files with damaged and hostile ones, and look that each refuses them or answers rightly.

Usage: python tests/fuzz.py [--inputs 100000] [--target svs ...] [--findings DIR]      all of it: make fuzz
       python tests/fuzz.py --target svs --only 1234                                  one input again, in this process

Input n of a target is a function of its name and n alone. Inputs are read in child processes. What counts as a finding:
an exception that is no `WsipipeError`; an answer that is wrong; a child that dies, needs more than CPU_S or MEMORY;
code that a file made run, a process or a connection begun, or a file touched outside the scratch folder (by audit
hook). Findings are kept as files. The last line is JSON.
"""

import argparse
import contextlib
import json
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_readers
import fuzz_slides
import fuzz_store
import fuzz_weights
from fuzz_harm import Seeds

import wsipipe
from wsipipe.errors import WsipipeError

CPU_S = 20.0  # a reader may take for one small file
HANG_S = 120.0  # of the clock; other work may hold this machine
MEMORY = 2 << 30  # beside what the libraries take when they are imported
COMPILED = Path(wsipipe.__file__).resolve().parent / "__pycache__"  # numba keeps here what it compiles on first use


@dataclass(frozen=True)
class Target:
    """A reader. `seeds` makes whole files, once; `case` writes an input to the empty folder and reads it."""

    share: float  # of all inputs
    seeds: Callable[[], Seeds]
    case: Callable[[Seeds, random.Random, Path], object]


def _no_seeds() -> Seeds:
    return {}


TARGETS = {
    "svs": Target(0.15, fuzz_slides.svs_seeds, fuzz_slides.slide_case),
    "tiff": Target(0.10, fuzz_slides.tiff_seeds, fuzz_slides.slide_case),
    "picture": Target(0.08, fuzz_slides.picture_seeds, fuzz_slides.slide_case),
    "other": Target(0.06, fuzz_slides.other_seeds, fuzz_slides.slide_case),
    "real": Target(0.03, fuzz_slides.real_seeds, fuzz_slides.slide_case),
    "mask": Target(0.03, fuzz_slides.mask_seeds, fuzz_slides.mask_case),
    "roi": Target(0.10, _no_seeds, fuzz_readers.roi_case),
    "config": Target(0.10, _no_seeds, fuzz_readers.config_case),
    "sheet": Target(0.10, _no_seeds, fuzz_readers.sheet_case),
    "outlines": Target(0.06, fuzz_readers.outline_seeds, fuzz_readers.outline_case),
    "patches": Target(0.05, fuzz_readers.patch_seeds, fuzz_readers.patch_case),
    "store": Target(0.03, fuzz_store.store_seeds, fuzz_store.store_case),
    "table": Target(0.03, fuzz_readers.table_seeds, fuzz_readers.table_case),
    "checkpoint": Target(0.03, fuzz_weights.checkpoint_seeds, fuzz_weights.checkpoint_case),
    "upstream": Target(0.01, fuzz_weights.upstream_seeds, fuzz_weights.upstream_case),
    "encoder": Target(0.04, fuzz_weights.encoder_seeds, fuzz_weights.encoder_case),
}


# The children that read -----------------------------------------------------------------------------------------------


class Watch:
    """An audit hook that remembers what no reader of a file may do. Once set it stays, so only a child sets it."""

    WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
    NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect",
             "socket.bind", "socket.getaddrinfo")  # fmt: skip

    def __init__(self, scratch: Path) -> None:
        self._scratch, self.seen = os.path.realpath(scratch), list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.NEVER:
            self.seen.append(f"{event} {arguments[:2]!r:.200}")
        elif event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, str | bytes):
                self._require_inside(event, path)
        elif event in self.WRITES and isinstance(arguments[0], str | bytes):
            self._require_inside(event, arguments[0])

    def _require_inside(self, event: str, path: str | bytes) -> None:
        place = os.path.realpath(os.fsdecode(path))
        if not place.startswith((self._scratch, "/dev/", str(COMPILED))):
            self.seen.append(f"{event} {place}")


def read_one(name: str, seeds: Seeds, number: int, folder: Path, watch: Watch | None) -> tuple[str, str]:
    """("refused" | "answered" | "finding", what)."""
    target, rng = TARGETS[name], random.Random(f"{name}/{number}")
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    started = time.process_time()
    try:
        target.case(seeds, rng, folder)
        outcome = ("answered", "")
    except WsipipeError as error:
        outcome = ("refused", "")
        if len(str(error).splitlines()) != 1:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            outcome = ("finding", f"a message of several lines: {Path(frame.filename).name}:{frame.lineno}")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/wsipipe/" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        outcome = ("finding", f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:200]}")
    if (spent := time.process_time() - started) > CPU_S:
        outcome = ("finding", f"took {spent:.0f} s")
    if watch is not None and watch.seen:
        outcome = ("finding", "forbidden: " + "; ".join(sorted(set(watch.seen))))
        watch.seen.clear()
    if Path("hacked").exists() or (folder / "hacked").exists():
        outcome = ("finding", "a file made code run")
    return outcome


def child(name: str, seeds: Seeds, numbers: range, step: int, folder: Path, shared: mmap.mmap, pipe: int) -> None:
    """Read inputs one after another, saying in `shared` which one is being read and how many came out how."""
    import faulthandler

    faulthandler.disable()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # libtiff and libpng talk
    os.chdir(folder.parent)
    import warnings

    warnings.simplefilter("ignore")
    import wsipipe.slide

    wsipipe.slide.RETRIES_S = (0.0,)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if name == "checkpoint":
        from wsipipe.model.weights import load_model

        (folder / "whole.safetensors").write_bytes(seeds["whole"])
        load_model(folder / "whole.safetensors")
    for number in range(20):  # what is imported, compiled or loaded on first use is no fault of a file
        read_one(name, seeds, -1 - number, folder, None)
    watch = Watch(folder.parent)
    for number in numbers[step:]:
        struct.pack_into("<q", shared, 0, number)
        kind, what = read_one(name, seeds, number, folder, watch)
        slot = {"refused": 8, "answered": 16, "finding": 24}[kind]
        struct.pack_into("<q", shared, slot, struct.unpack_from("<q", shared, slot)[0] + 1)
        if kind == "finding":
            os.write(pipe, (json.dumps([number, what]) + "\n").encode())
    os._exit(0)


def in_child(function: Callable[[], Any], path: Path) -> Any:
    """What a function gives that is run in a process of its own: it may start threads, which no fork survives."""
    pid = os.fork()
    if pid == 0:
        try:
            path.write_bytes(pickle.dumps(function()))
            os._exit(0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("seeds could not be made")
    return pickle.loads(path.read_bytes())


def run_target(name: str, numbers: range, findings: Path) -> tuple[Counter[str], dict[str, list[int]]]:
    """Read inputs of a target in children; a child that dies or hangs costs that one input."""
    counts: Counter[str] = Counter()
    found: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch) / "input"
        folder.mkdir()
        seeds = in_child(TARGETS[name].seeds, Path(scratch) / "seeds.pickle")
        if not seeds and TARGETS[name].seeds is not _no_seeds:
            return counts, found
        step = 0
        while step < len(numbers):
            shared = mmap.mmap(-1, 64)
            struct.pack_into("<q", shared, 0, numbers[step])
            receive, send = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(receive)
                try:
                    child(name, seeds, numbers, step, folder, shared, send)
                finally:
                    os._exit(99)
            os.close(send)
            ended, last, since = 0, -1, time.monotonic()
            said = b""
            os.set_blocking(receive, False)
            while True:
                with contextlib.suppress(BlockingIOError):
                    said += os.read(receive, 1 << 16)
                done, ended = os.waitpid(pid, os.WNOHANG)
                if done:
                    break
                now = struct.unpack_from("<q", shared, 0)[0]
                if now != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > HANG_S:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
            with contextlib.suppress(BlockingIOError):
                while more := os.read(receive, 1 << 16):
                    said += more
            os.close(receive)
            for line in said.decode().splitlines():
                number, what = json.loads(line)
                found.setdefault(re.sub(r"0x[0-9a-f]+|\d+", "N", what), []).append(number)
            current, refused, answered, wrong = struct.unpack_from("<4q", shared, 0)
            counts += Counter(refused=refused, answered=answered, findings=wrong)
            if ended:
                how = signal.Signals(ended & 127).name if ended & 127 else f"code {ended >> 8}"
                found.setdefault(f"the reading process ended by {how}", []).append(current)
                counts["findings"] += 1
                step = numbers.index(current) + 1
            else:
                step = len(numbers)
    for what, where in found.items():
        findings.mkdir(parents=True, exist_ok=True)
        with (findings / "findings.txt").open("a") as file:
            file.write(f"{name} {len(where)}x, e.g. --only {where[0]}: {what}\n")
    return counts, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets, by their shares")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    parser.add_argument("--only", type=int, help="this input of one target, in this process, with its traceback")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    # Imported before the fork: a child starts in no time.
    import conftest  # noqa: F401
    import made_nuclei  # noqa: F401
    import made_patches  # noqa: F401
    import test_store  # noqa: F401

    import wsipipe.stages.segment
    import wsipipe.training.loop  # noqa: F401

    if arguments.only is not None:
        (name,) = arguments.target
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        TARGETS[name].case(TARGETS[name].seeds(), random.Random(f"{name}/{arguments.only}"), folder)
        return
    total, whole = Counter[str](), sum(TARGETS[name].share for name in arguments.target)
    unique = 0
    for name in arguments.target:
        count = -(-int(arguments.inputs * TARGETS[name].share) // 1) if whole > 0.99 else arguments.inputs
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        counts, found = run_target(name, range(arguments.first, arguments.first + count), arguments.findings)
        inputs, after = sum(counts.values()), resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{name:11}{inputs:>7} inputs: {counts['refused']:>7} refused, {counts['answered']:>6} answered, "
              f"{counts['findings']:>4} findings, {spent:.0f} s of CPU", flush=True)  # fmt: skip
        for what, where in found.items():
            print(f"    {len(where)}x, e.g. --only {where[0]}: {what}", flush=True)
        total += counts
        unique += len(found)
    summary = {"inputs": sum(total.values()), **{k: total[k] for k in ("refused", "answered", "findings")}}
    print(json.dumps(summary | {"unique_findings": unique}))
    sys.exit(1 if unique else 0)


if __name__ == "__main__":
    main()
