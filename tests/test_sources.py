"""Data sets as others lay them out: read exactly, and refused with file and number where they are not whole."""

import csv
import json
import pickle
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

from wsipipe.cli import app
from wsipipe.errors import DataError, SlideError
from wsipipe.slide import open_slide
from wsipipe.training.check import check, draw_sheet
from wsipipe.training.miniature import make_conic, make_pannuke
from wsipipe.training.sources import qupath
from wsipipe.training.sources.cellvit import prepare_cellvit, read_label
from wsipipe.training.sources.conic import TYPES, prepare_conic
from wsipipe.training.sources.image_masks import prepare_image_masks
from wsipipe.training.sources.own_images import Splits, class_names_of
from wsipipe.training.sources.pannuke import joined, prepare_pannuke
from wsipipe.training.sources.qupath import prepare_qupath
from wsipipe.training.write import Description, count, differences, digest_of, windows

ABOUT = Description("own", 0.25, None, "drawn", "CC0-1.0")
HALF = Splits(validation=0.5)


@pytest.fixture
def pannuke(tmp_path) -> Path:
    make_pannuke(tmp_path / "src", images=3, side=64)
    return tmp_path / "src"


@pytest.fixture
def conic(tmp_path) -> Path:
    make_conic(tmp_path / "src", patients=5, of_each=2, side=256)
    return tmp_path / "src"


# --- PanNuke ----------------------------------------------------------------------------------------------------------


def test_pannuke_keeps_every_pixel_fold_and_tissue(pannuke, tmp_path):
    patches = prepare_pannuke(pannuke, tmp_path / "dst")
    assert [patch.fold for patch in patches.index] == ["1"] * 3 + ["2"] * 3 + ["3"] * 3
    assert patches.tissues == ("Adrenal_gland", "Bile-duct", "Bladder")
    images = np.load(pannuke / "Fold 2/images/fold2/images.npy")
    np.testing.assert_array_equal(patches.images[4], images[1].astype(np.uint8))
    masks = np.load(pannuke / "Fold 2/masks/fold2/masks.npy")[1]
    np.testing.assert_array_equal(patches.instances[4] > 0, masks[..., 5] == 0)
    assert patches.types is not None
    for channel in range(5):
        np.testing.assert_array_equal(patches.types[4] == channel + 1, masks[..., channel] > 0)


def test_folds_take_the_place_of_splits(pannuke, tmp_path):
    patches = prepare_pannuke(pannuke, tmp_path / "dst")
    turned = patches.with_folds({"train": ["3"], "test": ["1"]})
    assert turned.of("train").tolist() == [6, 7, 8]
    assert turned.of("validation").tolist() == []
    assert turned.of("test").tolist() == [0, 1, 2]
    assert turned.fingerprint != patches.fingerprint
    assert pickle.loads(pickle.dumps(turned)).index == turned.index  # as a worker process gets it
    with pytest.raises(DataError, match="no fold '4'; it has 1, 2, 3"):
        patches.with_folds({"train": ["4"]})
    with pytest.raises(DataError, match=r"fold '1' of .* cannot be for train and for test"):
        patches.with_folds({"train": ["1"], "test": ["1"]})


def test_channels_that_overlap_are_joined_as_cellvit_does_it():
    masks = np.zeros((4, 4, 6), np.float64)
    masks[0, :3, 0] = 40
    masks[2, :, 0] = 7
    masks[0, 2:, 1] = 40  # the same number in another channel is another nucleus, and lies on top
    instances, types = joined(masks, "here")
    assert instances.tolist() == [[2, 2, 3, 3], [0] * 4, [1] * 4, [0] * 4]
    assert types.tolist() == [[1, 1, 2, 2], [0] * 4, [1] * 4, [0] * 4]


def spoilt(path: Path, change) -> None:
    np.save(path, change(np.load(path)), allow_pickle=True)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("Fold 2/masks/fold2/masks.npy", None, r"Fold 2/masks/fold2/masks\.npy is missing"),
        ("Fold 1/masks/fold1/masks.npy", lambda a: a[..., :5], r"fold1/masks\.npy has 5 channels; .* background"),
        ("Fold 1/masks/fold1/masks.npy", lambda a: a[:2], r"fold1/masks\.npy has the shape \(2, 64, 64, 6\)"),
        ("Fold 1/masks/fold1/masks.npy", lambda a: a + 0.5, r"fold1/masks\.npy, image 0: channel 0"),
        ("Fold 3/images/fold3/images.npy", lambda a: a + 100, r"fold3/images\.npy, image 0: .*0 and 255"),
        ("Fold 3/images/fold3/images.npy", lambda a: a[..., 0], r"fold3/images\.npy has the shape \(3, 64, 64\)"),
        ("Fold 1/images/fold1/types.npy", lambda a: a[:1], r"fold1/types\.npy holds \(1,\)"),
        ("Fold 1/images/fold1/types.npy", lambda a: a.astype(object), r"fold1/types\.npy .*could run code"),
    ],
)
def test_faults_of_pannuke_are_refused_by_file_and_image(pannuke, tmp_path, file, change, message):
    if change is None:
        (pannuke / file).unlink()
    else:
        spoilt(pannuke / file, change)
    with pytest.raises(DataError, match=message):
        prepare_pannuke(pannuke, tmp_path / "dst")
    assert not list(tmp_path.glob("dst*")), "nothing half-written is left"


