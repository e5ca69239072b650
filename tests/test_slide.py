"""Slides of every format, at every resolution, whole and broken."""

import http.server
import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import openslide
import pydicom
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

from wsipipe.errors import ResolutionError, SlideError
from wsipipe.geometry import Box
from wsipipe.readers import OpenSlideReader, Picture, TiledTiff
from wsipipe.slide import _bounds, open_slide

UNSTATED = r"does not state its resolution.*; pass --mpp, e.g. --mpp 0.25 for a 40x scan$"


def texture(height, width, seed=0):
    """Smooth colours with noise: JPEG keeps it, and every pixel differs from its neighbours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = 128 + 60 * np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    return np.clip(waves + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pixels():
    return texture(701, 1003)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory, make_svs, pixels):
    """Odd sizes, so that the levels' sizes are rounded."""
    return make_svs(tmp_path_factory.mktemp("pyramid") / "pyramid.svs", pixels)


def whole(slide, mpp=None):
    grid = slide.grid(mpp or slide.mpp_x0)
    return slide.read(grid.box, grid)


# What a slide says of itself


def test_the_tiny_slide_says_what_it_is(tiny):
    with open_slide(tiny.path) as slide:
        assert (slide.name, slide.width_px0, slide.height_px0) == ("tiny", 1024, 768)
        assert (slide.mpp_x0, slide.mpp_y0, slide.mpp_source) == (0.25, 0.25, "vendor")
        assert (slide.reader, slide.vendor, slide.bounds) == ("tifffile", "aperio", None)
        assert slide.levels == [(1024, 768, 1.0), (512, 384, 2.0), (256, 192, 4.0)]
        assert slide.properties["aperio.MPP"] == "0.25"
        np.testing.assert_array_equal(whole(slide), tiny.pixels)


def test_rounded_levels_have_whole_downsamples(pyramid):
    with open_slide(pyramid) as slide:
        assert slide.levels == [(1003, 701, 1.0), (501, 350, 2.0), (250, 175, 4.0)]


@pytest.mark.parametrize(
    ("file", "name"), [("a.b.svs", "a.b"), ("x.ome.tif", "x"), ("y.OME.TIFF", "y"), ("plain.tif", "plain")]
)
def test_a_slide_is_named_without_its_endings(tmp_path, make_svs, file, name):
    with open_slide(make_svs(tmp_path / file, texture(64, 64), levels=1)) as slide:
        assert slide.name == name


def test_a_fingerprint_is_of_the_content(tmp_path, make_svs, pixels, pyramid):
    copy = tmp_path / "copy.svs"
    copy.write_bytes(pyramid.read_bytes())
    other = make_svs(tmp_path / "other.svs", 255 - pixels)
    prints = []
    for path, mpp in [(pyramid, None), (pyramid, 0.5), (copy, None), (other, None)]:
        with open_slide(path, mpp) as slide:
            prints.append(slide.fingerprint)
    assert prints[0] == prints[1] == prints[2] != prints[3]
    int(prints[0], 16)


# Resolution


def test_a_given_mpp_wins(tiny_slide):
    with open_slide(tiny_slide, 0.3) as slide:
        assert (slide.mpp_x0, slide.mpp_y0, slide.mpp_source) == (0.3, 0.3, "given")


@pytest.mark.parametrize("mpp", [0, -0.25, 0.001, 500, float("nan"), float("inf")])
def test_a_given_mpp_that_no_slide_has_is_refused(tiny_slide, mpp):
    with pytest.raises(SlideError, match=r"--mpp .* is no resolution"):
        open_slide(tiny_slide, mpp)


