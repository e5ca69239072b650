"""QuPath's objects, as the features of its GeoJSON hold them: what they outline, and their class."""

from typing import Any

import shapely

REGION = "region*"  # QuPath's own class for areas to look into; QuPath writes the star
IGNORE = "ignore*"  # and that for areas to look past


def outline_of(feature: dict[str, Any]) -> shapely.Geometry:
    """What an object outlines, level-0 px from the corner of the slide's bounds; of a cell its nucleus, if it has one.

    Raises
    ------
    KeyError, TypeError, ValueError, AttributeError or shapely.errors.ShapelyError
        If it has no geometry that can be read.
    """
    return shapely.geometry.shape(feature.get("nucleusGeometry") or feature["geometry"])


def class_of(feature: dict[str, Any]) -> str:
    """The class of an object, the parts of a derived class joined by blanks; empty where it has none."""
    kind = (feature.get("properties") or {}).get("classification") or ""
    if isinstance(kind, dict):
        return str(kind.get("name") or " ".join(kind.get("names") or ()))
    return str(kind)


def is_region(name: str) -> bool:
    """Whether objects of this class are areas to look into, no nuclei."""
    return name.lower() in (REGION, REGION.rstrip("*"))


def is_ignored(name: str) -> bool:
    """Whether objects of this class are areas to look past, no nuclei."""
    return name.lower() in (IGNORE, IGNORE.rstrip("*"))
