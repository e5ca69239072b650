"""Patch sets: what is written is what is read, and item i is item i."""

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from made_patches import CLASSES, write_set
from torch.utils.data import DataLoader

from wsipipe.errors import DataError
from wsipipe.training.augment import RECIPES
from wsipipe.training.crops import FixedCrops, MixedCrops, Source, start_worker
from wsipipe.training.data import PatchSet
from wsipipe.training.prepare import DEFAULT_SETS, SourceFolder, prepare_masks


def test_a_patch_set_opens_as_it_was_written(tmp_path):
    patches = PatchSet.open(write_set(tmp_path / "a"))
    assert (patches.name, patches.mpp, patches.class_names, len(patches)) == ("a", 0.25, CLASSES, 4)
    assert [patches.of(split).tolist() for split in ("train", "validation", "test")] == [[0, 1], [2], [3]]
    assert patches.trusted is None
    assert isinstance(patches.images.base, np.memmap)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("images.npy", np.zeros((4, 96, 96), np.uint8), r"images\.npy.*\(4, 96, 96\)"),
        ("images.npy", np.zeros((4, 96, 96, 3), np.float32), r"images\.npy.*float32"),
        ("images.npy", np.zeros((3, 96, 96, 3), np.uint8), r"instances\.npy.*\(3, 96, 96\)"),
        ("instances.npy", np.zeros((4, 96, 95), np.uint16), r"instances\.npy.*\(4, 96, 95\)"),
        ("instances.npy", np.zeros((4, 96, 96), np.int64), r"instances\.npy.*int64"),
        ("instances.npy", np.full((4, 96, 96), -1, np.int32), r"instances\.npy, image 0.*negative"),
        ("types.npy", np.full((4, 96, 96), 3, np.uint8), r"types\.npy, image 0 \(i0\).*\[3\].*3 class_names"),
        ("trusted.npy", np.ones((4, 96, 96), np.float64), r"trusted\.npy.*float64"),
        ("instances.npy", np.array([{"inst_map": 1}], dtype=object), r"instances\.npy.*cannot be read"),
    ],
)
def test_an_array_that_breaks_the_layout_is_refused_by_name(tmp_path, file, array, message):
    folder = write_set(tmp_path / "a")
    np.save(folder / file, array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        PatchSet.open(folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("dataset.json", "{", r"dataset\.json does not describe"),
        ("dataset.json", "[]", r"dataset\.json does not describe"),
        ("dataset.json", '{"format": 2}', r"format 2.*reads 1"),
        ("dataset.json", '{"format": 1, "class_names": null}', r"dataset\.json.*mpp"),
        ("dataset.json", '{"format": 1, "class_names": null, "mpp": 250}', r"mpp is 250"),
        ("dataset.json", '{"format": 1, "class_names": "ab", "mpp": 0.25}', r"class_names must be a list"),
        ("dataset.json", '{"format": 1, "class_names": ["a", "b", "b"], "mpp": 0.25}', r"\['b'\] more than once"),
        ("dataset.json", json.dumps({"format": 1, "class_names": [*map(str, range(256))]}), "256 class_names; at most"),
        ("index.csv", "name,group,split\na,b,train\n", r"index\.csv has 1 rows for 4 images"),
        ("index.csv", "name,group\n" + "a,b\n" * 4, r"index\.csv must be a table.*split"),
        ("index.csv", "name,group,split\n" + "a,b,train\n" * 3 + "z,b,training\n", r"image 3 \(z\).*'training'"),
        ("images.npy", "no array", r"images\.npy cannot be read"),
    ],
)
def test_a_file_that_breaks_the_layout_is_refused_by_name(tmp_path, file, text, message):
    folder = write_set(tmp_path / "a")
    (folder / file).write_text(text)
    with pytest.raises(DataError, match=message):
        PatchSet.open(folder)


@pytest.mark.parametrize("file", ["dataset.json", "images.npy", "instances.npy", "index.csv"])
def test_a_missing_file_is_refused_by_name(tmp_path, file):
    folder = write_set(tmp_path / "a")
    (folder / file).unlink()
    with pytest.raises(DataError, match=file):
        PatchSet.open(folder)


def test_a_torn_array_is_refused(tmp_path):
    folder = write_set(tmp_path / "a")
    whole = (folder / "images.npy").read_bytes()
    (folder / "images.npy").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"images\.npy cannot be read"):
        PatchSet.open(folder)


def test_types_without_class_names_are_refused(tmp_path):
    with pytest.raises(DataError, match="class_names"):
        PatchSet.open(write_set(tmp_path / "a", class_names=None))


