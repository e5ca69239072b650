"""The files of one slide's results: their names, and a record beside each of how it was made."""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wsipipe
from wsipipe.atomic import finished
from wsipipe.errors import StoreError
from wsipipe.geometry import Box
from wsipipe.lock import Lock

if TYPE_CHECKING:
    from wsipipe.slide import Slide


@dataclass(frozen=True, slots=True)
class ResultFolder:
    """Where everything about one slide goes."""

    path: Path

    @property
    def tissue(self) -> Path:
        return self.path / "tissue.png"

    @property
    def maps(self) -> Path:
        return self.path / "maps.zarr"

    @property
    def nuclei(self) -> Path:
        return self.path / "nuclei.parquet"

    @property
    def geojson(self) -> Path:
        return self.path / "nuclei.geojson.gz"

    @property
    def overlay(self) -> Path:
        return self.path / "overlay.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def prepare(self) -> None:
        """Make the folder, and be sure before anything slow begins that files can be written to it.

        Raises
        ------
        StoreError
            If they cannot.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError as error:
            raise StoreError(f"{self.path!r} is no name in UTF-8; choose another folder with --out") from error
        probe = self.path / f".writable-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StoreError(f"{self.path} cannot be written to: {reason}; choose another folder with --out") from error

    @contextmanager
    def claimed(self, slide: "Slide", *outputs: Path, wait: bool = False) -> Iterator[None]:
        """Hold the folder for one slide, and `outputs` in it against other processes, while the block runs.

        The first to come writes `slide.json`, which says whose results these are. `wait` waits for outputs that
        another process writes.

        Raises
        ------
        StoreError
            If the folder cannot be written to or is of another slide, or if another process writes an output.
        """
        self.prepare()
        with ExitStack() as held:
            for output in outputs:
                held.callback(Lock(output, wait=wait).release)
            self._belongs_to(slide)
            yield

    def _belongs_to(self, slide: "Slide") -> None:
        record = self.path / "slide.json"
        if not record.exists():
            with finished(record) as partial:
                about = {"path": slide.path, "fingerprint": slide.fingerprint}
                partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        try:
            about = json.loads(record.read_bytes())
            path, fingerprint = str(about["path"]), str(about["fingerprint"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{record} is damaged; remove it if {self.path} is of {slide.path}") from error
        if fingerprint != slide.fingerprint:
            raise StoreError(
                f"{self.path} holds results of another slide, {path}; choose another folder with --out, "
                "or remove this one"
            )


def record_of(output: Path) -> Path:
    """`<output>.json`, the record beside an output."""
    return output.with_name(output.name + ".json")


def unread_in(*records: Mapping[str, Any]) -> list[Box]:
    """Places at level 0 that could not be read, as records of stages tell of them; each once, from top to bottom."""
    boxes = {Box(**box) for record in records for box in record.get("unread_px0", ())}
    return sorted(boxes, key=lambda box: (box.y0, box.x0, box.y1, box.x1))


def drop_record(output: Path) -> None:
    """Before an output gets its name: after a kill no record of an earlier one is to tell of it."""
    record_of(output).unlink(missing_ok=True)


def write_record(output: Path, **values: Any) -> None:
    """Write the record of an output: version, command, and what the stage says of its work."""
    record = {"wsipipe": wsipipe.__version__, "command": shlex.join(sys.argv), **values}
    with finished(record_of(output)) as partial:
        partial.write_text(json.dumps(record, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
