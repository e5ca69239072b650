"""Regions of interest from a QuPath GeoJSON export."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.affinity import translate

from wsipipe.errors import ConfigError

MAX_BYTES = 64 << 20  # a million corners; regions drawn by hand have thousands
MAX_PX0 = 1e7  # no slide is wider


def read_roi(path: str | Path, offset: tuple[float, float] = (0.0, 0.0)) -> shapely.Geometry:
    """The union of all areas of a QuPath export, at level 0.

    Parameters
    ----------
    path : str or Path
        A FeatureCollection, a Feature, a list of features or a bare geometry; may be gzipped. Polygons
        and MultiPolygons, holes kept; what crosses itself is repaired.
    offset : (float, float)
        Added to the coordinates. QuPath counts from the corner of `Slide.bounds` where a slide has bounds.

    Returns
    -------
    shapely Polygon or MultiPolygon
        Valid and not empty, level-0 px.

    Raises
    ------
    ConfigError
        If the file cannot be read, is no GeoJSON, or holds anything but areas.
    """
    try:
        areas = [shapely.make_valid(area, method="structure") for area in _polygons(_load(path), str(path))]
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply for a GeoJSON file; export the regions anew") from error
    region = areal(shapely.union_all([areal(area) for area in areas]))
    if region.is_empty:
        raise ConfigError(f"{path} holds no area; export closed shapes from QuPath as GeoJSON")
    return translate(region, *offset)


def _load(path: str | Path) -> Any:
    try:
        with Path(path).open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            text = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a region file: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be unpacked, it is damaged or incomplete: {error}") from error
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{path} holds more than {MAX_BYTES >> 20} MB; export the regions only, without detections")
    try:
        return json.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path} is not GeoJSON: {error}") from error


def _polygons(found: Any, where: str) -> Iterator[shapely.Geometry]:
    """Every polygon in a piece of GeoJSON; `where` leads to it."""
    if isinstance(found, list):
        for n, item in enumerate(found):
            yield from _polygons(item, f"{where}, item {n}")
        return
    kind = found.get("type") if isinstance(found, dict) else None
    if kind == "FeatureCollection":
        yield from _polygons(_list(found.get("features"), where), where)
    elif kind == "Feature":
        yield from _polygons(found.get("geometry"), where)
    elif kind == "GeometryCollection":
        yield from _polygons(_list(found.get("geometries"), where), where)
    elif kind == "Polygon":
        yield _polygon(found.get("coordinates"), where)
    elif kind == "MultiPolygon":
        for rings in _list(found.get("coordinates"), where):
            yield _polygon(rings, where)
    elif kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        raise ConfigError(f"{where} is a {kind}, which has no area; remove it or draw a closed shape")
    else:
        raise ConfigError(f"{where} is no GeoJSON geometry or feature; export the regions from QuPath as GeoJSON")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} lacks its list of parts; export the regions from QuPath as GeoJSON")
    return value


def _polygon(rings: Any, where: str) -> shapely.Geometry:
    corners = []
    for ring in _list(rings, where):
        try:
            points = np.array([point[:2] for point in _list(ring, where)], np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{where} has corners that are not pairs of numbers") from error
        if points.shape[1:] != (2,) or len(points) < 3:
            raise ConfigError(f"{where} has an outline of fewer than 3 corners")
        if not (np.abs(points) <= MAX_PX0).all():
            raise ConfigError(f"{where} has corners that lie on no slide; they must be finite, in level-0 pixels")
        corners.append(points)
    return shapely.Polygon(corners[0], corners[1:]) if corners else shapely.Polygon()


def areal(geometry: shapely.Geometry) -> shapely.Geometry:
    """The polygons of a geometry: a repair may leave lines and points beside them."""
    parts = shapely.get_parts(shapely.get_parts(geometry))
    return shapely.union_all(parts[shapely.get_dimensions(parts) == 2])