def test_a_slide_without_mpp_is_refused_with_the_remedy(tmp_path, make_svs):
    path = make_svs(tmp_path / "no_mpp.svs", texture(300, 300), mpp=None)
    with pytest.raises(ResolutionError, match=UNSTATED) as caught:
        open_slide(path)
    assert str(path) in str(caught.value)
    with open_slide(path, 0.5) as slide:
        assert slide.mpp_x0 == 0.5


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize(
    ("um_x", "um_y", "source"), [(0.25, 0.251, "tiff"), (10.0, 9.9, "tiff"), (0.04, 0.04, None), (352.8, 352.8, None)]
)
def test_resolution_tags_count_only_if_a_scanner_meant_them(tmp_path, tiled, um_x, um_y, source):
    path = tmp_path / "tags.tif"
    tile = {"tile": (128, 128)} if tiled else {}
    tags = {"resolution": (1e4 / um_x, 1e4 / um_y), "resolutionunit": "CENTIMETER", "metadata": None}
    tifffile.imwrite(path, texture(200, 300), photometric="rgb", **tags, **tile)
    if source is None:
        with pytest.raises(SlideError, match=UNSTATED):
            open_slide(path)
        return
    with open_slide(path) as slide:
        assert (slide.mpp_x0, slide.mpp_y0) == pytest.approx((um_x, um_y), rel=1e-6)
        assert slide.mpp_source == source
        assert slide.reader == ("tifffile" if tiled else "tiffslide")


# Formats


@pytest.mark.parametrize("big", [False, True], ids=["classic", "BigTIFF"])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "jpeg", "aperio_jp2000_rgb", "aperio_jp2000_ycbc"])
def test_every_kind_of_svs_gives_openslides_pixels(tmp_path, make_svs, pixels, compression, big):
    path = make_svs(tmp_path / "x.svs", pixels[:301, :403], levels=2, compression=compression, bigtiff=big)
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert slide.reader == ("openslide" if compression == "aperio_jp2000_ycbc" else "tifffile")
        expected = np.asarray(reference.read_region((0, 0), 0, reference.dimensions))[..., :3]
        np.testing.assert_array_equal(whole(slide), expected)
        level = np.asarray(reference.read_region((0, 0), 1, reference.level_dimensions[1]))[..., :3]
        grid = slide.grid(0.5)
        np.testing.assert_array_equal(slide.read(Box(0, 0, 201, 150), grid), level)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_subsampled_jpeg_gives_openslides_pixels(tmp_path, make_svs, pixels, subsampling):
    options = {
        "compression": "jpeg",
        "compressionargs": {"level": 80},
        "subsampling": subsampling,
        "photometric": "ycbcr",
    }
    path = make_svs(tmp_path / "x.svs", pixels, levels=1, **options)
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert slide.reader == "tifffile"
        np.testing.assert_array_equal(
            whole(slide), np.asarray(reference.read_region((0, 0), 0, reference.dimensions))[..., :3]
        )


