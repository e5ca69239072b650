"""What a map store says of itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_store import META

from wsipipe.errors import StoreError
from wsipipe.geometry import Box
from wsipipe.provenance import StoreMeta, differences, read_attributes
from wsipipe.tiles import TileGeometry


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 3), st.data())
def test_a_box_meets_exactly_the_chunks_whose_pixels_it_shares(
    width: int, height: int, chunk_tiles: int, data: st.DataObject
) -> None:
    meta = replace(META, grid=replace(META.grid, width=width, height=height), geometry=TileGeometry(32, 8, chunk_tiles))
    numbered = np.full((height, width), -1)
    index = 0
    while not (box := meta.chunk_box(index)).is_empty:
        numbered[box.slices] = index
        index += 1
    assert (numbered >= 0).all()
    x, y = data.draw(st.integers(-50, 210)), data.draw(st.integers(-50, 210))
    box = Box(x, y, x + data.draw(st.integers(0, 100)), y + data.draw(st.integers(0, 100)))
    assert meta.chunk_indices(box) == np.unique(numbered[box.clipped(meta.grid.box).slices]).tolist()


def test_what_is_read_back_is_what_was_said() -> None:
    assert StoreMeta.from_json(META.to_json()) == META


def test_of_a_long_value_the_beginning_is_told() -> None:
    (said,) = differences({"region": "POLYGON " * 10_000}, {"region": None})
    assert said.startswith("region POLYGON")
    assert len(said) < 150


def test_a_renamed_slide_makes_no_difference_and_another_slide_does() -> None:
    assert not differences(META.identity(), replace(META, slide="renamed", config_hash="other").identity())
    (told,) = differences(META.identity(), replace(META, fingerprint="12" * 32).identity())
    assert told == "slide.fingerprint abababababab there and 121212121212 now"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"attributes": ' + "[" * 100_000, "is not a map store of wsipipe"),
        ('{"attributes": {"wsipipe": {"format": "' + "9\\n" * 5000 + '"}}}', "has format version"),
    ],
    ids=["nested", "long"],
)
def test_attributes_that_are_not_ours_are_refused_in_a_short_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match=said) as refusal:
        read_attributes(tmp_path)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 600
