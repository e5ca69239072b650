"""What is read beside slides, for the fuzz harness: whole files, and how a harmed one is read."""

import contextlib
import gzip
import io
import json
import random
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_harm import Payload, Seeds, WrongError, changed, harmed, text_or_bytes

ROI = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [400, 0], [400, 300], [9, 300], [0, 0]]]},
            "properties": {"classification": {"name": "Tumor"}},
        },
        {
            "type": "Feature",
            "geometry": {
                "type": "MultiPolygon",
                "coordinates": [[[[500, 500], [600, 500], [500, 600], [600, 600]]], [[[1, 1], [2, 1], [2, 2], [1, 2]]]],
            },
            "properties": {},
        },
    ],
}


def roi_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.geometry import Grid
    from wsipipe.roi import read_roi
    from wsipipe.tissue import TissueMask

    path = folder / "roi.geojson"
    kind = rng.random()
    if kind < 0.85:
        content = text_or_bytes(ROI, rng)
    elif kind < 0.9:  # many crossings
        corners = [[rng.uniform(-1e4, 1e5), rng.uniform(-1e4, 1e5)] for _ in range(rng.randrange(3, 60))]
        content = json.dumps({"type": "Polygon", "coordinates": [corners]}).encode()
    elif kind < 0.95:
        content = rng.choice((b"[" * 5000, b'{"type":"Feature","geometry":' * 3000, b'{"a":' * 990 + b"1" + b"}" * 990))
    else:
        content = b'{"type": "Polygon", "coordinates": [[' + b"[1, 2], " * rng.randrange(2000)
    if rng.random() < 0.2:
        content = gzip.compress(content)
        content = harmed(content, rng) if rng.random() < 0.5 else content
    path.write_bytes(content)
    grid = Grid.over(4000, 3000, 0.25, 0.25, 8.0)
    region = read_roi(path, (rng.choice((0, 1e6)), 0))
    return TissueMask(np.ones(grid.box.shape, bool), grid).restricted(region).area_mm2


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
YAMLS = (
    "tissue: {mpp: 8.0, min_area_um2: 20000}\nmaps:\n  tile_px: 256\nnuclei:\n  hv_scale: [-1.5, 0.9]\n",
    "model: cellvta-nano\ndata: {sets/a: 1.0, sets/b: 2}\nsteps: 10\nbetas: [0.9, 0.98]\ncrop_px: 256\n",
    LAUGHS,
    "tissue: &x {mpp: *x}\n",
    "tissue: !!python/object/apply:os.system ['touch hacked']\n",
    "t: 2001-99-99\n",
    "<<: [1]\n",
    "? [a, b]\n: 1\n",
    "nuclei: {hv_scale: tile, simplify_px: .nan}\n",
    "{" * 250,
    "- " * 3000,
    "tissue:\n\tmpp: 1\n",
    "%YAML 9\n---\n",
)


def config_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.config import load_config
    from wsipipe.training.config import load_experiment

    path = folder / "x.yaml"
    text = rng.choice(YAMLS).encode()
    if rng.random() < 0.3:
        import yaml

        with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
            value = changed(yaml.safe_load(rng.choice(YAMLS[:2])), rng)
            text = json.dumps(value).encode()
    path.write_bytes(harmed(text, rng, tuple(y.encode() for y in YAMLS)) if rng.random() < 0.8 else text)
    if rng.random() < 0.3:
        return load_experiment(path)
    return load_config(path, rng.choice((None, {"tissue": {"mpp": 4.0}})))


def patch_seeds() -> Seeds:
    from made_patches import write_set

    with tempfile.TemporaryDirectory() as folder:
        made = write_set(Path(folder) / "set", count=2, side=24)
        seeds = {file.name: file.read_bytes() for file in made.iterdir()}
    evil = io.BytesIO()
    np.save(evil, np.array([Payload()], object), allow_pickle=True)
    return seeds | {"evil": evil.getvalue()}


