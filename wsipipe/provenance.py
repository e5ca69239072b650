"""What maps were made of, as a map store says it of itself in its attributes."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsipipe.device import Precision
from wsipipe.errors import SettingsError, StoreError, TornError
from wsipipe.geometry import Box, Grid
from wsipipe.model.spec import ModelSpec
from wsipipe.tiles import TileGeometry

if TYPE_CHECKING:
    from wsipipe.slide import Slide

FORMAT_VERSION = 3
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # errors that another reading would not mend
MOST_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class StoreMeta:
    """What maps were made of, and with what.

    Attributes
    ----------
    slide, fingerprint : str
        Name of the slide, for people; hash of its file, for comparing.
    grid : Grid
        The working pixels.
    tissue_grid : Grid
        The pixels of the tissue mask.
    tissue_settings : dict
        What the tissue was found with; JSON values.
    precision : "fp32", "bf16" or "fp16"
        Of the network's arithmetic.
    """

    slide: str
    fingerprint: str
    grid: Grid
    geometry: TileGeometry
    spec: ModelSpec
    weights_sha256: str
    precision: Precision
    tissue_grid: Grid
    tissue_settings: dict[str, Any]
    config_hash: str

    def chunk_box(self, index: int) -> Box:
        """Pixels of a chunk on the working grid; chunks count row by row."""
        side = self.geometry.chunk_px
        row, column = divmod(index, self.columns)
        x, y = column * side, row * side
        return Box(x, y, x + side, y + side).clipped(self.grid.box)

    def chunk_indices(self, box: Box) -> list[int]:
        """Chunks that a box of the working grid meets, in order."""
        side, box = self.geometry.chunk_px, box.clipped(self.grid.box)
        if box.is_empty:
            return []
        rows = range(box.y0 // side, (box.y1 - 1) // side + 1)
        columns = range(box.x0 // side, (box.x1 - 1) // side + 1)
        return [row * self.columns + column for row in rows for column in columns]

    @property
    def columns(self) -> int:
        """Chunks a row."""
        return -(-self.grid.width // self.geometry.chunk_px)

    def to_json(self) -> dict[str, Any]:
        return {
            "slide": {"name": self.slide, "fingerprint": self.fingerprint},
            "grid": asdict(self.grid),
            "tiles": asdict(self.geometry),
            "model": json.loads(self.spec.to_json()),
            "weights_sha256": self.weights_sha256,
            "precision": self.precision,
            "tissue": self.tissue_settings,
            "tissue_grid": asdict(self.tissue_grid),
            "config_hash": self.config_hash,
        }

    def identity(self) -> dict[str, Any]:
        """`identity_of` the attributes to be."""
        return identity_of(json.loads(json.dumps(self.to_json())))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "StoreMeta":
        return cls(
            slide=values["slide"]["name"],
            fingerprint=values["slide"]["fingerprint"],
            grid=Grid(**values["grid"]),
            geometry=TileGeometry(**values["tiles"]),
            spec=ModelSpec.from_json(json.dumps(values["model"])),
            weights_sha256=values["weights_sha256"],
            precision=values["precision"],
            tissue_grid=Grid(**values["tissue_grid"]),
            tissue_settings=values["tissue"],
            config_hash=values["config_hash"],
        )


def require_same_slide(path: Path, fingerprint: str, grid: Grid, slide: "Slide") -> None:
    """Let what `path` holds, of the slide with that fingerprint and on `grid`, be used with `slide`.

    Raises
    ------
    StoreError
        If it is of another slide.
    SettingsError
        If the slide was given another resolution when it was made.
    """
    if fingerprint != slide.fingerprint:
        raise StoreError(f"{path} is of another slide than {slide.path}; choose another folder with --out")
    if (grid.mpp_x0, grid.mpp_y0) != (slide.mpp_x0, slide.mpp_y0):
        raise SettingsError(
            f"{path} was made with {grid.mpp_x0:g} µm/px for {slide.path}, which is now taken to have "
            f"{slide.mpp_x0:g}; give every stage the same --mpp, or make it again with this one"
        )


def sum_of(attributes: dict[str, Any]) -> str:
    """Hash of all attributes but itself."""
    ours = {key: value for key, value in attributes.items() if key != "sum"}
    return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of(array: npt.NDArray[Any]) -> str:
    """Hash of an array's shape and values."""
    packed = np.packbits(array) if array.dtype == bool else np.ascontiguousarray(array)
    return hashlib.sha256(repr(array.shape).encode() + packed.tobytes()).hexdigest()


def tissue_sum(mask_sha256: str, region: str | None) -> str:
    """Hash of what nuclei depend on of the tissue: `sha256_of` its mask, the WKT of what it was restricted to."""
    return sum_of({"mask": mask_sha256, "region": region})


def require_sum(attributes: dict[str, Any]) -> None:
    """Raise ValueError if attributes are not as they were written."""
    if attributes["sum"] != sum_of(attributes):
        raise ValueError("its attributes do not have their checksum")


def read_attributes(root: Path, *, any_version: bool = False) -> dict[str, Any]:
    """Attributes of a store of ours.

    Raises
    ------
    StoreError
        If it does not exist, is not ours (`TornError`), or is of another format version.
    OSError
        If it cannot be read.
    """
    if not root.exists():
        raise StoreError(f"{root} does not exist; make it with `wsipipe maps`")
    try:
        attributes: dict[str, Any] = json.loads((root / "zarr.json").read_bytes())["attributes"]
        version = attributes["wsipipe"]["format"]
    except (*NOT_THERE, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TornError(f"{root} is not a map store of wsipipe; give another path") from error
    if version != FORMAT_VERSION and not any_version:
        raise StoreError(
            f"{root} has format version {version!r:.40}, this wsipipe reads {FORMAT_VERSION}; "
            "make it again with --overwrite, or use the wsipipe that made it"
        )
    return attributes


def identity_of(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes that the maps depend on. A slide may be renamed; the hash only repeats what stands beside it."""
    identity = {
        key: value for key, value in attributes.items() if key not in ("wsipipe", "counts", "config_hash", "sum")
    }
    return {**identity, "slide": {"fingerprint": attributes["slide"]["fingerprint"]}}


def differences(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """In which settings two identities differ, each with both values."""
    there, now = dict(_leaves(stored)), dict(_leaves(asked))
    return [
        f"{name} {_shown(there.get(name))} there and {_shown(now.get(name))} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    ]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]  # a sha256 is told by its start
    text = str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."  # the outline of a region is long