def leave_out(path, page, tile, tags=("TileByteCounts",)):
    """Let a TIFF file say of a tile that it has no bytes."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in tags:
            tag = page(tiff).tags[name]
            tag.overwrite([0 if n == tile else value for n, value in enumerate(tag.value)])


def test_a_tile_that_the_scanner_left_out_is_white(tmp_path, make_svs, pixels):
    path = make_svs(tmp_path / "gap.svs", pixels, levels=1)
    leave_out(path, lambda tiff: tiff.pages[0], 1)
    expected = pixels.copy()
    expected[:256, 256:512] = 255
    with open_slide(path) as slide:
        assert slide.reader == "tifffile"
        np.testing.assert_array_equal(whole(slide), expected)


@pytest.mark.parametrize("level", [0, 1])
def test_a_tile_that_an_aperio_level_lacks_is_drawn_as_openslide_does(tmp_path, make_svs, level):
    path = make_svs(tmp_path / "gap.svs", texture(768, 1024), levels=2)
    leave_out(path, lambda tiff: tiff.pages[2 * level], 1)  # the second page is a thumbnail
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        for n, size in enumerate(reference.level_dimensions):
            region = reference.read_region((0, 0), n, size)
            expected = np.where(np.asarray(region)[..., 3:] == 0, 255, np.asarray(region)[..., :3])
            assert (expected[:256, 256:512] == 255).all() == (level == n == 0)  # tissue, where a finer level has it
            np.testing.assert_array_equal(whole(slide, 0.25 * 2**n), expected)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("planes", ["YXS", "CYX"])
def test_ome_tiff_is_read_with_its_physical_size(tmp_path, pixels, levels, planes):
    path = tmp_path / "x.ome.tif"
    data = pixels if planes == "YXS" else np.moveaxis(pixels, -1, 0)
    options = {"tile": (256, 256), "compression": "zlib", "photometric": "rgb" if planes == "YXS" else "minisblack"}
    metadata = {
        "axes": planes,
        "PhysicalSizeX": 250.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.26,
        "PhysicalSizeYUnit": "µm",
    }
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(data, subifds=levels - 1, metadata=metadata, **options)
        for n in range(1, levels):
            tiff.write(
                data[..., :: 2**n, :: 2**n] if planes == "CYX" else data[:: 2**n, :: 2**n], subfiletype=1, **options
            )
    with open_slide(path) as slide:
        assert (slide.reader, len(slide.levels), slide.mpp_source) == ("tiffslide", levels, "vendor")
        assert (slide.mpp_x0, slide.mpp_y0) == pytest.approx((0.25, 0.26))
    with open_slide(path, 0.25) as slide:
        np.testing.assert_array_equal(whole(slide), pixels)
        if levels > 1:
            np.testing.assert_array_equal(
                slide.read(Box(0, 0, 500, 350), slide.grid(0.5)), pixels[::2, ::2][:350, :500]
            )


@pytest.mark.parametrize("planes", ["YXS", "CYX"])
def test_a_tile_that_an_ome_tiff_leaves_out_is_white_at_every_level(tmp_path, pixels, planes):
    path = tmp_path / "gap.ome.tif"
    photometric, levels = "rgb" if planes == "YXS" else "minisblack", [pixels, pixels[::2, ::2]]
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for n, level in enumerate(levels):
            options = {"subfiletype": 1} if n else {"subifds": 1, "metadata": {"axes": planes}}
            data = level if planes == "YXS" else np.moveaxis(level, -1, 0)
            tiff.write(data, tile=(256, 256), compression="zlib", photometric=photometric, **options)
    for n in range(2):
        for page in range(1 if planes == "YXS" else 3):
            tags = ("TileOffsets", "TileByteCounts")
            leave_out(path, lambda tiff, n=n, page=page: tiff.series[0].levels[n].pages[page].aspage(), 1, tags)
    with open_slide(path, 0.25) as slide:
        assert (slide.reader, len(slide.levels)) == ("tiffslide", 2)
        for n, level in enumerate(levels):
            expected = level.copy()
            expected[:256, 256:512] = 255
            found = slide.read(Box(-9, -9, 500, 350), slide.grid(0.25 * 2**n))
            np.testing.assert_array_equal(found[9:, 9:], expected[:350, :500])
            assert (found[:9] == 255).all()


def test_qptiff_in_rgb_is_read(tmp_path, pixels):
    path = tmp_path / "x.qptiff"
    with tifffile.TiffWriter(path) as tiff:
        for level, kind in [
            (pixels, "FullResolution"),
            (pixels[::4, ::4], "Thumbnail"),
            (pixels[::2, ::2], "ReducedResolution"),
        ]:
            xml = f"<PerkinElmer-QPI-ImageDescription><ImageType>{kind}</ImageType></PerkinElmer-QPI-ImageDescription>"
            thumbnail = {} if kind == "Thumbnail" else {"tile": (256, 256)}
            tags = {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER", "software": "PerkinElmer-QPI"}
            tiff.write(level, photometric="rgb", description=xml, metadata=None, **tags, **thumbnail)
    with open_slide(path) as slide:
        assert slide.mpp_x0 == pytest.approx(0.25)
        np.testing.assert_array_equal(whole(slide), pixels)


def test_a_url_is_read_through_fsspec(pyramid, pixels):
    import fsspec

    fsspec.filesystem("memory").pipe("/slides/remote.svs", pyramid.read_bytes())
    with open_slide("memory://slides/remote.svs") as slide, open_slide(pyramid) as local:
        assert (slide.name, slide.reader, slide.mpp_x0) == ("remote", "tiffslide", 0.25)
        assert slide.fingerprint == local.fingerprint
        np.testing.assert_array_equal(whole(slide), pixels)
    with pytest.raises(SlideError, match=r"memory://slides/none\.svs cannot be opened"):
        open_slide("memory://slides/none.svs")


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files, as hosts of large ones do."""

    def do_GET(self):
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last or len(data)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_):
        pass


