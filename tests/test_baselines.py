"""HoVer-Net, CISCNet and PointNu-Net: equal to the reference files from network to nuclei, and part of the pipeline."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from shrunk_models import shrunk
from typer.testing import CliRunner

from wsipipe.cli import app
from wsipipe.instances import label_tile
from wsipipe.model.answers import distance_nuclei, maps_of, point_nuclei
from wsipipe.model.ciscnet import CISCNet
from wsipipe.model.hovernet import HoverNet
from wsipipe.model.pointnu import PointNuNet
from wsipipe.model.registry import SPECS, build
from wsipipe.model.upstream import recognise
from wsipipe.model.weights import load_model, save_checkpoint

FILES = Path(__file__).parent / "data" / "parity" / "baselines"
TINY = {"width": 18, "bottlenecks": 2, "modules": (1, 3, 2), "blocks": 2, "head_width": 128, "head_depth": 4}
MIDDLE = {"width": 32, "head_depth": 4}

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def fixlib():
    """The module that makes every weight and input from its name."""
    sys.path.insert(0, str(FILES.parent))
    try:
        import fixlib

        yield fixlib
    finally:
        sys.path.remove(str(FILES.parent))


def check(values: torch.Tensor, expected: np.ndarray) -> None:
    """Equal to 1e-3, or to 1e-4 of the largest value where that is more."""
    np.testing.assert_allclose(values, expected, atol=max(1e-3, 1e-4 * np.abs(expected).max()), rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("mode", "classes"),
    [
        ("fast", 6),
        ("original", 1),
        pytest.param("fast", 5, marks=slow),
        pytest.param("fast", 1, marks=slow),
        pytest.param("original", 6, marks=slow),
    ],
)
def test_hovernet_gives_what_the_reference_gives(fixlib, mode, classes):
    expected = np.load(FILES / f"hovernet_{mode}_{classes if classes > 1 else 'none'}.npz")
    network = fixlib.load_into(HoverNet(classes=classes, mode=mode), fixlib.HOVERNET)
    side = {"fast": 256, "original": 270}[mode]
    with torch.inference_mode():
        outputs = network(torch.from_numpy(fixlib.image_u8(f"input:hovernet_{mode}", (1, 3, side, side))) / 255)
    assert outputs.keys() == ({"types"} if classes > 1 else set()) | {"nuclei", "offsets"}
    for ours, theirs in {"types": "tp", "nuclei": "np", "offsets": "hv"}.items():
        if ours in outputs:
            check(outputs[ours][0, :, ::4, ::4], expected[theirs])


@pytest.mark.parity
def test_ciscnet_gives_what_the_reference_gives(fixlib):
    network = fixlib.load_into(CISCNet(classes=7), fixlib.CISCNET)
    image = torch.from_numpy(fixlib.image_u8("input:ciscnet", (1, 3, 256, 256)))
    with torch.inference_mode():
        distances = network(2 * image / 255 - 1)["distances"]
    check(distances[0, :, ::4, ::4], np.load(FILES / "ciscnet.npz")["out"])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "classes", "settings"),
    [("hrnet18", 2, TINY), pytest.param("hrnet64", 6, {}, marks=slow)],
)
def test_pointnu_net_gives_what_the_reference_gives(fixlib, name, classes, settings):
    network = fixlib.load_into(PointNuNet(classes=classes, **settings), fixlib.POINTNUNET)
    image = torch.from_numpy(fixlib.image_u8("input:pointnu", (1, 3, 256, 256)))
    with torch.inference_mode():
        outputs = network((image / 255 - 0.5) / 0.5)
    expected = np.load(FILES / f"pointnu_{name}.npz")
    check(outputs["feature"][0, ::16, ::8, ::8], expected["feature"])
    check(outputs["kernel"][0, ::8, ::4, ::4], expected["kernel"])
    check(outputs["category"][0, :, ::2, ::2], expected["cate"])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("file", "name", "classes", "settings"),
    [
        *((f"hovernet_{mode}_{n}", f"hovernet-{mode}", n, {}) for mode in ("fast", "original") for n in (5, 6)),
        *((f"hovernet_{mode}_none", f"hovernet-{mode}", 1, {}) for mode in ("fast", "original")),
        ("ciscnet", "ciscnet", 7, {}),
        ("pointnu_hrnet18", "pointnu-net", 2, TINY),
        ("pointnu_hrnet32", "pointnu-net", 2, MIDDLE),
        ("pointnu_hrnet64", "pointnu-net", 6, {}),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_published_files_are_recognised_by_names_and_shapes(file, name, classes, settings, wrapped):
    """On tensors without memory; as released, and as the training saves them with DataParallel."""
    shapes = json.loads((FILES / f"keys_{file}.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    content = {"desc" if "hover" in file else "seg": {f"module.{k}": v for k, v in state.items()}} if wrapped else state
    spec, weights = recognise(content, name)
    with torch.device("meta"):
        ours = build(spec).state_dict()
    assert (spec.architecture, spec.answer) == (SPECS[name].architecture, SPECS[name].answer)
    assert len(spec.class_names) == len(spec.class_colours) == classes
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in ours.items()}
    for key, value in settings.items():
        assert spec.settings[key] == (list(value) if isinstance(value, tuple) else value)


def test_a_hovernet_file_without_counters_loads(tmp_path):
    torch.manual_seed(0)
    network = build(shrunk("hovernet-fast")).eval()
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    path = tmp_path / "hovernet.tar"
    torch.save({"desc": {**state, "upsample2x.unpool_mat": torch.ones(2, 2)}}, path)
    loaded, spec, _ = load_model(path)
    image = torch.rand(1, 3, 128, 128)
    with torch.inference_mode():
        assert torch.equal(loaded(image)["types"], network(image)["types"])
    assert (spec.name, spec.margin_px, spec.class_names[1]) == ("hovernet", 46, "neoplastic")


@pytest.mark.parity
@pytest.mark.parametrize("typed", [True, False])
def test_nuclei_of_hovernet_maps_are_those_of_the_reference(typed):
    case = np.load(FILES / "post_hovernet.npz")
    maps = case["pred_map"].astype(np.float32)
    labels = label_tile(maps[..., 1] >= 0.5, np.ascontiguousarray(maps[..., 2:].transpose(2, 0, 1)), 0.25)
    assert np.array_equal(labels, case["typed_inst" if typed else "untyped_inst"])


@pytest.mark.parity
def test_nuclei_of_distance_maps_are_those_of_the_reference():
    case = np.load(FILES / "post_ciscnet.npz")
    labels, probability, types = distance_nuclei(case["pred"].astype(np.float32))
    assert np.array_equal(labels, case["inst"])
    assert np.array_equal(types.argmax(1)[labels], case["cls"])
    assert probability[0] == 0
    assert (probability[1:] > 0.45).all()
    np.testing.assert_allclose(types.sum(1), 1, atol=1e-6)
    cropped = np.unique(labels[17:-17, 17:-17])
    counts = np.bincount(types.argmax(1)[cropped[cropped > 0]], minlength=7)[1:]
    assert counts.tolist() == case["counts"].tolist()


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["nms", "peak"])
def test_nuclei_of_points_are_those_of_the_reference(mode):
    case = np.load(FILES / "post_pointnu.npz")
    answer = [torch.from_numpy(case[key].astype(np.float32)) for key in ("feature", "kernel", "cate")]
    masks, types, scores = point_nuclei(*answer, peaks=mode == "peak")
    best_first = np.argsort(-case[f"{mode}_scores"], kind="stable")  # with peaks the reference keeps the grid's order
    np.testing.assert_allclose(scores, case[f"{mode}_scores"][best_first], atol=1e-5)
    assert types.tolist() == case[f"{mode}_labels"][best_first].tolist()
    assert np.array_equal(np.packbits(masks.flatten(1).numpy(), axis=1), case[f"{mode}_masks_packed"][best_first])


def test_nuclei_found_by_distance_become_maps_that_lead_back_to_them():
    case = np.load(FILES / "post_ciscnet.npz")
    distances = torch.from_numpy(case["pred"].astype(np.float32))[None]
    maps = maps_of("distances", {"distances": torch.cat([distances, torch.full_like(distances, torch.nan)])}, 10, 7)
    inside = case["inst"][10:-10, 10:-10]
    assert maps.finite.tolist() == [True, False]
    assert np.array_equal(maps.nuclei[0] > 127, inside > 0)
    assert np.array_equal(maps.types[0].argmax(0), case["cls"][10:-10, 10:-10])
    assert not maps.nuclei[1].any()
    assert maps.types[1, 0].eq(255).all()
    assert maps.offsets[0][:, inside == 0].eq(0).all()
    assert [maps.offsets[0, k].min().item() for k in (0, 1)] == [-127, -127]


def test_a_tile_without_points_has_empty_maps():
    outputs = {
        "feature": torch.zeros(2, 4, 32, 64),
        "kernel": torch.zeros(2, 4, 8, 16),
        "category": torch.full((2, 5, 8, 16), -9.0),
    }
    maps = maps_of("points", outputs, 8, 6)
    assert tuple(maps.types.shape) == (2, 6, 16, 48)
    assert maps.finite.all()
    assert not maps.nuclei.any()
    outputs["kernel"][1, 0, 0, 0] = torch.nan
    assert maps_of("points", outputs, 8, 6).finite.tolist() == [True, False]


@pytest.mark.parametrize("name", ["hovernet-fast", "ciscnet", "pointnu-net"])
def test_segment_runs_with_every_kind_of_answer(name, tmp_path, make_svs):
    torch.manual_seed(0)
    model, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_checkpoint(model, build(shrunk(name)), shrunk(name))
    pixels = np.random.default_rng(0).integers(60, 255, (160, 160, 3), np.uint8)
    slide = make_svs(tmp_path / "small.svs", pixels, levels=1)
    options = ["--out", str(out), "--no-tissue-mask", "--device", "cpu", "--precision", "fp32"]
    done = CliRunner().invoke(app, ["segment", str(slide), "--model", str(model), *options])
    assert done.exit_code == 0, done.output
    assert (out / "nuclei.parquet").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "{tile_px: 256, halo_px: 95}",
            "takes sides of 6 px more than a multiple of 8 px, not 256",
        ),
        ("{halo_px: 64}", "answers 95 px less on each side, not 64"),
    ],
)
def test_tiles_that_a_network_cannot_take_are_refused(settings, message, tmp_path, make_svs):
    model, config = tmp_path / "model.safetensors", tmp_path / "config.yaml"
    save_checkpoint(model, build(shrunk("hovernet-original")), shrunk("hovernet-original"))
    config.write_text(f"maps: {settings}\n")
    slide = make_svs(tmp_path / "small.svs", np.full((64, 64, 3), 128, np.uint8), levels=1)
    options = ["--out", str(tmp_path / "out"), "--no-tissue-mask", "--config", str(config), "--device", "cpu"]
    done = CliRunner().invoke(app, ["segment", str(slide), "--model", str(model), *options])
    assert done.exit_code == 1
    assert message in str(done.exception)