def test_every_missing_file_is_named_at_once(tmp_path):
    with pytest.raises(DataError, match=r"(?s)Fold 1/images.*Fold 1/masks.*Fold 3/masks"):
        prepare_pannuke(tmp_path, tmp_path / "dst")


def test_what_differs_from_the_published_counts_is_said(pannuke, tmp_path, caplog):
    patches = prepare_pannuke(pannuke, tmp_path / "dst")
    assert "images: 9 here, 7,901 published" in caplog.text
    report, _ = check(tmp_path / "dst")
    assert "fold 2: 3 here, 2,523 published" in report.doubts
    assert differences(count(patches), {"images": 9, "fold": {"1": 3}}) == []


# --- CoNIC ------------------------------------------------------------------------------------------------------------


def test_conic_is_split_by_patient_and_enlarged_in_four_windows(conic, tmp_path):
    native, enlarged = prepare_conic(conic, tmp_path / "dst")
    assert len(native) == 10
    assert (native.mpp, native.class_names) == (0.5, ("background", *TYPES))
    labels = np.load(conic / "labels.npy")
    np.testing.assert_array_equal(native.instances[3], labels[3, ..., 0])
    np.testing.assert_array_equal(native.types[3], labels[3, ..., 1])
    splits = {}
    for patch in native.index:
        splits.setdefault(patch.group, set()).add(patch.split)
    assert len(splits) == 5
    assert sorted(map(sorted, splits.values())) == [["test"], ["train"], ["train"], ["train"], ["validation"]]

    trained = [i for i, patch in enumerate(native.index) if patch.split != "test"]
    assert len(enlarged) == 4 * len(trained)
    assert enlarged.mpp == pytest.approx(0.5 * 256 / 480)
    names = [patch.name.split("_", 1)[1] for patch in enlarged.index[:4]]
    assert names == ["0_0", "0_224", "224_0", "224_224"]
    reference = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(native.images[trained[0]])).permute(2, 0, 1)[None].float(), (480, 480),
        mode="bilinear", align_corners=False,
    )[0].permute(1, 2, 0).numpy()  # fmt: skip
    for number, (y, x) in enumerate([(0, 0), (0, 224), (224, 0), (224, 224)]):
        shown = enlarged.images[number].astype(float)
        assert np.abs(shown - reference[y : y + 256, x : x + 256]).max() <= 1
    whole = enlarged.instances[0][:, 224:] > 0  # where the first two windows overlap
    np.testing.assert_array_equal(whole, enlarged.instances[1][:, :32] > 0)


def test_the_published_split_lets_windows_of_one_image_validate_and_train(conic, tmp_path):
    _, enlarged = prepare_conic(conic, tmp_path / "dst", "published")
    splits: dict[str, set[str]] = {}
    for patch in enlarged.index:
        splits.setdefault(patch.name.split("_")[0], set()).add(patch.split)
    assert {"train", "validation"} in splits.values()
    assert sum(patch.split == "validation" for patch in enlarged.index) == int(0.2 * len(enlarged))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda src: (src / "labels.npy").unlink(), r"labels\.npy is missing"),
        (lambda src: (src / "patient_info.csv").unlink(), r"patient_info\.csv is missing"),
        (lambda src: (src / "counts.csv").write_text("a\n1\n"), r"counts\.csv has no column neutrophil"),
        (lambda src: spoilt(src / "labels.npy", lambda a: a[:4]), r"labels\.npy has the shape \(4, 256, 256, 2\)"),
        (lambda src: spoilt(src / "labels.npy", lambda a: a * 9), r"labels\.npy, image 0: .*found type 54"),
        (lambda src: (src / "patient_info.csv").write_text("patient\nx\n"), r"patients of 1 images, but has 10"),
    ],
)
def test_faults_of_conic_are_refused_by_file(conic, tmp_path, spoil, message):
    spoil(conic)
    with pytest.raises(DataError, match=message):
        prepare_conic(conic, tmp_path / "dst")


# --- CellViT ----------------------------------------------------------------------------------------------------------


