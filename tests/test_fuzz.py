"""A short run of the fuzz harness, and the inputs that it found faults with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from wsipipe.config import TissueConfig, load_config
from wsipipe.errors import ConfigError, DataError, ModelError, SlideError, StoreError
from wsipipe.model.spec import ModelSpec
from wsipipe.model.weights import load_model
from wsipipe.slide import Slide, open_slide
from wsipipe.stages.tissue import make_tissue, read_tissue
from wsipipe.training.config import load_experiment

HARNESS = Path(__file__).with_name("fuzz.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="inputs are read in forked processes")
def test_every_reader_refuses_damaged_files_or_answers_rightly(tmp_path):
    command = [sys.executable, str(HARNESS), "--inputs", "400", "--first", "1000000", "--findings", str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["inputs"] >= 375  # where there are no real slides, these are left out
    assert summary["refused"] > summary["answered"] > 20


@pytest.mark.parametrize(
    "text",
    [
        "t: 2001-99-99",  # a date that is none: ValueError
        "{" * 900,  # RecursionError
        "? [a, b]\n: 1",
        "<<: [1]",
        "tissue: !!python/object/apply:os.system ['touch hacked']",
        "\x00",
        "tissue:\n\tmpp: 1",
        "a: &a [x,x]\nb: &b [*a,*a]\ntissue: {mpp: *b}",
        "- " * 200_000,  # larger than any settings
    ],
)
@pytest.mark.parametrize("load", [load_config, load_experiment])
def test_yaml_that_is_none_is_refused_in_one_line(text, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load(path)
    assert len(str(refusal.value).splitlines()) == 1
    assert not (tmp_path / "hacked").exists()


def test_a_tiff_whose_header_says_that_it_is_67_m_wide_is_refused_at_once(make_svs, tmp_path):
    import tifffile

    path = make_svs(tmp_path / "wide.svs", np.full((64, 96, 3), 200, np.uint8), levels=1, tile=(32, 32))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(268_435_552)
    with pytest.raises(SlideError):
        open_slide(path)


def test_a_tissue_mask_with_a_chunk_of_no_name_is_refused(tiny, tmp_path):
    path = tmp_path / "tissue.png"
    with open_slide(tiny.path) as slide:
        make_tissue(slide, path, TissueConfig())
        path.write_bytes(path.read_bytes().replace(b"IDAT", b"\xff\xfe\x01\x02"))
        with pytest.raises(StoreError, match="is no tissue mask"):
            read_tissue(path, slide)


def test_a_level_larger_than_the_first_is_refused(tiny, monkeypatch):
    class Reader:
        name, vendor, properties, sizes = "drawn", "", {}, [(96, 64), (9600, 64)]

    with pytest.raises(SlideError, match="is damaged: of its levels"):
        Slide(str(tiny.path), Reader(), 0.25)


def test_a_slide_wider_than_any_glass_is_refused_with_the_remedy(make_svs, tmp_path):
    path = make_svs(tmp_path / "long.svs", np.full((1, 200_000, 3), 200, np.uint8), levels=1)
    open_slide(path, 4.9).close()
    with pytest.raises(SlideError, match=r"would be 102 x 0 cm large; it is damaged, .* pass --mpp"):
        open_slide(path, 5.1)


@pytest.mark.parametrize(
    "change",
    [
        {"mpp": "0.25"}, {"mpp": float("nan")}, {"mpp": None}, {"tile_px": 10**9}, {"tile_px": 512.0}, {"halo_px": 512},
        {"std": [0, 1, 1]}, {"mean": ["a", 0, 0]}, {"class_names": [1, 2, 3, 4, 5]}, {"class_names": ["a"] * 5},
        {"class_colours": [[0, 0, 0]]}, {"class_colours": [[300, 0, 0]] * 5}, {"name": "a\nb"}, {"settings": []},
        {"architecture": ["cellvta"]}, {"notes": 1},
    ],
)  # fmt: skip
def test_a_description_with_values_that_no_network_has_is_refused(change):
    from wsipipe.model.registry import SPECS

    values = json.loads(SPECS["cellvta-nano"].to_json())
    ModelSpec.from_json(json.dumps(values))
    with pytest.raises(ModelError):
        ModelSpec.from_json(json.dumps(values | change))


@pytest.mark.parametrize(
    "change", [{"dim": 10**9}, {"depth": 10**6}, {"dim": 8192}, {"heads": 0}, {"dim": -1}, {"cell_px": 64}]
)
def test_a_header_that_lies_about_its_network_takes_no_memory(change, tmp_path):
    from dataclasses import replace

    from fuzz_weights import TINY_SETTINGS

    from wsipipe.model.registry import SPECS, build
    from wsipipe.model.weights import save_checkpoint

    spec = replace(SPECS["cellvta-nano"], name="tiny", settings=TINY_SETTINGS)
    save_checkpoint(tmp_path / "x.safetensors", build(spec), replace(spec, settings={**TINY_SETTINGS, **change}))
    with pytest.raises(ModelError):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", ["pickle", "pth"])
def test_a_pickle_that_would_run_something_is_refused_and_not_run(content, tmp_path, monkeypatch):
    import pickle

    import torch
    from fuzz_harm import Payload

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    if content == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    else:
        torch.save({"model": Payload()}, path)
    with pytest.raises(ModelError):
        load_model(path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "header", [b"{'descr': '|u1', 'shape': (", b"{'descr': '|u1', 'fortran_order': False, 'shape': (0, -1, 1, 3), }"]
)
def test_an_array_whose_header_is_no_header_is_refused(header, tmp_path):
    from made_patches import write_set

    from wsipipe.training.data import PatchSet

    folder = write_set(tmp_path / "set", count=1, side=24)
    text = header + b" " * (117 - len(header)) + b"\n"
    (folder / "images.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(100))
    with pytest.raises(DataError):
        PatchSet.open(folder)


def test_an_array_that_needs_pickle_is_refused_and_not_built(tmp_path, monkeypatch):
    from fuzz_harm import Payload
    from made_patches import write_set

    from wsipipe.training.data import PatchSet

    monkeypatch.chdir(tmp_path)
    folder = write_set(tmp_path / "set", count=1, side=24)
    np.save(folder / "images.npy", np.array([Payload()], object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as an array"):
        PatchSet.open(folder)
    assert not (tmp_path / "hacked").exists()


def test_a_sheet_with_a_quotation_mark_left_open_is_refused(tmp_path):
    from wsipipe.cohort import read_sheet

    path = tmp_path / "slides.tsv"
    path.write_text('slide\tpath\na\t"' + "x" * 200_000)
    with pytest.raises(ConfigError, match="line 2: it cannot be parted into cells, is a quotation mark left open"):
        read_sheet(path)


@pytest.mark.parametrize("cell", ["x" * 5000, "a\0b", "a\x1eb", "a\u2028b"])
@pytest.mark.parametrize("column", ["path", "roi", "model"])
def test_every_fault_of_a_sheet_is_one_line_whatever_a_cell_holds(cell, column, tmp_path):
    from wsipipe.cohort import read_sheet

    path = tmp_path / "slides.tsv"
    names, cells = (
        (["slide", "path"], ["a", cell]) if column == "path" else (["slide", "path", column], ["a", "b", cell])
    )
    path.write_text("\n".join("\t".join(row) for row in (names, cells)), encoding="utf-8")
    with pytest.raises(ConfigError, match="does not exist") as refusal:
        read_sheet(path)
    _, *faults = str(refusal.value).splitlines()
    assert all(fault.startswith("  line 2: ") for fault in faults)


def with_names(value):
    return f'{{"type": "FeatureCollection", "wsipipe": {value}, "features": []}}'.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.geojson", b'{"features": [\xff]}'),
        ("b.geojson", with_names("0.5")),
        ("c.geojson", with_names('{"mpp_x0": 0.25}')),
        ("d.geojson", with_names('{"offset_px0": {"a": "b"}, "mpp_x0": [], "mpp_y0": 0.5}')),
        ("e.geojson", b"[[1, 2]"),
        ("f.geojson", b'{"features": ' + b"[" * 100_000),
        ("g.npy", b"\x93NUMPY\x01\x00\x16\x00{'descr': '<u2', ((((\n"),
        ("h.parquet", b"PAR1" + bytes(40) + b"\x10\x00\x00\x00PAR1"),
    ],
)
def test_what_is_compared_may_be_damaged_in_any_way(name, content, tmp_path):
    from wsipipe.stages.compare import read_nuclei_file

    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((DataError, StoreError)) as refusal:
        read_nuclei_file(path)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_geojson_bomb_is_refused_before_it_fills_the_memory(tmp_path):
    import gzip

    from wsipipe.stages.compare import read_nuclei_file

    path = tmp_path / "bomb.geojson.gz"
    path.write_bytes(gzip.compress(b" " * (40 << 20), 1))
    with pytest.raises(DataError, match="no FeatureCollection"):
        read_nuclei_file(path)


@pytest.mark.parametrize("kind", ["wide", "flat"])
def test_an_encoder_whose_tensors_cannot_be_is_refused(kind, tmp_path):
    import torch

    from wsipipe.model.encoder import make_encoder
    from wsipipe.model.weights import load_encoder

    encoder = make_encoder(dim=16, depth=1, heads=2)
    state = dict(encoder.state_dict())
    state["pos_embed"] = torch.zeros(1).expand(1, 1 << 33) if kind == "wide" else torch.zeros(1, 7, 16)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=r"pos_embed (of shape .* fewer values|has shape)"):
        load_encoder(encoder, tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.magnification", 1e300),
        ("transformations.normalize.std", [0.0, 0.0, 0.0]),
        ("dataset_config.nuclei_types.Other", None),
        ("dataset_config.nuclei_types.Other", [1]),
    ],
)
def test_settings_in_a_foreign_checkpoint_may_be_of_any_kind(key, value):
    from test_upstream import as_published, small_network

    from wsipipe.model.upstream import recognise

    content = as_published(small_network())
    content["config"] = {**content["config"], key: value}
    if "nuclei_types" in key:  # left out, as if it told nothing
        assert recognise(content, "x")[0].class_names[0] == "background"
    else:
        with pytest.raises(ModelError, match="is not whole"):
            recognise(content, "x")


def test_a_foreign_checkpoint_without_one_of_its_tensors_is_refused():
    from test_upstream import as_published, small_network

    from wsipipe.model.upstream import recognise

    content = as_published(small_network())
    del content["model_state_dict"]["encoder.interactions.0.extractor.ffn.fc1.weight"]
    with pytest.raises(ModelError, match="is not whole"):
        recognise(content, "x")


def test_a_tissue_mask_with_other_pixels_than_were_written_is_refused(tiny, tmp_path):
    path = tmp_path / "tissue.png"
    with open_slide(tiny.path) as slide:
        make_tissue(slide, path, TissueConfig())
        with Image.open(path) as image:
            text, mask = image.text["wsipipe"], np.array(image)
        mask[0, 0] ^= True
        about = PngImagePlugin.PngInfo()
        about.add_text("wsipipe", text)
        Image.fromarray(mask).save(path, pnginfo=about)
        with pytest.raises(StoreError, match="its pixels are not those that were written"):
            read_tissue(path, slide)
