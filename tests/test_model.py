"""Networks: equal to the reference implementation, and every registered one sound."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from shrunk_models import SMALL_BACKBONE, shown_px, shrunk
from timm.layers import resample_abs_pos_embed

from wsipipe.errors import ModelError
from wsipipe.model.attention import sample_levels
from wsipipe.model.cellvit import CellViT
from wsipipe.model.cellvta import CellVTA, to_cells, to_pixels
from wsipipe.model.encoder import make_encoder
from wsipipe.model.registry import SPECS, build
from wsipipe.model.spec import ModelSpec
from wsipipe.model.upstream import cellvta_key
from wsipipe.model.weights import find_checkpoint, load_model, save_checkpoint

PARITY = Path(__file__).parent / "data" / "parity"
THEIRS = {
    "nuclei": "nuclei_binary_map",
    "offsets": "hv_map",
    "types": "nuclei_type_map",
    "tissue": "tissue_types",
}
FROZEN = {
    "cellvta": "encoder.vit.",
    "cellvit": "encoder.vit.",
    "hovernet": ("d1.", "d2.", "d3."),
    "ciscnet": "encoderConv.",
    "pointnu": "pretrained.",
}
MILLIONS: dict[str, float] = {
    "cellvta-uni": 387.77,
    "cellvta-uni-paper": 387.77,
    "cellvta-sam-b": 161.20,
    "cellvta-sam-l": 391.82,
    "cellvta-sam-h": 734.82,
    "cellvta-uni2-h": 796.65,
    "cellvta-virchow2": 729.95,
    "cellvta-h-optimus-0": 1250.03,
    "cellvta-h-optimus-1": 1250.03,
    "cellvta-dinov2-l": 388.77,
    "cellvta-dinov3-l": 387.48,
    "cellvit-256": 46.75,
    "cellvit-sam-b": 146.09,
    "cellvit-sam-l": 367.85,
    "cellvit-sam-h": 699.74,
    "cellvit-uni": 362.93,
    "hovernet-fast": 37.64,
    "hovernet-original": 54.74,
    "ciscnet": 34.18,
    "pointnu-net": 161.35,
    "cellvta-nano": 2.76,
    "cellvta-small": 11.2,
}


def check_answer(spec: ModelSpec, outputs, image) -> None:
    batch, _, *sides = image.shape
    if spec.answer == "distances":
        assert {key: tuple(value.shape) for key, value in outputs.items()} == {
            "distances": (batch, len(spec.class_names), *sides)
        }
        return
    if spec.answer == "points":
        width, types = spec.settings["head_width"], len(spec.class_names) - 1
        cells = [side // 4 for side in sides]
        assert {key: tuple(value.shape) for key, value in outputs.items()} == {
            "feature": (batch, width, *sides),
            "kernel": (batch, width, *cells),
            "category": (batch, types, *cells),
        }
        return
    sides = [side - 2 * spec.margin_px for side in sides]
    tissue = {"tissue": (batch, 19)} if spec.settings.get("tissue_classes") else {}
    maps = {"nuclei": 2, "offsets": 2, "types": len(spec.class_names)}
    assert {key: tuple(value.shape) for key, value in outputs.items()} == {
        **{key: (batch, channels, *sides) for key, channels in maps.items()},
        **tissue,
    }


def unread(spec: ModelSpec) -> set[str]:
    """What nothing reads: without a tissue head, the last norm, and the tokens that meet no block."""
    settings = spec.settings
    found: set[str] = set()
    if spec.architecture in ("hovernet", "ciscnet"):
        return found
    if spec.architecture == "pointnu":
        return {f"pretrained.last_layer.{place}.{kind}" for place in (0, 1) for kind in ("weight", "bias")}
    if not settings.get("tissue_classes") or not settings.get("tissue_normalised", True):
        found |= {"encoder.vit.norm.weight", "encoder.vit.norm.bias"}
    if not settings.get("tissue_classes") and spec.architecture == "cellvta" and settings.get("variant") != "paper":
        found |= {"encoder.vit.cls_token", "encoder.vit.reg_token"}
    return found


def deterministic_weights():
    """The module that makes every weight from its upstream name."""
    found = importlib.util.spec_from_file_location("detweights", PARITY / "detweights.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def reference_network() -> CellVTA:
    """The small network whose outputs the reference implementation gave, with the same weights."""
    meta = json.loads((PARITY / "model_meta.json").read_text())
    network = CellVTA(
        classes=6,
        decoder_widths=(64, 128, 256, 312),
        dim=96,
        depth=8,
        heads=4,
        stages=((0, 1), (2, 3), (4, 5), (6, 7)),
        prior_width=16,
        attention_heads=4,
        tissue_classes=19,
    )
    make = deterministic_weights().tensor
    shapes = meta["state_dict_shapes"]["vta_s"]
    network.load_state_dict({cellvta_key(key): torch.from_numpy(make(key, shape)) for key, shape in shapes.items()})
    return network.eval()


@pytest.mark.parity
@pytest.mark.parametrize("size", ["64x64", "64x96"])
def test_cellvta_gives_what_the_reference_gives(size):
    expected = np.load(PARITY / f"model_vta_s_{size}.npz")
    network = reference_network()
    with torch.inference_mode():
        image = torch.from_numpy(expected["input"])
        outputs = network(image)
        coarsest = network.encoder(image)[0][3]
    for ours, theirs in THEIRS.items():
        np.testing.assert_allclose(outputs[ours], expected[f"out.{theirs}"], atol=1e-3, rtol=1e-4, err_msg=ours)
    np.testing.assert_allclose(coarsest, expected["out.tokens"], atol=1e-3, rtol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("size", ["64x64", "64x96", "224x224"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("cellvit", {"layer_scale": None, "positions": "dino"}), ("cellvituni", {"tissue_normalised": False})],
)
def test_cellvit_gives_what_the_reference_gives(kind, settings, size):
    expected, make = np.load(PARITY / f"model_{kind}_{size}.npz"), deterministic_weights()
    shapes = json.loads((PARITY / f"model_{kind}_meta.json").read_text())["state_dict_shapes"]
    network = CellViT(
        classes=6,
        decoder_widths=(64, 128, 256, 312),
        raised_widths=(256, 128),
        dim=96,
        depth=4,
        heads=4,
        taps=(1, 2, 3, 4),
        tissue_classes=19,
        **settings,
    ).eval()
    network.load_state_dict({cellvta_key(key): torch.from_numpy(make.tensor(key, s)) for key, s in shapes.items()})
    image = expected["input"] if "input" in expected else make.image(f"input:{kind}_{size}", (1, 3, 224, 224))
    with torch.inference_mode():
        outputs = network(torch.from_numpy(image))
    for ours, theirs in THEIRS.items():
        values, wanted = outputs[ours].numpy(), expected[f"out.{theirs}"]
        if values.shape != wanted.shape:  # kept at every fourth pixel
            values = values[..., ::4, ::4]
        np.testing.assert_allclose(values, wanted, atol=1e-3, rtol=1e-4, err_msg=ours)


@pytest.mark.slow
@pytest.mark.parity
def test_the_full_size_model_gives_what_the_reference_gives():
    """388 M weights: some 3 GB and a minute."""
    expected, make = np.load(PARITY / "model_full_256.npz"), deterministic_weights()
    shapes = json.loads((PARITY / "full_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        network = build(SPECS["cellvta-uni"]).eval()
    weights = {cellvta_key(key): torch.from_numpy(make.tensor(key, shape)) for key, (shape, _) in shapes.items()}
    network.load_state_dict(weights, assign=True)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(make.image("input:full_256", (1, 3, 256, 256))))
    for row, (ours, theirs) in zip([1, 2, 3, 0], THEIRS.items(), strict=True):
        values = outputs[ours].double().numpy()
        sampled = values if ours == "tissue" else values[..., ::4, ::4]
        np.testing.assert_allclose(sampled, expected[theirs], atol=1e-3, rtol=1e-4, err_msg=ours)
        np.testing.assert_allclose([values.sum(), (values**2).sum()], expected["sums"][row], rtol=1e-3, atol=1)


@pytest.mark.parity
def test_every_tensor_of_the_published_model_has_its_place():
    shapes = json.loads((PARITY / "full_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        network = build(SPECS["cellvta-uni"])
    ours = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert ours == {cellvta_key(key): shape for key, (shape, _) in shapes.items()}


@pytest.mark.parity
def test_deformable_sampling_gives_what_the_reference_operator_gives():
    case = {key: torch.from_numpy(value) for key, value in np.load(PARITY / "msda_core.npz").items()}
    sizes = tuple((int(h), int(w)) for h, w in case["shapes"])
    locations = case["sampling_locations"].permute(0, 2, 3, 4, 1, 5)
    weights = case["attention_weights"].permute(0, 2, 3, 4, 1)
    sampled = sample_levels(case["value"], sizes, locations, weights)
    np.testing.assert_allclose(sampled, case["output"], atol=1e-5)


@pytest.mark.parity
def test_positions_are_resampled_as_in_the_reference():
    case = np.load(PARITY / "pos_embed_resample.npz")
    for name in case.files:
        if name.startswith("to_"):
            size = [int(side) for side in name[3:].split("x")]
            got = resample_abs_pos_embed(torch.from_numpy(case["pos_embed"]), size)
            np.testing.assert_allclose(got, case[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", SPECS)
def test_a_network_answers_as_described_and_batches_change_nothing(name):
    torch.manual_seed(0)
    spec = shrunk(name)
    network = build(spec).eval()
    image = torch.randn(2, 3, *shown_px(spec))
    with torch.inference_mode():
        outputs, again, single = network(image), network(image), network(image[1:])
    check_answer(spec, outputs, image)
    for key, value in outputs.items():
        assert torch.equal(value, again[key])
        torch.testing.assert_close(value[1:], single[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_every_weight_of_a_network_learns_that_can(name):
    torch.manual_seed(0)
    spec = shrunk(name)
    network = build(spec).train()
    with torch.no_grad():  # what starts at 0 lets nothing through yet
        for weight in network.parameters():
            weight += 0.02 * torch.randn_like(weight)
    outputs = network(torch.randn(2, 3, *shown_px(spec)))
    sum(value.square().mean() for value in outputs.values()).backward()
    still = {key for key, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert still == unread(spec) & dict(network.named_parameters()).keys()


@pytest.mark.parametrize("name", SPECS)
def test_frozen_weights_stay_as_they_are(name):
    torch.manual_seed(0)
    spec = shrunk(name)
    network = build(spec).train()
    frozen, learning = [], []
    for key, weight in network.named_parameters():
        weight.requires_grad = not key.startswith(FROZEN[spec.architecture])
        (learning if weight.requires_grad else frozen).append((weight, weight.detach().clone()))
    outputs = network(torch.randn(2, 3, *shown_px(spec)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    sum(value.square().mean() for value in outputs.values()).backward()
    optimizer.step()
    assert frozen
    assert all(weight.grad is None and torch.equal(weight, before) for weight, before in frozen)
    assert all(
        not torch.equal(weight, before) for weight, before in learning if weight.grad is not None and weight.grad.any()
    )


@pytest.mark.parametrize("name", SPECS)
def test_a_network_is_saved_and_loaded(tmp_path, name):
    torch.manual_seed(0)
    spec = shrunk(name)
    network, path = build(spec).eval(), tmp_path / "x.safetensors"
    save_checkpoint(path, network, spec)
    loaded, read, _ = load_model(path)
    image = torch.randn(1, 3, *shown_px(spec))
    assert read == spec
    with torch.inference_mode():
        ours, theirs = network(image), loaded(image)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("name", SPECS)
def test_every_registered_network_can_be_built_at_its_full_size(name):
    with torch.device("meta"):
        network = build(SPECS[name])
    millions = sum(weight.numel() for weight in network.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], abs=0.06)


def test_the_class_token_takes_part_only_where_the_paper_sends_it_through():
    image = torch.randn(2, 3, 32, 32)
    settings = {"dim": 32, "depth": 4, "heads": 2, "stages": [(i, i) for i in range(4)], "attention_heads": 2}
    tissue = {}
    for token in ("bypass", "attend"):
        torch.manual_seed(0)
        network = CellVTA(
            classes=2, decoder_widths=(8, 8, 8, 8), prior_width=8, tissue_classes=3, class_token=token, **settings
        ).eval()
        with torch.inference_mode():
            for block in network.encoder.vit.blocks:
                block.attn.proj.weight *= 100  # at the start a token hardly takes in what it sees
            tissue[token] = network(image)["tissue"]
    # Not to the last bit: some processors' kernels take the rows of a batch in different ways.
    torch.testing.assert_close(tissue["bypass"][0], tissue["bypass"][1], atol=1e-6, rtol=0)
    assert not torch.allclose(tissue["attend"][0], tissue["attend"][1], atol=1e-5, rtol=0)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="multiples of 32 px, not 64 x 72"):
        build(SPECS["cellvta-nano"])(torch.zeros(1, 3, 64, 72))


def test_cells_hold_the_pixels_of_the_image_and_give_each_its_own_answer():
    image = torch.arange(2 * 3 * 32 * 64.0).view(2, 3, 32, 64)
    cells = to_cells(image, 2)
    assert cells.shape == (2, 12, 16, 32)
    assert sorted(cells[1, :, 1, 2].tolist()) == sorted(image[1, :, 2:4, 4:6].flatten().tolist())
    assert torch.equal(to_pixels({"nuclei": cells}, 2)["nuclei"], image)


def test_a_network_of_cells_answers_for_every_pixel_and_takes_sides_that_its_cells_fill():
    torch.manual_seed(0)
    settings = {"dim": 32, "depth": 4, "heads": 2, "layer_scale": None, "drop_path": 0.0, "extra_extractors": 0}
    network = CellVTA(
        classes=3, cell_px=2, decoder_widths=(8, 8, 8, 8), prior_width=8, attention_heads=2, gamma=0.1, **settings
    ).eval()
    with torch.inference_mode():
        answer = network(torch.randn(1, 3, 64, 96))
    assert {name: tuple(maps.shape) for name, maps in answer.items()} == {
        "nuclei": (1, 2, 64, 96),
        "offsets": (1, 2, 64, 96),
        "types": (1, 3, 64, 96),
    }
    inside_a_cell = answer["nuclei"][..., ::2, ::2] - answer["nuclei"][..., 1::2, 1::2]
    assert inside_a_cell.abs().max() > 1e-3


def test_an_encoder_made_for_rgb_takes_no_cells():
    with pytest.raises(ValueError, match="takes RGB, not 12 channels"):
        make_encoder("vit_tiny_patch16_224", channels=12)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    torch.manual_seed(0)
    network, path = build(SPECS["cellvta-nano"]).eval(), tmp_path / "nano.safetensors"
    save_checkpoint(path, network, SPECS["cellvta-nano"], {"step": 3})
    loaded, spec, digest = load_model(path)
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(image)["types"], network(image)["types"])
    assert spec == SPECS["cellvta-nano"]
    assert len(digest) == 64
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_saved_again_has_the_same_bytes_and_may_be_read_by_whom_files_may(tmp_path):
    network, spec = build(SPECS["cellvta-nano"]), SPECS["cellvta-nano"]
    (tmp_path / "other").touch()
    saved = []
    for number in range(4):
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, network, spec, {"step": 3, "loss": 0.5})
        saved.append(path.read_bytes())
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert len(set(saved)) == 1
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["wsipipe_notes"]) == {"step": 3, "loss": 0.5}
        assert set(file.keys()) == set(network.state_dict())


def _saved(path: Path, change) -> Path:
    network = build(SPECS["cellvta-nano"])
    change(network)
    save_checkpoint(path, network, SPECS["cellvta-nano"])
    return path


def _spoil(network):
    with torch.no_grad():
        network.encoder.level_embed[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_spoil, "encoder.level_embed holds values that are not finite"),
        (lambda n: n.register_buffer("spare", torch.zeros(1)), r"0 tensors are missing .* 1 do not belong \(spare\)"),
        (lambda n: delattr(n.encoder, "level_embed"), r"1 tensors are missing \(encoder.level_embed\)"),
        (lambda n: setattr(n.encoder, "level_embed", torch.nn.Parameter(torch.zeros(2, 64))), r"\(2, 64\), expected"),
    ],
)
def test_weights_that_do_not_fit_are_refused_saying_what_was_found(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        load_model(_saved(tmp_path / "x.safetensors", change))


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    whole = _saved(tmp_path / "whole.safetensors", lambda network: None).read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    text = tmp_path / "text.safetensors"
    text.write_text("no weights at all")
    for path in (cut, text):
        with pytest.raises(ModelError, match="not a readable safetensors file"):
            load_model(path)


def test_an_unknown_model_is_refused_with_those_that_ship():
    with pytest.raises(ModelError, match=r"'nobody' is neither a shipped model \(.*\) nor a file"):
        find_checkpoint("nobody")
    with pytest.raises(ModelError, match="the weights of cellvta-uni do not ship"):
        find_checkpoint("cellvta-uni")


def test_a_description_of_another_version_is_refused():
    text = SPECS["cellvta-nano"].to_json()
    assert ModelSpec.from_json(text) == SPECS["cellvta-nano"]
    with pytest.raises(ModelError, match="version 99"):
        ModelSpec.from_json(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(ModelError, match="cannot be read"):
        ModelSpec.from_json("[]")


def test_an_impossible_network_is_refused():
    with pytest.raises(ModelError, match="architecture 'resnet' is unknown"):
        build(replace(SPECS["cellvta-nano"], architecture="resnet"))
    for settings in (
        {"dim": 64, "depth": 5, "heads": 4, "stages": [[0, 0], [1, 1], [2, 2], [3, 3]]},
        {"backbone": "resnet50"},
        {"backbone": "no_such_vit"},
        {"backbone": "samvit_base_patch16", "tissue_classes": 19},
        {"variant": "unpublished"},
        {"backbone": "vit_large_patch16_dinov3", "backbone_settings": SMALL_BACKBONE, "variant": "published"},
        {"spare": 1},
    ):
        with pytest.raises(ModelError, match="its settings do not make a cellvta"):
            build(replace(SPECS["cellvta-nano"], settings=settings))


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("vit_small_patch16_224", {}),
        ("vit_giant_patch14_reg4_dinov2", {"img_size": 224}),
        ("vit_large_patch16_dinov3", {}),
        ("samvit_base_patch16", {"global_attn_indexes": [1, 3]}),
    ],
)
def test_an_encoder_gives_what_the_whole_vit_gives(backbone, settings):
    """All tokens through all blocks are timm's own forward pass."""
    torch.manual_seed(0)
    settings = {**settings, **SMALL_BACKBONE}
    encoder = make_encoder(backbone, settings).eval()
    torch.manual_seed(0)
    if not backbone.startswith("samvit"):
        settings["dynamic_img_size"] = True
    whole = timm.create_model(backbone, num_classes=0, **settings).eval()
    for key, value in encoder.state_dict().items():
        value.copy_(torch.randn_like(value) * 0.1)
        whole.state_dict()[key].copy_(value)
    image = torch.randn(2, 3, 64, 128)
    size = (4 * encoder.patch_px, 8 * encoder.patch_px)
    shown = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
    with torch.inference_mode():
        got = encoder.run(*encoder.tokens(image), (4, 8), 0, 3)[1]
        wanted = whole.forward_intermediates(shown, indices=1, intermediates_only=True)[0]
    torch.testing.assert_close(got, wanted.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