def write_cellvit(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    (folder / "dataset_config.yaml").write_text(
        "tissue_types: {Colon: 0, Skin: 1}\nnuclei_types: {Background: 0, Round: 1, Long: 2}\n"
    )
    for fold in range(3):
        for name in ("images", "labels"):
            (folder / f"fold{fold}" / name).mkdir(parents=True)
        rows = [("img", "type")]
        for i in (2, 10):
            image = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f"fold{fold}/images/{fold}_{i}.png"), image)
            inst = np.zeros((32, 32), np.int32)
            inst[4:9, 4:9], inst[20:25, 6:9] = 3, 8
            types = np.where(inst == 3, 1, np.where(inst == 8, 2, 0))
            np.save(
                folder / f"fold{fold}/labels/{fold}_{i}.npy", {"inst_map": inst, "type_map": types}, allow_pickle=True
            )
            rows.append((f"{fold}_{i}.png", "Skin"))
        with (folder / f"fold{fold}/types.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


def test_a_folder_of_cellvit_is_read_without_unpickling(tmp_path):
    src = write_cellvit(tmp_path / "src")
    patches = prepare_cellvit(src, tmp_path / "dst", 0.25)
    assert patches.class_names == ("background", "round", "long")
    assert [(p.name, p.fold, p.split, p.tissue) for p in patches.index[:3]] == [
        ("0_2", "0", "train", "Skin"), ("0_10", "0", "train", "Skin"), ("1_2", "1", "validation", "Skin"),
    ]  # fmt: skip
    assert np.unique(patches.instances[0]).tolist() == [0, 1, 2]
    assert patches.types[0][5, 5] == 1
    assert patches.types[0][22, 7] == 2
    np.testing.assert_array_equal(patches.images[0], cv2.imread(str(src / "fold0/images/0_2.png"))[..., ::-1])


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_label_that_would_run_code_is_refused_and_runs_none(tmp_path):
    trace = tmp_path / "executed"
    np.save(tmp_path / "label.npy", np.array({"inst_map": _Evil(trace), "type_map": 0}, dtype=object))
    with pytest.raises(DataError, match=r"label\.npy was not opened: it asks for pathlib"):
        read_label(tmp_path / "label.npy")
    assert not trace.exists()
    assert np.load(tmp_path / "label.npy", allow_pickle=True) is not None
    assert trace.exists(), "the file is dangerous indeed"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.zeros((4, 4)), r"holds \(4, 4\) float64"),
        ({"inst_map": np.zeros((4, 4), int)}, "KeyError"),
        ({"inst_map": np.full((4, 4), 0.5), "type_map": np.zeros((4, 4))}, "not whole"),
        ({"inst_map": np.zeros(4), "type_map": np.zeros((4, 4))}, r"inst_map is not an array"),
    ],
)
def test_a_label_of_another_kind_is_refused(tmp_path, label, message):
    np.save(tmp_path / "x.npy", label, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_label(tmp_path / "x.npy")


def test_faults_of_a_cellvit_folder_come_all_at_once(tmp_path):
    src = write_cellvit(tmp_path / "src")
    (src / "fold1/images/1_2.png").rename(src / "fold1/images/0_2.png")
    (src / "fold1/labels/1_2.npy").rename(src / "fold1/labels/0_2.npy")
    (src / "fold2/types.csv").write_text("img,type\n2_2.png,Skin\n2_2.png,Colon\n")
    with pytest.raises(DataError, match=r"(?s)another fold.*names 2_2\.png twice.*tissue of 2_10\.png"):
        prepare_cellvit(src, tmp_path / "dst", 0.25)
    write_cellvit(tmp_path / "typed")
    label = {"inst_map": np.ones((32, 32), int), "type_map": np.full((32, 32), 3)}
    np.save(tmp_path / "typed/fold0/labels/0_2.npy", label, allow_pickle=True)
    with pytest.raises(DataError, match=r"0_2\.npy: the type 3"):
        prepare_cellvit(tmp_path / "typed", tmp_path / "dst", 0.25)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inst_map", -1, r"0_2\.npy: inst_map holds -1; nuclei are numbered from 1"),
        ("type_map", -2, r"0_2\.npy: the type -2 is none of the 3 nuclei_types"),
        ("type_map", 3, r"0_2\.npy: the type 3 is none of the 3 nuclei_types"),
    ],
)
def test_numbers_that_a_label_cannot_hold_are_named(tmp_path, name, value, message):
    src = write_cellvit(tmp_path / "src")
    label = np.load(src / "fold0/labels/0_2.npy", allow_pickle=True).item()
    label[name][5, 5] = value
    np.save(src / "fold0/labels/0_2.npy", label, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        prepare_cellvit(src, tmp_path / "dst", 0.25)


# --- one's own --------------------------------------------------------------------------------------------------------


def write_masks(folder: Path) -> Path:
    for name in ("images", "masks", "types"):
        (folder / name).mkdir(parents=True)
    for i, side in enumerate((64, 90)):
        mask = np.zeros((side, side), np.uint16)
        mask[5:15, 5:15], mask[40:55, 30:60] = 4, 900
        cv2.imwrite(str(folder / f"images/p{i}_a.png"), np.full((side, side, 3), 200, np.uint8))
        cv2.imwrite(str(folder / f"masks/p{i}_a.png"), mask)
        (folder / f"types/p{i}_a.csv").write_text("id,type\n4,tumour\n")
    return folder


def test_masks_of_several_sizes_become_patches_of_one(tmp_path):
    patches = prepare_image_masks(write_masks(tmp_path / "src"), tmp_path / "dst", ABOUT, 64, HALF)
    assert [patch.name for patch in patches.index] == ["p0_a_0_0", "p1_a_0_0", "p1_a_0_26", "p1_a_26_0", "p1_a_26_26"]
    assert patches.class_names == ("background", "tumour")
    assert {patch.group: patch.split for patch in patches.index}.keys() == {"p0", "p1"}
    assert {patch.split for patch in patches.index} == {"train", "validation"}
    assert np.unique(patches.instances[0]).tolist() == [0, 1, 2]
    assert patches.types[0][10, 10] == 1
    assert patches.types[0][45, 45] == 255  # the table leaves it out
    assert check(tmp_path / "dst")[0].faults == ()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda src: (src / "masks/p1_a.png").unlink(), r"masks/p1_a\.png is missing"),
        (lambda src: (src / "types/p0_a.csv").unlink(), r"types/p0_a\.csv must be a table"),
        (lambda src: (src / "types/p0_a.csv").write_text("id,type\n4,a\n4,b\n"), r"p0_a\.csv: the ids \[4\] repeat"),
        (lambda src: (src / "types/p0_a.csv").write_text("id,type\n7,a\n"), r"mask has not: \[7\]"),
        (
            lambda src: (src / "types/p0_a.csv").write_text("id,type\n4,a\n900, Background\n"),
            r"types/p0_a\.csv: the ids \[900\] have the type background",
        ),
        (lambda src: (src / "types/p0_a.csv").write_text("id,type\n4,\n4,b\n"), r"p0_a\.csv: the ids \[4\] repeat"),
        (lambda src: cv2.imwrite(str(src / "masks/p0_a.png"), np.zeros((9, 9), np.uint8)), r"p0_a\.png is 9 x 9 px"),
        (lambda src: cv2.imwrite(str(src / "masks/p0_a.png"), np.zeros((64, 64, 3), np.uint8)), "one channel"),
        (lambda src: (src / "images/p0_a.png").write_text("text"), r"images/p0_a\.png cannot be read"),
    ],
)
def test_faults_of_masks_are_refused_by_file(tmp_path, spoil, message):
    src = write_masks(tmp_path / "src")
    spoil(src)
    with pytest.raises(DataError, match=message):
        prepare_image_masks(src, tmp_path / "dst", ABOUT, 64, HALF)


