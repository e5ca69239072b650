"""What a feature of QuPath's GeoJSON outlines, and its class."""

import json
from pathlib import Path
from typing import Any

import pytest
import shapely

from wsipipe.objects import class_of, is_region, outline_of
from wsipipe.training.sources.qupath import read_annotation

CELL = shapely.box(0, 0, 30, 30)
NUCLEUS = shapely.box(10, 10, 20, 20)


def feature(**members: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": shapely.geometry.mapping(CELL), **members}


def test_of_a_cell_it_is_the_nucleus_that_counts() -> None:
    assert outline_of(feature(nucleusGeometry=shapely.geometry.mapping(NUCLEUS))).equals(NUCLEUS)
    assert outline_of(feature()).equals(CELL)
    assert outline_of(feature(nucleusGeometry=None)).equals(CELL)


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        (None, ""), ({}, ""), ({"classification": None}, ""), ({"classification": {"name": None}}, ""),
        ({"classification": {"name": "Tumor", "color": [1, 2, 3]}}, "Tumor"), ({"classification": "Tumor"}, "Tumor"),
        ({"classification": {"names": ["Tumor", "Positive"]}}, "Tumor Positive"),
    ],
)  # fmt: skip
def test_a_class_is_read_however_qupath_writes_it(properties: dict[str, Any] | None, name: str) -> None:
    assert class_of(feature(properties=properties)) == name


@pytest.mark.parametrize("name", ["Region*", "Region", "region*", "REGION"])
def test_regions_are_told_from_nuclei_by_their_class(name: str) -> None:
    assert is_region(name)
    assert not is_region(f"{name} of interest")
    assert not is_region("")


def test_annotations_to_learn_from_have_classes_however_they_are_written(tmp_path: Path) -> None:
    classes = ["Tumor", {"names": ["Tumor", "Positive"]}, {"name": "Region"}]
    objects = [feature(properties={"classification": kind}) for kind in classes]
    (tmp_path / "a.geojson").write_text(json.dumps(objects))
    annotation = read_annotation(tmp_path / "a.geojson")
    assert [name for _, name in annotation.nuclei] == ["Tumor", "Tumor Positive"]
    assert len(annotation.regions) == 1