def patch_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.training.data import PatchSet

    names = sorted(seeds.keys() - {"evil"})
    harm = rng.choice(names)
    for name in names:
        content = seeds[name]
        if name == harm:
            if name.endswith(".npy") and rng.random() < 0.1:
                content = seeds["evil"]
            elif name == "dataset.json":
                content = text_or_bytes(json.loads(content), rng)
            else:
                content = harmed(content, rng, tuple(seeds.values()))
        (folder / name).write_bytes(content)
    patches = PatchSet.open(folder)
    return len(patches), patches.images.sum(), patches.instances.sum()


def table_seeds() -> Seeds:
    from made_nuclei import made_meta, made_nuclei

    from wsipipe.table import NucleiSpool

    with tempfile.TemporaryDirectory() as folder:
        spool = NucleiSpool(Path(folder) / "n.parquet", made_meta(), {"side": 2048})
        rng = np.random.default_rng(0)
        for block in range(3):
            spool.add(block, made_nuclei(rng.uniform(0, 3000, (20, 2)), block))
        seeds = {f"spool/{file.name}": file.read_bytes() for file in spool.folder.iterdir()}
        spool.finish(range(3))
        return seeds | {"table": (Path(folder) / "n.parquet").read_bytes()}


def _table_digest(path: Path) -> int:
    from wsipipe.table import read_nuclei

    meta, batches = read_nuclei(path)
    rows = [row for batch in batches for row in batch.to_pylist()]
    return zlib.crc32(repr((meta, rows)).encode())


def table_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from made_nuclei import made_meta

    from wsipipe.geojson import write_geojson
    from wsipipe.table import NucleiSpool

    path = folder / "n.parquet"
    if rng.random() < 0.7:
        path.write_bytes(harmed(seeds["table"], rng))
        if rng.random() < 0.2:
            return write_geojson(path, folder / "n.geojson.gz")
    else:
        names = [name for name in seeds if name.startswith("spool/")]
        harm = rng.choice(names)
        (folder / "n.parquet.partial").mkdir()
        for name in names:
            content = harmed(seeds[name], rng, (seeds[names[0]],)) if name == harm else seeds[name]
            (folder / "n.parquet.partial" / Path(name).name).write_bytes(content)
        NucleiSpool(path, made_meta(), {"side": 2048}).finish(range(3))
    digest = _table_digest(path)
    if not hasattr(table_case, "expected"):
        (folder / "whole.parquet").write_bytes(seeds["table"])
        table_case.expected = _table_digest(folder / "whole.parquet")  # type: ignore[attr-defined]
    if digest != table_case.expected:  # type: ignore[attr-defined]
        raise WrongError("nuclei differ from what was stored")
    return digest


SHEET = (
    "# slides of a study\nslide\tpath\tmpp\troi\tmodel\tgroup\n"
    "a-1\tx.svs\t0.25\t\t\tone\nB_2\tslides/y z.svs\t\troi.geojson\tcellvta-nano\ttwo\nc\ts3://bucket/z.tif\t0.5\n"
)
CELLS = (
    "", "../../etc/passwd", "/etc/passwd", "a b", "a\nb", '"a\tb', "x" * 200_000, "nan", "inf", "-1", "1e400", "0,25",
    "ä", "\u202e", "A-1", "con", ".", "..", "-o", "$(touch hacked)", "`touch hacked`", "{slide}", "{{", "x" * 129, "\0",
    "http://",
)  # fmt: skip