@pytest.mark.parametrize("empty", ["900,", "900,  ", "900", "900,\t"])
def test_a_nucleus_with_an_empty_type_is_of_unknown_type(tmp_path, empty):
    src = write_masks(tmp_path / "src")
    (src / "types/p0_a.csv").write_text(f"id,type\n4, tumour \n{empty}\n")
    patches = prepare_image_masks(src, tmp_path / "dst", ABOUT, 64, HALF)
    assert patches.class_names == ("background", "tumour")
    assert (patches.types[0][10, 10], patches.types[0][45, 45]) == (1, 255)


def test_tables_without_a_type_make_a_set_without_types(tmp_path):
    src = write_masks(tmp_path / "src")
    for path in (src / "types").iterdir():
        path.write_text("id,type\n4,\n")
    patches = prepare_image_masks(src, tmp_path / "dst", ABOUT, 64, HALF)
    assert (patches.class_names, patches.types) == (None, None)
    typed = prepare_image_masks(src, tmp_path / "typed", ABOUT, 64, HALF, ["tumour"])
    assert typed.class_names == ("background", "tumour")
    assert set(np.unique(typed.types)) == {0, 255}


def test_types_outside_the_list_and_small_images_are_refused(tmp_path):
    src = write_masks(tmp_path / "src")
    with pytest.raises(DataError, match=r"types \['tumour'\], which are not among \['other'\]"):
        prepare_image_masks(src, tmp_path / "dst", ABOUT, 64, HALF, ["other"])
    with pytest.raises(DataError, match=r"p0_a\.png is smaller than a patch of 80 px"):
        prepare_image_masks(src, tmp_path / "dst", ABOUT, 80, HALF)


