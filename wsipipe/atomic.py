"""Files and folders that are complete or not there: what is not yet complete is called `.partial`."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def finished(path: Path) -> Iterator[Path]:
    """Yield `<path>.partial` to write a file to; it takes the name `path` only if the block succeeds."""
    partial = partial_of(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)  # left by a kill; or a link, which would lead the writer elsewhere
    try:
        yield partial
        to_disk(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def partial_of(path: Path) -> Path:
    """What a path is called as long as it is not complete."""
    return path.with_name(path.name + ".partial")


def discard(path: Path) -> None:
    """Delete a folder; its name is free at once, so that a kill leaves no half of it under that name."""
    discarded = path.with_name(path.name + ".discarded")
    _remove(discarded)  # what a kill left of an earlier one
    if path.exists() or path.is_symlink():
        path.replace(discarded)
        _remove(discarded)


def _remove(path: Path) -> None:
    """A folder with all that is in it; of a link to one, the link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def to_disk(path: Path) -> None:
    """Return once the content of a file survives a crash of the machine."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
