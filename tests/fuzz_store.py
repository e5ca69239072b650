"""Map stores for the fuzz harness: harm that checksums catch, and harm behind checksums that were made to fit."""

import contextlib
import json
import random
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_harm import NUMBERS, Seeds, WrongError, changed, harmed, text_or_bytes

ARRAYS = ("np", "hv", "nc")
SIDE_PX = 80  # of the part that is read of a store whose attributes may tell any size


def store_seeds() -> Seeds:
    from test_store import complete

    with tempfile.TemporaryDirectory() as folder:
        roots = [complete(Path(folder) / name).path for name in ("maps.zarr", "other.zarr")]
        seeds, other = (
            {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
            for root in roots
        )
        assert seeds == other
    return seeds


def store_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    """What is accepted though no checksum was made anew must give the maps that were stored."""
    files = dict(seeds)
    kind = rng.random()
    if kind < 0.15:
        _harm_blindly(files, rng)
    elif kind < 0.35:
        _harm_description(files, rng)
    elif kind < 0.45:
        _harm_lines(files, rng)
    elif kind < 0.6:
        return _resumed(seeds, files, rng, folder)
    else:
        (_harm_attributes if kind < 0.8 else _harm_content)(files, rng)
        return _summary(_placed(files, folder / "maps.zarr"), SIDE_PX)
    return _as_stored(_placed(files, folder / "maps.zarr"), seeds, folder)


def _harm_blindly(files: Seeds, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2))):
        name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
        what = rng.randrange(8)
        if what == 0 and len(files) > 1:
            del files[name]
        elif what == 1:
            files[name], files[other] = files[other], files[name]
        elif what == 2 and name.endswith(".json"):
            with contextlib.suppress(ValueError):
                files[name] = text_or_bytes(json.loads(files[name]), rng)
        else:
            files[name] = harmed(files[name], rng, (files[other],))


def _harm_description(files: Seeds, rng: random.Random) -> None:
    """What zarr is told of an array is read before anything that has a checksum."""
    name = f"{rng.choice((*ARRAYS, 'tissue', 'wanted'))}/zarr.json"
    about = json.loads(files[name])
    what = rng.randrange(6)
    if what == 0:
        about["fill_value"] = rng.choice((1, 255, -1, 0.0, "NaN", None, [0], rng.randrange(256)))
    elif what == 1:
        codecs = [
            {"name": "bytes"}, {"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"},
            {"name": "transpose", "configuration": {"order": list(range(len(about["shape"])))[::-1]}},
            {"name": "gzip", "configuration": {"level": 1}}, {"name": "zstd", "configuration": {"level": 1}},
            {"name": "sharding_indexed",
             "configuration": {"chunk_shape": about["shape"], "codecs": [{"name": "bytes"}]}},
        ]  # fmt: skip
        about["codecs"] = rng.sample(codecs, rng.randrange(4))
    elif what == 2:
        separator = {"separator": rng.choice((".", "/", "/../", "", "\0"))}
        about["chunk_key_encoding"] = {"name": rng.choice(("v2", "default", "default")), "configuration": separator}
    elif what == 3:
        key = rng.choice(("shape", "chunk_grid"))
        about[key] = json.loads(json.dumps(about[key]).replace("32", str(rng.choice((0, 1, 16, 64, -32, *NUMBERS)))))
    else:
        about = changed(about, rng)
    files[name] = json.dumps(about).encode()
    if rng.random() < 0.2:
        files[name] = harmed(files[name], rng)


def _harm_lines(files: Seeds, rng: random.Random) -> None:
    """The log of finished chunks, and the places that could not be read."""
    lines = files["commits"].decode().splitlines()
    at = rng.randrange(len(lines))
    index = rng.choice((0, 1, 3, 5, 6, 999_999_999, *NUMBERS))
    lines[at : at + 1] = rng.choice(([], [lines[at]] * 2, lines[::-1], [f"{index} {lines[at].split()[1]}"], [""]))
    files["commits"] = "".join(f"{line}\n" for line in lines).encode()
    if rng.random() < 0.3:
        files["commits"] = harmed(files["commits"], rng)
    if rng.random() < 0.5:
        places = "".join(f"{rng.choice(NUMBERS)} 0 {rng.choice(NUMBERS)} 256\n" for _ in range(rng.randrange(3)))
        files["unread"] = harmed(places.encode() or b"0 0 256 256\n", rng) if rng.random() < 0.7 else places.encode()