def feature(corners, name: str | None) -> dict:
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    ring = [*corners, corners[0]]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def write_qupath(folder: Path, mpp_objects: list[dict], stem: str = "a") -> Path:
    folder.mkdir(exist_ok=True)
    image = np.full((100, 140, 3), 200, np.uint8)
    image[20:30, 10:20] = (90, 50, 140)
    cv2.imwrite(str(folder / f"{stem}.png"), image[..., ::-1])
    (folder / f"{stem}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": mpp_objects}))
    return folder


NUCLEI = [
    feature(square(10, 20, 10), "Tumour"),
    feature(square(60, 60, 12), "Stroma"),
    feature(square(100, 80, 8), None),
]


def test_qupath_annotations_cover_the_pixels_they_outline(tmp_path):
    for stem in ("a", "b"):
        write_qupath(tmp_path / "src", NUCLEI, stem)
    patches = prepare_qupath(tmp_path / "src", tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25)
    assert patches.class_names == ("background", "Stroma", "Tumour")
    first = patches.instances[0]
    np.testing.assert_array_equal(np.argwhere(first == 1)[[0, -1]], [[20, 10], [29, 19]])
    assert (first == 1).sum() == 100
    assert (patches.images[0][first == 1] == (90, 50, 140)).all()
    assert patches.types[0][25, 15] == 2
    last = patches.types[[patch.name for patch in patches.index].index("a_36_76")]
    assert last[80 - 36 + 2, 100 - 76 + 2] == 255  # without a class
    assert check(tmp_path / "dst")[0].faults == ()


def test_qupath_regions_are_read_at_the_resolution_asked_for(tmp_path):
    objects = [*NUCLEI, feature(square(0, 10, 64), "Region*")]
    for stem in ("a", "b"):
        write_qupath(tmp_path / "src", objects, stem)
    patches = prepare_qupath(tmp_path / "src", tmp_path / "dst", ABOUT, 128, HALF, image_mpp=0.5)
    assert [patch.name for patch in patches.index] == ["a_20_0", "b_20_0"]
    assert (patches.instances[0] == 1).sum() == 400  # 10 px at 0.5 are 20 at 0.25


def test_the_resolution_of_images_that_do_not_say_it_is_not_that_of_the_others(tmp_path):
    src = write_qupath(tmp_path / "src", NUCLEI)
    write_qupath(src, NUCLEI, "b")
    tags = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "metadata": None}  # 0.5 µm per pixel
    tifffile.imwrite(src / "b.tif", cv2.imread(str(src / "b.png"))[..., ::-1], photometric="rgb", **tags)
    (src / "b.png").unlink()
    patches = prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25)
    first = {patch.name[0]: number for number, patch in reversed(list(enumerate(patches.index)))}
    assert [patch.name[0] for patch in patches.index] == ["a"] * 6 + ["b"] * 20  # 140 x 100 and 280 x 200 px at 0.25
    assert (patches.instances[first["a"]] == 1).sum() == 100
    assert (patches.instances[first["b"]] == 1).sum() == 400
    assert patches.images[first["b"]][50, 30].tolist() == [90, 50, 140]


def test_another_resolution_given_makes_another_set_where_it_is_used(tmp_path):
    region = feature(square(0, 0, 64), "Region*")
    for stem in ("a", "b"):
        src = write_qupath(tmp_path / "src", [*NUCLEI, region], stem)
    about = replace(ABOUT, mpp=0.5)
    prepare_qupath(src, tmp_path / "dst", about, 32, HALF, image_mpp=0.5)
    with pytest.raises(DataError, match="other data or settings"):
        prepare_qupath(src, tmp_path / "dst", about, 32, HALF, image_mpp=0.5001)


def test_a_slide_that_fails_to_open_is_not_tried_at_another_resolution(tmp_path, monkeypatch):
    def failing(path, mpp=None):
        if mpp is None:
            raise SlideError(f"{path} cannot be opened")
        return open_slide(path, mpp)

    monkeypatch.setattr(qupath, "open_slide", failing)
    for stem in ("a", "b"):
        src = write_qupath(tmp_path / "src", NUCLEI, stem)
    with pytest.raises(DataError, match=r"a\.png cannot be opened"):
        prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25)


def test_an_image_that_cannot_be_read_is_refused_whatever_resolution_is_given(tmp_path):
    src = write_qupath(tmp_path / "src", NUCLEI)
    write_qupath(src, NUCLEI, "b")
    (src / "b.png").write_text("no image")
    with pytest.raises(DataError, match=r"b\.png"):
        prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25)
    with pytest.raises(DataError, match="--image-mpp 1000 is no resolution"):
        prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=1000)