def mixture(tmp_path: Path, weights: tuple[float, float] = (1.0, 1.0), **more: object) -> MixedCrops:
    typed = PatchSet.open(write_set(tmp_path / "typed"))
    untyped = PatchSet.open(write_set(tmp_path / "untyped", side=128, typed=False, seed=1))
    sources = [Source(typed, weights[0]), Source(untyped, weights[1])]
    return MixedCrops(sources, RECIPES["default"], count=12, crop_px=64, **more)  # type: ignore[arg-type]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_item_has_image_and_targets_of_one_shape(tmp_path):
    for item in map(mixture(tmp_path).__getitem__, range(12)):
        found = {key: (value.dtype, tuple(value.shape)) for key, value in item.items()}
        assert found == {
            "image": (torch.uint8, (3, 64, 64)),
            "nuclei": (torch.int64, (64, 64)),
            "offsets": (torch.float32, (2, 64, 64)),
            "types": (torch.int64, (64, 64)),
            "trusted": (torch.bool, (64, 64)),
        }
        assert set(item["nuclei"].unique().tolist()) <= {0, 1}
        assert item["offsets"].abs().max() <= 1
        assert not item["offsets"][:, item["nuclei"] == 0].any()
        assert item["trusted"].all()


def test_types_are_known_wherever_the_set_is_typed_and_nowhere_else(tmp_path):
    typed, untyped = mixture(tmp_path, (1, 0)), mixture(tmp_path / "b", (0, 1))
    for i in range(12):
        item = typed[i]
        assert torch.equal(item["types"] > 0, item["nuclei"] > 0)
        assert item["types"].max() <= 2
        assert (untyped[i]["types"] == 255).all()


def test_an_item_does_not_depend_on_what_was_asked_before(tmp_path):
    one, other = mixture(tmp_path), mixture(tmp_path / "b")
    forwards = [one[i] for i in range(6)]
    backwards = [other[i] for i in reversed(range(6))][::-1]
    assert all(map(same, forwards, backwards))
    assert not same(forwards[0], forwards[1])
    assert not same(forwards[0], mixture(tmp_path / "c", seed=1)[0])


def test_workers_and_a_resumed_run_give_the_same_items(tmp_path):
    crops = mixture(tmp_path)
    options = {"batch_size": None, "sampler": range(5, 11), "worker_init_fn": start_worker}
    for workers in (0, 2):
        items = list(DataLoader(crops, num_workers=workers, **options))
        assert all(same(item, crops[i]) for i, item in zip(range(5, 11), items, strict=True))


def test_sets_and_images_are_drawn_by_weight(tmp_path):
    patches = PatchSet.open(write_set(tmp_path / "plain"))
    marked = PatchSet.open(write_set(tmp_path / "marked", typed=False))
    crops = MixedCrops(
        [Source(patches, 3.0, np.array([0.0, 1.0])), Source(marked, 1.0)], RECIPES["published"], 400, crop_px=16
    )
    drawn = Counter(bool((crops[i]["types"] == 255).all()) for i in range(400))
    assert 60 < drawn[True] < 140
    only = MixedCrops([Source(patches, 1.0, np.array([0.0, 1.0]))], RECIPES["published"], 10, crop_px=16)
    again = MixedCrops([Source(patches, 1.0)], RECIPES["published"], 10, crop_px=16)
    assert any(not same(only[i], again[i]) for i in range(10))


def test_sets_that_name_other_classes_are_refused(tmp_path):
    one = PatchSet.open(write_set(tmp_path / "a"))
    other = PatchSet.open(write_set(tmp_path / "b", class_names=["background", "x", "y"]))
    with pytest.raises(DataError, match="must name the same"):
        MixedCrops([Source(one), Source(other)], RECIPES["default"], 1)


def test_a_set_without_images_of_the_split_is_refused(tmp_path):
    patches = PatchSet.open(write_set(tmp_path / "a", count=2))
    with pytest.raises(DataError, match="no image in the split 'test'"):
        MixedCrops([Source(patches)], RECIPES["default"], 1, split="test")


def test_trust_reaches_the_item(tmp_path):
    folder = write_set(tmp_path / "a")
    np.save(folder / "trusted.npy", np.load(folder / "instances.npy") == 0)
    crops = MixedCrops([Source(PatchSet.open(folder))], RECIPES["default"], 4, crop_px=64)
    for i in range(4):
        assert torch.equal(crops[i]["trusted"], crops[i]["nuclei"] == 0)


def test_fixed_crops_show_every_pixel_as_it_is(tmp_path):
    patches = PatchSet.open(write_set(tmp_path / "a"))
    crops = FixedCrops(patches, crop_px=64)
    assert len(crops) == 4
    seen = [crops[i]["image"].numpy().transpose(1, 2, 0) for i in range(4)]
    image = patches.images[2]
    for crop, (y, x) in zip(seen, [(0, 0), (0, 32), (32, 0), (32, 32)], strict=True):
        np.testing.assert_array_equal(crop, image[y : y + 64, x : x + 64])