def sheet_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    """Sheets of slides and the settings of the workflow; the refusal has one line a fault."""
    from wsipipe.cohort import MOST_FAULTS, load_cohort
    from wsipipe.errors import ConfigError

    path = folder / "slides.tsv"
    rows = [line.split("\t") for line in SHEET.splitlines()]
    for _ in range(rng.randrange(4)):
        row = rng.choice(rows)
        if rng.random() < 0.6:
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        else:
            rows.insert(rng.randrange(len(rows)), list(rng.choice(rows)))
    content = (
        rng.choice(("\n", "\n", "\r\n", "\r")).join("\t".join(row) for row in rows).encode("utf-8", "surrogatepass")
    )
    content = rng.choice((b"", b"", b"\xef\xbb\xbf", b"\xff\xfe")) + content
    path.write_bytes(harmed(content, rng) if rng.random() < 0.6 else content)
    settings: Any = {"slides": str(path), "form": "outlines", "settings": {"tissue": {"mpp": 8.0}}}
    if rng.random() < 0.3:
        settings = changed(settings, rng)
        settings = {**settings, "slides": str(path)} if isinstance(settings, dict) else {"slides": str(path)}
    try:
        cohort = load_cohort(settings, ["x.svs", "slides/y z.svs", "roi.geojson"])
    except ConfigError as error:
        lines = str(error).split("\n")
        if len(lines) > MOST_FAULTS + 20 or len(str(error)) > 100_000:
            raise WrongError(f"a refusal of {len(lines)} lines, {len(str(error))} characters") from error
        if any(len(line.splitlines()) > 1 for line in lines):
            raise WrongError("a line of the refusal is broken") from error
        raise ConfigError("refused") from error
    for name in cohort.slides:
        if not name or name.startswith(".") or set(name) & set("/\\\n\t \0"):
            raise WrongError(f"{name!r} names a folder")
        for stage in ("tissue", "maps", "nuclei", "export", "report"):
            cohort.options(stage, name)
    return list(cohort.slides)


def outline_seeds() -> Seeds:
    import tifffile
    from made_nuclei import made_meta, made_nuclei
    from PIL import Image

    from wsipipe.geojson import write_geojson
    from wsipipe.table import NucleiSpool

    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "n.parquet"
        spool = NucleiSpool(table, made_meta(), {"side": 2048})
        spool.add(0, made_nuclei(np.random.default_rng(0).uniform(0, 3000, (12, 2)), 0))
        spool.finish(range(1))
        write_geojson(table, Path(folder) / "n.geojson.gz")
        packed = (Path(folder) / "n.geojson.gz").read_bytes()
        mask = np.zeros((40, 48), np.uint16)
        mask[3:9, 4:12], mask[20:30, 20:24] = 1, 7
        np.save(Path(folder) / "n.npy", mask)
        tifffile.imwrite(Path(folder) / "n.tif", mask)
        Image.fromarray(mask.astype(np.uint8)).save(Path(folder) / "n.png")
        files = {name: (Path(folder) / name).read_bytes() for name in ("n.parquet", "n.npy", "n.tif", "n.png")}
        return files | {"n.geojson.gz": packed, "n.geojson": gzip.decompress(packed)}


def outline_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    """What `wsipipe compare` takes for the truth: GeoJSON of any software, masks, tables."""
    from wsipipe.stages.compare import read_nuclei_file

    name = rng.choice((*sorted(seeds), "n.geojson", "n.geojson", "n.csv", "bomb.geojson.gz"))
    path = folder / name
    if name == "n.geojson" and rng.random() < 0.8:
        content = text_or_bytes(json.loads(seeds[name]), rng)
    elif name == "n.csv":
        path = folder / "n.png"
        (folder / "n.csv").write_bytes(harmed(b"id,type\n1,round\n7,long\n", rng))
        content = seeds["n.png"]
    elif name == "bomb.geojson.gz":
        inner = rng.choice((b" ", b"[", b'{"features": [', b'{"features": [{"a": "' + b"x" * 4096))
        content = gzip.compress(inner * rng.choice((1, 100, 20_000)), 1)
    else:
        content = harmed(seeds[name], rng, tuple(seeds.values()))
    path.write_bytes(content)
    return len(read_nuclei_file(path).nuclei.outlines)
