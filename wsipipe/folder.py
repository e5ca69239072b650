"""The files of one slide's results: their names, and a record beside each of how it was made."""

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wsipipe
from wsipipe.errors import StoreError
from wsipipe.store import finished


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

    def prepare(self) -> None:
        """Make the folder, and be sure before anything slow begins that files can be written to it.

        Raises
        ------
        StoreError
            If they cannot.
        """
        probe = self.path / f".writable-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StoreError(f"{self.path} cannot be written to: {reason}; choose another folder with --out") from error


def write_record(output: Path, **values: Any) -> None:
    """`<output>.json`: version, command, and what the stage says of its work."""
    record = {"wsipipe": wsipipe.__version__, "command": shlex.join(sys.argv), **values}
    with finished(output.with_name(output.name + ".json")) as partial:
        partial.write_text(json.dumps(record, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