def test_fixed_crops_are_at_the_resolution_asked_for(tmp_path):
    crops = FixedCrops(PatchSet.open(write_set(tmp_path / "a")), mpp=0.5, crop_px=48)
    assert len(crops) == 1
    whole = (PatchSet.open(tmp_path / "a").instances[2] > 0).sum()
    assert crops[0]["nuclei"].sum().item() == pytest.approx(whole / 4, rel=0.1)


@pytest.mark.parametrize(("mpp", "of_set", "crop_px", "count"), [
    (0.173, 0.173, 96, 1), (0.25, 0.2525, 96, 1), (0.173, 0.173, 48, 4), (0.25, 0.2525, 48, 4), (0.25, 0.26, 48, 9),
])  # fmt: skip
def test_fixed_crops_at_nearly_the_resolution_of_a_set_show_nothing_twice(mpp, of_set, crop_px, count, tmp_path):
    crops = FixedCrops(PatchSet.open(write_set(tmp_path / "a", mpp=of_set)), mpp=mpp, crop_px=crop_px)
    assert len(crops) == count


# --- from folders of images -------------------------------------------------------------------------------------------


def write_source(folder: Path) -> Path:
    """Three dim images with two nuclei each; nucleus 1 is trusted, 3 px of a third are in `binary` only."""
    for name in ("images", "masks", "types", "trust", "binary"):
        (folder / name).mkdir(parents=True)
    for i in range(3):
        mask = np.zeros((40, 50), np.uint16)
        mask[5:15, 5:15], mask[20:30, 20:30] = 1, 2
        image = np.full((40, 50, 3), 160, np.uint8)
        image[mask > 0] = (60, 40, 90)
        cv2.imwrite(str(folder / "images" / f"p{i}.png"), image[..., ::-1])
        cv2.imwrite(str(folder / "masks" / f"p{i}.png"), mask)
        binary = (mask > 0).astype(np.uint8) * 255
        binary[35, 40:43] = 255
        binary[5] = 0
        cv2.imwrite(str(folder / "binary" / f"p{i}.png"), binary)
        (folder / "types" / f"p{i}.csv").write_text("id,type\n1,round\n")
        (folder / "trust" / f"p{i}.csv").write_text("id,trusted\n1,1\n2,0\n")
    return folder


def place(i: int, stem: str) -> tuple[str, str]:
    return stem, "train" if i else "test"


ABOUT = SourceFolder("drawn", 0.25, "drawn", "CC0-1.0", place, class_names=CLASSES)


def test_a_folder_of_masks_becomes_a_patch_set(tmp_path):
    patches = prepare_masks(write_source(tmp_path / "src"), tmp_path / "dst", ABOUT)
    assert [(patch.name, patch.split) for patch in patches.index] == [("p0", "test"), ("p1", "train"), ("p2", "train")]
    assert patches.images[0][0, 0].tolist() == [160, 160, 160]
    assert patches.images[0][25, 25].tolist() == [60, 40, 90]
    assert patches.types is not None
    assert patches.trusted is not None
    instances, types, trusted = patches.instances[1], patches.types[1], patches.trusted[1]
    assert instances[10, 10] == 1
    assert instances[5, 10] == 0  # background in binary
    assert instances[35, 41] == 3  # nucleus in binary alone
    assert (types[10, 10], types[25, 25], types[0, 0]) == (1, 255, 0)  # the table leaves out nucleus 2
    assert (trusted[10, 10], trusted[25, 25], trusted[35, 41], trusted[0, 0]) == (True, False, False, True)


def test_types_follow_the_nuclei_that_binary_leaves(tmp_path):
    patches = prepare_masks(write_source(tmp_path / "src"), tmp_path / "dst", ABOUT)
    assert patches.types is not None
    np.testing.assert_array_equal(patches.types == 0, patches.instances == 0)


def test_preparing_again_keeps_what_is_there(tmp_path):
    src = write_source(tmp_path / "src")
    (tmp_path / "dst.partial").mkdir()
    prepare_masks(src, tmp_path / "dst", ABOUT)
    before = (tmp_path / "dst" / "images.npy").stat().st_mtime_ns
    prepare_masks(src, tmp_path / "dst", ABOUT)
    assert (tmp_path / "dst" / "images.npy").stat().st_mtime_ns == before
    assert not (tmp_path / "dst.partial").exists()


