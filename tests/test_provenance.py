"""What a map store says of itself."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_store import META

from wsipipe.geometry import Box
from wsipipe.provenance import StoreMeta, differences
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


def test_a_renamed_slide_makes_no_difference_and_another_slide_does() -> None:
    assert not differences(META.identity(), replace(META, slide="renamed", config_hash="other").identity())
    (told,) = differences(META.identity(), replace(META, fingerprint="12" * 32).identity())
    assert told == "slide.fingerprint abababababab there and 121212121212 now"
