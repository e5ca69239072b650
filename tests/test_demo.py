import socket
from pathlib import Path

import numpy as np
import openslide
import pytest
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.measure import label, regionprops_table

from wsipipe.demo import MPP, draw_tissue, make_demo_slide


def test_the_slide_opens_as_aperio_with_its_resolution_and_levels(tmp_path: Path) -> None:
    path = make_demo_slide(tmp_path / "new" / "demo.svs", 512)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == MPP
        assert slide.level_dimensions == ((512, 512), (256, 256), (128, 128), (64, 64))
        pixels = np.asarray(slide.read_region((0, 0), 0, (512, 512)))[..., :3]
    assert np.abs(pixels.astype(int) - draw_tissue(512)).mean() < 3


def test_the_same_bytes_are_written_every_time_and_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    first, second = (make_demo_slide(tmp_path / name, 256).read_bytes() for name in ("a.svs", "b.svs"))
    assert first == second


def test_the_tissue_is_one_piece_with_glass_all_round() -> None:
    glass = (draw_tissue(1024) == (243, 242, 244)).all(axis=2)
    pieces, _ = ndimage.label(glass)
    outside = pieces == pieces[0, 0]
    assert outside[[0, -1]].all()
    assert outside[:, [0, -1]].all()
    _, count = ndimage.label(~outside)
    assert count == 1
    assert 0.4 < outside.mean() < 0.6


def test_the_colours_are_those_of_haematoxylin_and_eosin() -> None:
    rgb = draw_tissue(1024)
    tissue = rgb[(rgb < 225).any(axis=2)].astype(int)
    assert (tissue[:, 0] >= tissue[:, 1]).mean() > 0.95  # pink and purple: never green, brown or blue
    assert (tissue[:, 2] >= tissue[:, 1]).mean() > 0.95
    assert (tissue[:, 0] > tissue[:, 2]).mean() > 0.6  # more of it pink than purple


def test_nuclei_have_the_size_of_nuclei() -> None:
    """Crude nuclei, by threshold: the dark, plump pieces of haematoxylin."""
    haematoxylin = ndimage.gaussian_filter(rgb2hed(draw_tissue(1024))[..., 0], 1)
    pieces = regionprops_table(label(haematoxylin > np.percentile(haematoxylin, 85)), properties=("area", "solidity"))
    plump = pieces["area"][(pieces["solidity"] > 0.85) & (pieces["area"] > 24)] * MPP**2
    assert len(plump) > 100
    assert 15 < np.median(plump) < 60


@pytest.mark.parametrize("side_px", [0, -16, 1000])
def test_a_side_that_does_not_halve_evenly_is_refused(side_px: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        draw_tissue(side_px)