def test_bounds_that_hold_nothing_are_none():
    said = {f"openslide.bounds-{key}": "0" for key in ("x", "y", "width", "height")}
    assert _bounds(said) is None
    assert _bounds({**said, "openslide.bounds-width": "10", "openslide.bounds-height": "20"}) == Box(0, 0, 10, 20)


@pytest.mark.parametrize("mpp", [25, 0.025])
def test_a_resolution_that_lost_a_point_is_refused(pyramid, make_svs, pixels, tmp_path, mpp):
    with pytest.raises(SlideError, match=rf"--mpp {mpp} is no resolution of a slide"):
        open_slide(pyramid, mpp)
    with pytest.raises(ResolutionError, match=UNSTATED):
        open_slide(make_svs(tmp_path / "x.svs", pixels, mpp))


def test_a_slide_is_read_from_a_web_server(pyramid, pixels):
    handler = partial(Ranges, directory=str(pyramid.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        with open_slide(f"{host}/{pyramid.name}") as slide:
            assert (slide.name, slide.reader, slide.mpp_x0) == (pyramid.stem, "tiffslide", 0.25)
            np.testing.assert_array_equal(whole(slide), pixels)
        with pytest.raises(SlideError, match=r"none\.svs cannot be opened as a slide: it is not there"):
            open_slide(f"{host}/none.svs")
        server.shutdown()


def write_dicom(path, pixels, mpp, tile=256):
    """A VL Whole Slide Microscopy image: one level, uncompressed, fully tiled."""
    height, width = pixels.shape[:2]
    rows, columns = -(-height // tile), -(-width // tile)
    padded = np.pad(pixels, ((0, rows * tile - height), (0, columns * tile - width), (0, 0)))
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = (
        generate_uid(),
        generate_uid(),
        generate_uid(),
    )
    data.Modality, data.ImageType = "SM", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.DimensionOrganizationType = "TILED_FULL"
    data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = width, height
    data.Columns, data.Rows, data.NumberOfFrames = tile, tile, rows * columns
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    measures, groups = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]  # mm
    groups.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [groups]
    tiles = padded.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    data.PixelData = tiles.tobytes()
    data.save_as(path, enforce_file_format=True)


def test_dicom_is_read_with_its_pixel_spacing(tmp_path, pixels):
    write_dicom(tmp_path / "x.dcm", pixels, 0.25)
    with open_slide(tmp_path / "x.dcm") as slide:
        assert (slide.reader, slide.vendor, slide.mpp_x0, slide.mpp_source) == ("openslide", "dicom", 0.25, "vendor")
        np.testing.assert_array_equal(whole(slide), pixels)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_picture_needs_its_mpp_said(tmp_path, pixels, ending):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(pixels).save(path, quality=95)
    with pytest.raises(SlideError, match=UNSTATED):
        open_slide(path)
    with open_slide(path, 0.25) as slide:
        assert (slide.reader, slide.mpp_source) == ("image", "given")
        assert np.abs(whole(slide).astype(int) - pixels).mean() < (1 if ending == "png" else 20)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA"])
def test_pictures_of_other_kinds_become_rgb(tmp_path, pixels, mode):
    path = tmp_path / "x.png"
    Image.fromarray(pixels[:100, :200]).convert(mode).save(path)
    with open_slide(path, 0.25) as slide:
        np.testing.assert_array_equal(whole(slide), np.asarray(Image.open(path).convert("RGB")))


def test_what_is_transparent_is_white(tmp_path):
    rgba = np.zeros((40, 50, 4), np.uint8)
    rgba[:20] = (10, 200, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "x.png")
    with open_slide(tmp_path / "x.png", 0.25) as slide:
        found = whole(slide)
    assert (found[:20] == (10, 200, 30)).all()
    assert (found[20:] == 255).all()


class Holes:
    """An OpenSlide handle of a slide that was scanned in part: nothing below y = 100, and bounds."""

    properties = MappingProxyType(
        {
            "openslide.bounds-x": "8",
            "openslide.bounds-y": "16",
            "openslide.bounds-width": "100",
            "openslide.bounds-height": "84",
        }
    )
    level_dimensions, level_downsamples = ((200, 200),), (1.0,)

    def read_region(self, corner, level, size):
        y = np.arange(size[1])[:, None] + corner[1]
        alpha = np.broadcast_to(np.where(y < 100, 255, 0), size[::-1])
        return Image.fromarray(np.dstack([np.where(alpha, 90, 0)] * 3 + [alpha]).astype(np.uint8))

    def close(self):
        pass


def test_where_openslide_has_no_data_is_white_and_bounds_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "x.mrxs"
    path.write_bytes(b"any")
    monkeypatch.setattr("wsipipe.slide.open_reader", lambda path: OpenSlideReader(Holes()))
    with open_slide(path, 0.25) as slide:
        assert slide.bounds == Box(8, 16, 108, 100)
        found = whole(slide)
    assert (found[:100] == 90).all()
    assert (found[100:] == 255).all()
    monkeypatch.setattr(Holes, "properties", {"openslide.bounds-x": "8", "openslide.bounds-y": "16"})
    with open_slide(path, 0.25) as slide:
        assert slide.bounds is None


@pytest.mark.parametrize(("width", "height"), [(1, 100_000), (100_000, 1), (1, 1), (16, 16)])
@pytest.mark.parametrize("ending", ["svs", "png"])
def test_slides_of_any_shape_are_read(tmp_path, make_svs, width, height, ending):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    path = tmp_path / f"x.{ending}"
    if ending == "svs":
        make_svs(path, pixels, levels=1)
    else:
        Image.fromarray(pixels).save(path)
    with open_slide(path, 0.25) as slide:
        np.testing.assert_array_equal(whole(slide), pixels)
        grid = slide.grid(8.0)
        assert whole(slide, 8.0).shape == (max(1, height // 32), max(1, width // 32), 3) == (*grid.box.shape, 3)


def test_a_picture_beyond_pillows_limit_is_read_without_a_warning(tmp_path, monkeypatch):
    Image.fromarray(texture(100, 100)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with open_slide(tmp_path / "x.png", 0.25) as slide:
        assert slide.width_px0 == 100
    assert Image.MAX_IMAGE_PIXELS == 50
    monkeypatch.setattr("wsipipe.readers.PICTURE_MAX_PX", 9_999)
    with pytest.raises(SlideError, match="save it as a tiled TIFF"):
        Picture(tmp_path / "x.png")


# Pixels at any resolution


@pytest.mark.parametrize("scale", [2, 4, 32])
def test_down_is_the_mean_of_the_area(tmp_path, make_svs, pixels, scale):
    path = make_svs(tmp_path / "one.svs", pixels, levels=1)
    height, width = 701 // scale, 1003 // scale
    expected = pixels[: height * scale, : width * scale].reshape(height, scale, width, scale, 3).mean((1, 3))
    with open_slide(path) as slide:
        found = slide.read(Box(0, 0, width, height), slide.grid(0.25 * scale))
    assert np.abs(found - expected).max() <= 0.501


def test_a_pixel_across_others_takes_its_share_of_each(tmp_path):
    Image.fromarray(np.array([[0, 100, 200]] * 3, np.uint8)).save(tmp_path / "x.png")
    with open_slide(tmp_path / "x.png", 1.0) as slide:
        found = whole(slide, 1.5)[0, :, 0]
    assert found.tolist() == [33, 167]  # (0 + 100 / 2) / 1.5, (100 / 2 + 200) / 1.5


def test_up_interpolates_between_centres_and_repeats_the_border(tmp_path):
    Image.fromarray(np.array([[0, 100, 200]] * 2, np.uint8)).save(tmp_path / "x.png")
    with open_slide(tmp_path / "x.png", 0.5) as slide:
        assert whole(slide, 0.25)[1, :, 0].tolist() == [0, 25, 75, 125, 175, 200]


def test_the_coarsest_level_that_is_fine_enough_is_read(pyramid, monkeypatch):
    used = []
    region = TiledTiff.region
    monkeypatch.setattr(TiledTiff, "region", lambda self, level, box: used.append(level) or region(self, level, box))
    with open_slide(pyramid) as slide:
        for mpp, level in [(0.2, 0), (0.25, 0), (0.4, 0), (0.5, 1), (0.99, 2), (0.9, 1), (1.0, 2), (8.0, 2)]:
            slide.read(Box(3, 3, 6, 6), slide.grid(mpp))
            assert used.pop() == level, mpp


def test_levels_agree_on_where_things_are(tiny):
    """The centre of mass of each drawn disc stays where it is, to a part of a pixel."""
    with open_slide(tiny.path) as slide:
        for mpp in (0.125, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0, 2.0):
            grid = slide.grid(mpp)
            dark = 235 - slide.read(grid.box, grid)[..., 0].astype(float).clip(0, 235)
            for disc in tiny.discs[:6]:
                x, y = grid.from_px0((disc.x, disc.y))
                r = 1.3 * disc.radius / grid.scale_x + 1
                box = Box(int(x - r), int(y - r), int(x + r) + 1, int(y + r) + 1)
                weight = dark[box.slices]
                rows, columns = np.mgrid[box.y0 : box.y1, box.x0 : box.x1] + 0.5
                found = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
                np.testing.assert_allclose(grid.to_px0(found), (disc.x, disc.y), atol=0.1 + 0.05 * grid.scale_x)


@pytest.fixture(scope="module", params=["tifffile", "openslide", "tiffslide", "image"])
def any_reader(request, pyramid, pixels, tmp_path_factory):
    """The same slide through each library."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "openslide":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TiledTiff, "of", lambda path, known: None)
            slide = open_slide(pyramid)
    elif request.param == "tifffile":
        slide = open_slide(pyramid)
    elif request.param == "tiffslide":
        tifffile.imwrite(folder / "x.tif", pixels, photometric="rgb", rowsperstrip=64)
        slide = open_slide(folder / "x.tif", 0.25)
    else:
        Image.fromarray(pixels).save(folder / "x.png")
        slide = open_slide(folder / "x.png", 0.25)
    assert slide.reader == request.param
    yield slide
    slide.close()


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(scale=st.sampled_from([0.5, 0.77, 1, 1.1, 2, 2.3, 4, 32]), data=st.data())
def test_a_pixel_does_not_depend_on_the_box_it_is_read_with(any_reader, scale, data):
    grid = any_reader.grid(0.25 * scale)
    x, y = data.draw(st.integers(-40, grid.width + 40)), data.draw(st.integers(-40, grid.height + 40))
    inner = Box(x, y, x + data.draw(st.integers(0, 90)), y + data.draw(st.integers(0, 90)))
    left, top, right, bottom = (data.draw(st.integers(0, 70)) for _ in range(4))
    outer = Box(inner.x0 - left, inner.y0 - top, inner.x1 + right, inner.y1 + bottom)
    found = any_reader.read(inner, grid)
    assert found.shape == (*inner.shape, 3)
    np.testing.assert_array_equal(found, any_reader.read(outer, grid)[inner.within(outer).slices])


@pytest.mark.parametrize("scale", [0.77, 1, 1.1, 4])
def test_a_large_read_is_done_in_parts_and_equals_a_small_one(pyramid, monkeypatch, scale):
    with open_slide(pyramid) as slide:
        expected = whole(slide, 0.25 * scale)
        sizes = []
        region = TiledTiff.region
        monkeypatch.setattr(
            TiledTiff, "region", lambda self, level, box: sizes.append(box.shape) or region(self, level, box)
        )
        monkeypatch.setattr("wsipipe.slide.SOURCE_PX", 100)
        np.testing.assert_array_equal(whole(slide, 0.25 * scale), expected)
    assert len(sizes) > 1
    assert np.max(sizes) <= 104


def test_beyond_the_slide_is_white(tiny):
    with open_slide(tiny.path) as slide:
        for mpp in (0.25, 0.2, 0.5):
            grid = slide.grid(mpp)
            assert (slide.read(Box(-50, -50, 0, 10), grid) == 255).all()
            assert (slide.read(Box(grid.width, 0, grid.width + 9, 9), grid) == 255).all()
        assert slide.read(Box(5, 5, 5, 9), grid).shape == (4, 0, 3)


def test_many_threads_read_the_same(any_reader):
    grid = any_reader.grid(0.3)
    boxes = [Box(x, y, x + 150, y + 150) for y in range(-50, 600, 120) for x in range(-50, 850, 120)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda box: any_reader.read(box, grid), boxes))
    for box, pixels in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(pixels, any_reader.read(box, grid))


# Trouble


@pytest.fixture
def silent(caplog, capfd):
    """Nothing is said but the error itself: no warning, no log record, nothing on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    out, err = capfd.readouterr()
    assert out + err == ""


def read_all_levels(path):
    with open_slide(path, 0.25) as slide:
        for mpp in (0.25, 0.5, 1.0):
            whole(slide, mpp)


def refused(path, fault):
    with pytest.raises(SlideError, match=fault) as caught:
        read_all_levels(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("ending", ["svs", "ndpi", "mrxs", "ome.tif", "dcm", "png", "scn"])
@pytest.mark.parametrize(
    "content", [b"a text, no slide\n" * 50, b"II*\0" + b"\xff" * 60, b"II*\0", b"\x89PNG\r\n\x1a\n1234", b"\0" * 999]
)
def test_a_file_that_is_no_slide_is_refused(tmp_path, ending, content):
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    refused(path, "cannot be|is neither a slide nor a picture")


@pytest.mark.usefixtures("silent")
def test_a_missing_file_a_folder_and_an_empty_file_are_refused(tmp_path):
    refused(tmp_path / "none.svs", "no such file or directory")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.svs").touch()
    refused(tmp_path / "empty.svs", "is empty")


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7])
@pytest.mark.parametrize("kind", ["svs", "jpeg.svs", "tif", "ome.tif", "png", "jpg", "dcm"])
def test_a_truncated_file_is_refused(tmp_path, make_svs, pixels, kind, kept):
    path = tmp_path / f"x.{kind}"
    if kind.endswith("svs"):
        make_svs(path, pixels, compression="jpeg" if kind == "jpeg.svs" else "zlib")
    elif kind == "dcm":
        write_dicom(path, pixels, 0.25)
    elif "tif" in kind:
        tifffile.imwrite(path, pixels, photometric="rgb")
    else:
        Image.fromarray(pixels).save(path)
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[: int(len(whole_file) * kept)])
    refused(path, "cannot be")


def test_a_file_that_lost_only_coarse_levels_keeps_its_pixels(tmp_path, pyramid, pixels):
    path = tmp_path / "x.svs"
    path.write_bytes(pyramid.read_bytes()[: int(pyramid.stat().st_size * 0.9)])
    with open_slide(path) as slide:
        assert len(slide.levels) < 3
        np.testing.assert_array_equal(whole(slide), pixels)


def test_a_damaged_tile_is_refused_where_it_lies_and_the_rest_is_read(tmp_path, make_svs, pixels):
    path = make_svs(tmp_path / "x.svs", pixels, levels=1)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[1]
    content = bytearray(path.read_bytes())
    content[offset : offset + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    with open_slide(path) as slide:
        grid = slide.grid(0.25)
        np.testing.assert_array_equal(slide.read(Box(0, 0, 200, 200), grid), pixels[:200, :200])
        with pytest.raises(SlideError, match="cannot be read at level 0, x 300 to 310, y 5 to 15, it is damaged"):
            slide.read(Box(300, 5, 310, 15), grid)


@pytest.mark.usefixtures("silent")
def test_what_is_not_8_bit_rgb_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "deep.tif", texture(50, 50).astype(np.uint16), photometric="rgb")
    refused(tmp_path / "deep.tif", "8-bit RGB")
    tifffile.imwrite(tmp_path / "channels.ome.tif", np.zeros((5, 50, 50), np.uint8), metadata={"axes": "CYX"})
    refused(tmp_path / "channels.ome.tif", "8-bit RGB")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    refused(tmp_path / "deep.png", "8 bits a channel")


# Real slides


@pytest.mark.parametrize(
    ("name", "mpp", "size", "reader"),
    [
        ("CMU-1-Small-Region.svs", 0.499, (2220, 2967), "tifffile"),
        ("TCGA-CR-7395-01A-01-TS1.small.svs", None, (4443, 3567), "tifffile"),
        ("test3-DAPI-2-387.ndpi", 0.2282, (3968, 4864), "openslide"),
        ("test3-TRITC-2-560.ndpi", 0.2282, (3968, 4864), "openslide"),
        ("instanseg_HE_example.ome.tif", 0.5001, (1380, 1484), "tiffslide"),
        ("histolab_kidney-48-5.tif", None, (1493, 901), "tiffslide"),
        ("ucsb_ytma10_010704_benign1_ccd.tif", None, (896, 768), "tiffslide"),
        ("openslide-python_boxes.tiff", None, (300, 250), "tifffile"),
        ("openslide-python_boxes_0.dcm", 0.499, (16, 16), "openslide"),
        ("openslide-python_small.svs", 0.499, (16, 16), "tifffile"),
        ("skimage_ihc.png", None, (512, 512), "image"),
        ("stardist_histo.jpg", None, None, "image"),
    ],
)
def test_real_slides_state_their_resolution_or_are_refused(shared_data, name, mpp, size, reader):
    path = shared_data(f"slides/{name}")
    if mpp is None:
        with pytest.raises(SlideError, match=UNSTATED):
            open_slide(path)
    with open_slide(path, 0.5 if mpp is None else None) as slide:
        assert slide.mpp_x0 == pytest.approx(mpp or 0.5, abs=1e-4)
        assert (slide.width_px0, slide.height_px0) == (size or (slide.width_px0, slide.height_px0))
        assert slide.reader == reader
        grid = slide.grid(0.5)
        middle = slide.read(Box(0, 0, 300, 300), grid)
        assert middle.shape == (300, 300, 3)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("broken.svs", "neither a slide nor a picture"),
        ("openslide-python_unreadable.svs", "cannot be read at level 0, x 0 to 16, y 0 to 16"),
        ("pathml_small_dicom.dcm", "cannot be opened.*image flavor"),
        ("small_vectra.qptiff", "8-bit RGB"),
        ("README.md", "neither a slide nor a picture"),
    ],
)
def test_real_broken_and_foreign_files_are_refused(shared_data, name, fault):
    refused(shared_data(f"slides/{name}"), fault)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.small.svs"])
def test_real_svs_tiles_decode_to_openslides_pixels(shared_data, name):
    path = shared_data(f"slides/{name}")
    with open_slide(path, 0.5) as slide, openslide.OpenSlide(path) as reference:
        grid = slide.grid(0.5)
        for box in (
            Box(900, 1200, 1800, 1900),
            Box(slide.width_px0 - 300, slide.height_px0 - 300, slide.width_px0, slide.height_px0),
        ):
            expected = np.asarray(reference.read_region((box.x0, box.y0), 0, (box.width, box.height)))[..., :3]
            np.testing.assert_array_equal(slide.read(box, grid), expected)