def _harm_attributes(files: Seeds, rng: random.Random) -> None:
    """Attributes that say something else, with their checksum, mostly with arrays of the sizes that they tell of."""
    from wsipipe.provenance import sum_of

    group = json.loads(files["zarr.json"])
    attributes = group["attributes"]
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice([key for key in attributes if key != "sum"])
        if key in ("grid", "tissue_grid", "tiles") and rng.random() < 0.7:  # numbers that may make sense
            inner = rng.choice(list(attributes[key]))
            attributes[key][inner] = rng.choice((0, 1, 3, 16, 31, 100, 1e-300, 1e300, float("nan"), -1, *NUMBERS))
        else:
            attributes[key] = changed(attributes[key], rng)
    attributes["sum"] = sum_of(attributes)
    files["zarr.json"] = json.dumps(group).encode()
    if rng.random() < 0.7:
        with contextlib.suppress(Exception):  # there may be no such sizes
            _fit_arrays(files, attributes)


def _fit_arrays(files: Seeds, attributes: dict[str, Any]) -> None:
    from wsipipe.provenance import StoreMeta
    from wsipipe.store import _layouts

    for name, layout in _layouts(StoreMeta.from_json(attributes)).items():
        about = json.loads(files[f"{name}/zarr.json"])
        about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"] = list(layout.shape), list(layout.chunks)
        files[f"{name}/zarr.json"] = json.dumps(about).encode()


def _harm_content(files: Seeds, rng: random.Random) -> None:
    """Chunks whose compressed bytes are not what they should be, with the checksum of these bytes in the log."""
    from numcodecs.zstd import Zstd

    pack: Callable[[bytes], bytes] = Zstd(level=1).encode
    name = rng.choice(sorted(name for name in files if name.startswith(tuple(f"{array}/c/" for array in ARRAYS))))
    files[name] = rng.choice((
        harmed(files[name], rng, (files[rng.choice(sorted(files))],)),
        harmed(files[name][:18], rng) + files[name][18:],  # where zstd says how much it is
        pack(rng.randbytes(rng.choice((0, 1, 31 * 32, 32 * 32 - 1, 32 * 32 + 1)))),
        pack(bytes(rng.choice((1 << 20, 1 << 26)))),  # far more than a chunk
        files[name] * 2,
        b"",
    ))  # fmt: skip
    lines = []
    for line in files["commits"].decode().splitlines():
        index = int(line.split()[0])
        crc = index
        for array in ARRAYS:
            place = ("0/" if array != "np" else "") + f"{index // 3}/{index % 3}"
            crc = zlib.crc32(files[f"{array}/c/{place}"], crc)
        lines.append(f"{index} {crc:08x}\n")
    files["commits"] = "".join(lines).encode()


def _resumed(seeds: Seeds, files: Seeds, rng: random.Random, folder: Path) -> object:
    """A store that a kill left and that was harmed since: refused, or gone on with to the same maps."""
    from test_store import META, TISSUE, WANTED, some_maps

    from wsipipe.store import MapStore

    lines = files["commits"].splitlines(keepends=True)
    files["commits"] = b"".join(lines[: rng.randrange(len(lines) + 1)])
    rng.choice((_harm_blindly, _harm_description))(files, rng)
    _placed(files, folder / "maps.zarr.partial")
    path = folder / "maps.zarr"
    with MapStore.resume_or_create(path, META, WANTED, TISSUE) as store:
        for index in sorted(store.missing):
            store.write_chunk(index, some_maps(META.chunk_box(index)))
        store.finish()
    return _as_stored(path, seeds, folder)


def _placed(files: Seeds, root: Path) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _summary(root: Path, side_px: int) -> int:
    """Hash of what a store says and of its maps from the corner on."""
    from wsipipe.geometry import Box
    from wsipipe.store import MapStore

    store = MapStore.open(root)
    maps, _ = store.read(Box(0, 0, side_px, side_px)), store.unread
    parts = (maps.nuclei, maps.offsets, maps.types, store.tissue)
    if [part.dtype for part in parts] != [np.uint8, np.int8, np.uint8, np.bool_]:
        raise WrongError("maps of another kind")
    said = repr((store.meta, sorted(store.wanted.items())))
    return zlib.crc32(b"".join(part.tobytes() for part in parts) + said.encode())


def _as_stored(root: Path, seeds: Seeds, folder: Path) -> int:
    found = _summary(root, SIDE_PX)
    if not hasattr(_as_stored, "expected"):
        _as_stored.expected = _summary(_placed(seeds, folder / "whole.zarr"), SIDE_PX)  # type: ignore[attr-defined]
    if found != _as_stored.expected:  # type: ignore[attr-defined]
        raise WrongError("maps differ from what was stored")
    return found