@pytest.mark.parametrize(
    ("file", "text"), [("types/p1.csv", "id,type\n2,round\n"), ("trust/p2.csv", "id,trusted\n1,0\n2,1\n")]
)
def test_a_source_folder_that_was_changed_since_is_refused(tmp_path, file, text):
    src = write_source(tmp_path / "src")
    before = prepare_masks(src, tmp_path / "dst", ABOUT).fingerprint
    (src / file).write_text(text)
    with pytest.raises(DataError, match="was prepared from other sources, or these were changed since; remove it"):
        prepare_masks(src, tmp_path / "dst", ABOUT)
    assert PatchSet.open(tmp_path / "dst").fingerprint == before


@pytest.mark.parametrize("folder", ["images", "masks", "binary"])
def test_a_picture_that_was_changed_since_is_refused(tmp_path, folder):
    src = write_source(tmp_path / "src")
    prepare_masks(src, tmp_path / "dst", ABOUT)
    path = str(src / folder / "p1.png")
    cv2.imwrite(path, np.flipud(cv2.imread(path, cv2.IMREAD_UNCHANGED)))
    with pytest.raises(DataError, match="was prepared from other sources, or these were changed since; remove it"):
        prepare_masks(src, tmp_path / "dst", ABOUT)


def test_a_patch_set_made_otherwise_is_not_overwritten(tmp_path):
    src = write_source(tmp_path / "src")
    prepare_masks(src, tmp_path / "dst", ABOUT)
    with pytest.raises(DataError, match="other data or settings"):
        prepare_masks(src, tmp_path / "dst", SourceFolder("drawn", 0.5, "drawn", "CC0-1.0", place, CLASSES))


def test_the_white_point_is_set_for_the_whole_folder(tmp_path):
    about = SourceFolder("drawn", 0.25, "drawn", "CC0-1.0", place, set_white=True)
    patches = prepare_masks(write_source(tmp_path / "src"), tmp_path / "dst", about)
    assert patches.types is None
    assert patches.images[0][0, 0].tolist() == [240, 240, 240]
    assert patches.images[0][25, 25].tolist() == [90, 60, 135]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda src: (src / "masks" / "p1.png").unlink(), r"masks/p1\.png"),
        (
            lambda src: (src / "types" / "p1.csv").write_text('id,type\n1,"round\n2,other\n'),
            "p1.csv must be a table of id and type",
        ),
        (lambda src: (src / "types" / "p1.csv").unlink(), r"types/p1\.csv"),
        (lambda src: (src / "types" / "p1.csv").write_text("id,type\n1,square\n"), r"p1\.csv.*'square'"),
        (lambda src: (src / "types" / "p1.csv").write_text("id,type\n9,round\n"), r"p1\.csv: nucleus 9"),
        (lambda src: (src / "trust" / "p1.csv").write_text("id,trusted\n1,yes\n"), r"p1\.csv: nucleus 1"),
        (lambda src: (src / "images" / "p1.png").write_text("no image"), r"images/p1\.png cannot be read"),
        (
            lambda src: cv2.imwrite(str(src / "masks" / "p1.png"), np.zeros((40, 49), np.uint16)),
            r"p1\.png is \(49, 40\)",
        ),
        (
            lambda src: cv2.imwrite(str(src / "binary" / "p1.png"), np.zeros((9, 9), np.uint8)),
            r"binary/p1\.png is \(9, 9\)",
        ),
    ],
)
def test_a_source_folder_with_a_fault_is_refused_by_file(tmp_path, spoil, message):
    src = write_source(tmp_path / "src")
    spoil(src)
    with pytest.raises(DataError, match=message):
        prepare_masks(src, tmp_path / "dst", ABOUT)
    assert not (tmp_path / "dst").exists()


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        prepare_masks(tmp_path, tmp_path / "dst", ABOUT)


def test_the_default_splits_are_the_stated_ones():
    stems = {
        "consep": [f"{split}_{i}" for split, n in (("test", 14), ("train", 27)) for i in range(1, n + 1)],
        "nuinsseg": [f"{i:03d}" for i in range(1, 666)],
        "tnbc_naylor": [f"{patient:02d}_1" for patient in range(1, 12)],
    }
    counts = {}
    for name, names in stems.items():
        places = [DEFAULT_SETS[name].place(i, stem) for i, stem in enumerate(names)]
        assert len({group for group, _ in places}) == len(set(places)), "a group is divided between splits"
        counts[name] = Counter(split for _, split in places)
    assert counts["consep"] == {"train": 24, "validation": 3, "test": 14}
    assert counts["nuinsseg"] == {"train": 605, "validation": 60}
    assert counts["tnbc_naylor"] == {"train": 6, "validation": 2, "test": 3}