def test_faults_of_qupath_annotations_come_all_at_once(tmp_path):
    src = write_qupath(tmp_path / "src", NUCLEI)
    write_qupath(src, [*NUCLEI, feature([[0, 0], [90, 0], [0, 90]], "Region*")], "b")
    write_qupath(src, [{"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}], "c")
    write_qupath(src, NUCLEI, "d")
    (src / "d.geojson").unlink()
    with pytest.raises(DataError, match=r"(?s)c\.geojson, object 0, is a Point.*d\.geojson is missing.*rectangle"):
        prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25)
    with pytest.raises(DataError, match=r"classes \['Stroma'\], which are not among \['Tumour'\]"):
        prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25, classes=["Tumour"])
    with pytest.raises(DataError, match="does not state its resolution; pass --image-mpp"):
        prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF)


def test_classes_that_are_none_of_nuclei_are_refused_by_file(tmp_path):
    src = write_qupath(tmp_path / "src", [*NUCLEI, feature(square(30, 60, 10), "Background")])
    write_qupath(src, [*NUCLEI, feature(square(30, 60, 10), "Ignore*")], "b")
    for classes in (None, ["Background", "Stroma", "Tumour"]):
        with pytest.raises(
            DataError, match=r"a\.geojson: 1 nuclei have the class background.*b\.geojson: 1 objects have the class Ign"
        ):
            prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25, classes=classes)


def test_more_types_than_a_byte_tells_apart_are_refused():
    names = {f"type {number}" for number in range(255)}
    with pytest.raises(DataError, match="255 types; at most 254"):
        class_names_of(None, names)
    assert len(class_names_of([*names][:254], set())) == 255
    assert class_names_of(["Background", "a", "a"], set()) == ("background", "a")


def prepared_cellvit(src: Path, dst: Path):
    return prepare_cellvit(src if src.exists() else write_cellvit(src), dst, 0.25)


def prepared_pannuke(src: Path, dst: Path):
    if not src.exists():
        make_pannuke(src, images=2, side=64)
    return prepare_pannuke(src, dst)


def prepared_conic(src: Path, dst: Path):
    if not src.exists():
        make_conic(src, patients=3, of_each=1, side=64)
    return prepare_conic(src, dst)[0]


def prepared_masks(src: Path, dst: Path):
    return prepare_image_masks(src if src.exists() else write_masks(src), dst, ABOUT, 64, HALF)


def prepared_qupath(src: Path, dst: Path):
    if not src.exists():
        for stem in ("a", "b"):
            write_qupath(src, NUCLEI, stem)
    return prepare_qupath(src, dst, ABOUT, 64, HALF, image_mpp=0.25)


def retyped(src: Path) -> None:
    """The first nucleus of an image gets another of the classes that there are."""
    path = src / "a.geojson"
    path.write_text(path.read_text().replace("Tumour", "Stroma", 1))


