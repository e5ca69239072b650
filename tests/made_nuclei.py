"""Nuclei made up for the tests of tables and their exports."""

import uuid

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from wsipipe.features import NUCLEI_SCHEMA
from wsipipe.geometry import Box, Grid
from wsipipe.table import TABLE_SCHEMA, NucleiMeta

CLASSES = ("background", "neoplastic", "inflammatory", "connective")
COLOURS = ((255, 255, 255), (220, 40, 40), (30, 160, 60), (40, 90, 220))


def made_meta(width_px0: int = 40_000, height_px0: int = 30_000, bounds: Box | None = None) -> NucleiMeta:
    return NucleiMeta(
        slide="made up µ.svs",
        fingerprint="c0ffee",
        width_px0=width_px0,
        height_px0=height_px0,
        bounds=bounds,
        grid=Grid.over(width_px0, height_px0, 0.25, 0.25, 0.25),
        class_names=CLASSES,
        class_colours=COLOURS,
        model={"name": "made-up", "sha256": "0123"},
        config={"nuclei": {"min_area_um2": 6.0}},
        versions={"wsipipe": "0.1.0"},
    )


def made_nuclei(centres: npt.ArrayLike, seed: int = 0, radius_px0: float = 12) -> pa.RecordBatch:
    """Round nuclei at `centres` (N, 2), level-0 px, 0.25 µm per px; a nucleus depends on its centre and row alone."""
    xy = np.asarray(centres, np.float64).reshape(-1, 2)
    rng = np.random.default_rng(seed)
    n = len(xy)
    angle = np.linspace(0, 2 * np.pi, 13)[:-1]
    radius = radius_px0 * rng.uniform(0.8, 1.2, (n, 12, 1))
    rings = np.round(xy[:, None] + radius * np.stack([np.cos(angle), np.sin(angle)], -1), 1)
    polygons = shapely.polygons(rings) if n else np.zeros(0, object)
    type_id = (rng.integers(0, 3, n) + 1).astype(np.uint8)
    values = {
        "id": [str(uuid.uuid5(uuid.NAMESPACE_OID, f"{x} {y}")) for x, y in xy.tolist()],
        "type": [CLASSES[i] for i in type_id],
        "type_id": type_id,
        "x_px0": xy[:, 0],
        "y_px0": xy[:, 1],
        "x_um": xy[:, 0] * 0.25,
        "y_um": xy[:, 1] * 0.25,
        "area_um2": shapely.area(polygons) * 0.0625,
        "perimeter_um": shapely.length(polygons) * 0.25,
        "geometry": list(shapely.to_wkb(polygons)),
    }
    return pa.record_batch(
        [pa.array(values.get(f.name, rng.uniform(0, 1, n).astype(np.float32)), f.type) for f in NUCLEI_SCHEMA],
        schema=NUCLEI_SCHEMA,
    )


def with_surroundings(nuclei: pa.RecordBatch) -> pa.RecordBatch:
    """The nuclei as a table holds them, as if each were alone."""
    columns = {"neighbors_50um": pa.array([0] * nuclei.num_rows, pa.int32())}
    columns |= {"nearest_um": pa.nulls(nuclei.num_rows, pa.float32())}
    columns |= {name: nuclei[name] for name in nuclei.schema.names}
    return pa.record_batch([columns[name] for name in TABLE_SCHEMA.names], schema=TABLE_SCHEMA)