def repainted(path: Path) -> None:
    """One pixel more of a nucleus, or of another colour."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    image[15, 10] = image[10, 10] + (image.ndim == 3)
    cv2.imwrite(str(path), image)


def relabelled(path: Path) -> None:
    label = np.load(path, allow_pickle=True).item()
    label["type_map"][label["inst_map"] == 3] = 2
    np.save(path, label, allow_pickle=True)


CORRECTIONS = {
    "annotation": (prepared_qupath, retyped),
    "slide": (prepared_qupath, lambda src: repainted(src / "b.png")),
    "mask": (prepared_masks, lambda src: repainted(src / "masks/p0_a.png")),
    "image": (prepared_masks, lambda src: repainted(src / "images/p1_a.png")),
    "types": (prepared_masks, lambda src: (src / "types/p0_a.csv").write_text("id,type\n900,tumour\n")),
    "cellvit label": (prepared_cellvit, lambda src: relabelled(src / "fold1/labels/1_2.npy")),
    "cellvit image": (prepared_cellvit, lambda src: repainted(src / "fold1/images/1_2.png")),
    "pannuke": (prepared_pannuke, lambda src: spoilt(src / "Fold 2/masks/fold2/masks.npy", lambda a: a[::-1])),
    "conic": (prepared_conic, lambda src: spoilt(src / "labels.npy", lambda a: a[::-1])),
}


@pytest.mark.parametrize(("prepared", "correct"), CORRECTIONS.values(), ids=CORRECTIONS)
def test_a_set_whose_sources_were_changed_is_refused_and_kept(tmp_path, prepared, correct):
    src, dst = tmp_path / "src", tmp_path / "dst"

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(dst.rglob("*")) if path.is_file()}

    prepared(src, dst)
    before = content()
    again = prepared(src, dst)
    assert content() == before
    assert len(again) > 0

    correct(src)
    with pytest.raises(DataError, match=r"dst\S* was prepared from other sources, or these were changed since; remove"):
        prepared(src, dst)
    assert content() == before
    assert prepared(src, tmp_path / "new").fingerprint != again.fingerprint


@pytest.mark.parametrize("prepared", [prepared_qupath, prepared_masks, prepared_cellvit, prepared_pannuke])
def test_where_the_sources_lie_makes_no_other_set(tmp_path, prepared):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    prepared(tmp_path / "here/src", tmp_path / "dst")
    (tmp_path / "here/src").rename(tmp_path / "there/src")
    assert len(prepared(tmp_path / "there/src", tmp_path / "dst")) > 0


def test_a_set_that_does_not_say_its_sources_is_not_taken_for_theirs(tmp_path):
    prepared_masks(tmp_path / "src", tmp_path / "dst")
    place = tmp_path / "dst/dataset.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "notes": {"patch_px": 64}}))
    with pytest.raises(DataError, match="dst does not say what sources it was prepared from; remove it or name"):
        prepared_masks(tmp_path / "src", tmp_path / "dst")


def test_a_digest_tells_names_and_contents_apart(tmp_path):
    def digest(*files: tuple[str, str], others: tuple[str, ...] = ()) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return digest_of(folder, [folder / name for name, _ in files], *others)

    same = [digest(("a", "x"), ("b/c", "y")), digest(("b/c", "y"), ("a", "x"))]
    other = [digest(("a", "y"), ("b/c", "x")), digest(("a", "xb"), ("c", "y")), digest(("a", "x"), others=("y",))]
    assert len({*same, *other}) == 1 + len(other)
    with pytest.raises(DataError, match=r"gone\.png cannot be read: no such file or directory"):
        digest_of(tmp_path, [tmp_path / "gone.png"])


def test_a_split_table_is_followed_and_must_be_complete(tmp_path):
    src = write_masks(tmp_path / "src")
    table = tmp_path / "splits.csv"
    table.write_text("name,group,split\np0_a,x,test\np1_a,y,train\n")
    patches = prepare_image_masks(src, tmp_path / "dst", ABOUT, 64, Splits(table))
    assert [(patch.group, patch.split) for patch in patches.index[:2]] == [("x", "test"), ("y", "train")]
    table.write_text("name,group,split\np0_a,x,test\np0_a,x,testing\n")
    with pytest.raises(DataError, match=r"(?s)p0_a is there twice.*p1_a is not there.*'testing'"):
        prepare_image_masks(src, tmp_path / "dst2", ABOUT, 64, Splits(table))


def test_an_outline_of_the_tissue_is_not_taken_for_a_nucleus(tmp_path):
    write_qupath(tmp_path / "src", NUCLEI)
    src = write_qupath(tmp_path / "src", [*NUCLEI, feature(square(0, 0, 90), None)], "b")
    with pytest.raises(DataError, match=r"b\.png: an area of 8,100 µm² at \(45, 45\), without a class, is no nucleus"):
        prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=1.0)


def test_a_region_may_be_without_nuclei(tmp_path):
    write_qupath(tmp_path / "src", NUCLEI)
    src = write_qupath(tmp_path / "src", [feature(square(70, 10, 64), "Region*")], "b")
    patches = prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25)
    assert [patch.name for patch in patches.index][-1] == "b_10_70"
    assert not patches.instances[-1].any()


def test_a_hole_of_a_nucleus_is_nucleus(tmp_path):
    ring = feature(square(10, 20, 20), "Tumour")
    ring["geometry"]["coordinates"].append(square(15, 25, 8))
    src = write_qupath(tmp_path / "src", [ring])
    write_qupath(src, NUCLEI, "b")
    patches = prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25)
    assert (patches.instances[0] == 1).sum() == 400


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan")])
def test_a_resolution_that_is_none_is_refused(mpp):
    with pytest.raises(DataError, match="is no resolution of a patch"):
        replace(ABOUT, mpp=mpp)


def test_too_few_images_for_the_parts_asked_for_are_refused():
    with pytest.raises(DataError, match="2 images, patients or slides are too few to train, validate and test"):
        Splits(validation=0.2, test=0.2).of(["p1_a", "p2_a"])
    assert {split for _, split in Splits(validation=0, test=0.2).of(["p1_a", "p2_a"]).values()} == {"train", "test"}


def test_files_beside_the_images_are_none(tmp_path):
    src = write_qupath(tmp_path / "src", NUCLEI)
    write_qupath(src, NUCLEI, "b")
    (src / "b.geojson").rename(src / "b.json")
    for name in (".DS_Store", "README.md", "splits.csv"):
        (src / name).write_text("no image")
    assert len(prepare_qupath(src, tmp_path / "dst", ABOUT, 64, HALF, image_mpp=0.25)) > 0


def test_groups_are_never_divided_between_splits():
    names = [f"p{patient}_{number}" for patient in range(10) for number in range(3)]
    places = Splits(validation=0.2, test=0.2).of(names)
    splits: dict[str, set[str]] = {}
    for group, split in places.values():
        splits.setdefault(group, set()).add(split)
    assert all(len(of) == 1 for of in splits.values())
    assert [sum(split == name for _, split in places.values()) for name in ("train", "validation", "test")] == [
        18,
        6,
        6,
    ]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (("p1_a", "p1_b", "p2_a"), ("p1", "p1", "p2")),
        (("TCGA-AA-3521-01Z_roi1", "TCGA-AA-3521-01Z_roi2", "TCGA-A6-2671-01Z_roi1"), ("AA", "AA", "A6")),
        (("TCGA-AA-3521-01Z_1", "TCGA-AA-3521-11A_1", "TCGA-AA-3522-01Z_1"), ("3521", "3521", "3522")),
        (("p07_a", "p07_b"), ("a", "b")),
        (("a", "b_1", "b_2"), ("a", "b", "b")),
        (("study", "study_p1_a", "study_p1_b"), ("study", "p1", "p1")),
        (("a_b", "a-b"), ("a_b", "a-b")),
    ],
)
def test_images_are_grouped_by_the_first_part_of_their_names_that_they_do_not_all_share(names, groups):
    assert tuple(group for group, _ in Splits(validation=0.2).of(names).values()) == groups


@pytest.mark.parametrize(("length", "side"), [(64, 64), (65, 64), (200, 64), (128, 64)])
def test_windows_cover_every_pixel_and_no_more(length, side):
    starts = windows(length, side)
    covered = np.zeros(length, bool)
    for start in starts:
        covered[start : start + side] = True
    assert covered.all()
    assert starts[0] == 0
    assert starts[-1] + side == length
    assert len(starts) == -(-length // side)


# --- check ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [["images"], {"images": "many"}, {"types": {"dead": [2]}}])
def test_published_counts_that_are_none_are_a_fault(pannuke, tmp_path, published):
    prepare_pannuke(pannuke, tmp_path / "dst")
    place = tmp_path / "dst/dataset.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "published": published}))
    report, _ = check(tmp_path / "dst")
    assert [fault for fault in report.faults if "published must hold numbers" in fault]


def test_a_check_names_every_fault_at_once_and_draws_the_rest(pannuke, tmp_path):
    patches = prepare_pannuke(pannuke, tmp_path / "dst")
    for name in ("sheet.png", "sheet"):
        draw_sheet(patches, tmp_path / name)
        assert cv2.imread(str(tmp_path / name)).std() > 20
    types, instances = np.load(tmp_path / "dst/types.npy"), np.load(tmp_path / "dst/instances.npy").astype(np.int32)
    types[1][instances[1] > 0] = 77
    types[2][instances[2] > 0] = 0
    instances[4, 0, 0] = -1
    np.save(tmp_path / "dst/types.npy", types)
    np.save(tmp_path / "dst/instances.npy", instances)
    index = (tmp_path / "dst/index.csv").read_text().replace("fold1_0001,fold1_0001", "fold1_0000,fold3_0000")
    (tmp_path / "dst/index.csv").write_text(index)
    report, _ = check(tmp_path / "dst")
    text = "; ".join(report.faults)
    for part in (
        r"image 1 (fold1_0000): the types [77]",
        "image 2 (fold1_0002): there are nuclei of the type background",
        "image 4 (fold2_0001): a nucleus has a negative number",
        "the name fold1_0000 repeats",
    ):
        assert part in text
    assert any("1 groups are in several splits" in doubt for doubt in report.doubts)


def test_the_commands_lead_from_drawn_data_to_a_checked_set(tmp_path):
    def run(*arguments: object):
        return CliRunner().invoke(app, ["data", *map(str, arguments)])

    assert run("miniature", "pannuke", tmp_path / "src", "--side", 64).exit_code == 0
    assert "18 images in three folds" in run("prepare", "pannuke", tmp_path / "src", tmp_path / "set").output
    checked = run("check", tmp_path / "set")
    assert checked.exit_code == 0
    assert "note   images: 18 here, 7,901 published" in checked.output
    assert (tmp_path / "set/sheet.png").exists()
    types = np.load(tmp_path / "set/types.npy")
    np.save(tmp_path / "set/types.npy", np.where(types > 0, 9, 0).astype(np.uint8))
    spoilt_set = run("check", tmp_path / "set")
    assert spoilt_set.output.count("fault  types.npy") == 15
    assert isinstance(spoilt_set.exception, DataError)


def test_a_check_of_torn_files_names_them_all(tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    np.save(tmp_path / "instances.npy", np.array([{}], dtype=object), allow_pickle=True)
    report, patches = check(tmp_path)
    assert patches is None
    assert [name for name in ("dataset.json", "images.npy", "instances.npy") if name in "; ".join(report.faults)] == [
        "dataset.json", "images.npy", "instances.npy",
    ]  # fmt: skip
