"""Checkpoints of other projects: recognised, translated, loaded without running anything, or refused."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import timm
import torch
from safetensors.torch import save_file
from shrunk_models import SMALL_BACKBONE
from typer.testing import CliRunner

from wsipipe.cli import app
from wsipipe.errors import ModelError
from wsipipe.model.cellvta import CellVTA
from wsipipe.model.encoder import make_encoder
from wsipipe.model.registry import CONSEP_CLASSES, PANNUKE_CLASSES, SPECS, build
from wsipipe.model.upstream import cellvta_key, recognise
from wsipipe.model.weights import convert, load_encoder, load_model

PARITY = Path(__file__).parent / "data" / "parity"
PUBLISHED = json.loads((PARITY / "full_state_dict_shapes.json").read_text())
CONFIG = {
    "model.num_heads": 2,
    "data.num_nuclei_classes": 5,
    "data.num_tissue_classes": 3,
    "transformations.normalize.mean": [0.5, 0.5, 0.25],
    "transformations.normalize.std": [0.5, 0.25, 0.5],
    **{f"dataset_config.nuclei_types.{name.title()}": k for k, name in enumerate(CONSEP_CLASSES)},
}


def small_network() -> CellVTA:
    torch.manual_seed(0)
    network = CellVTA(
        classes=5,
        decoder_widths=(8, 8, 16, 16),
        dim=32,
        depth=4,
        heads=2,
        prior_width=8,
        attention_heads=2,
        tissue_classes=3,
    )
    return network.eval()


def as_published(network: CellVTA) -> dict[str, Any]:
    """A checkpoint as CellVTA's training writes it."""
    ours = network.state_dict()
    state = {key: ours[cellvta_key(key)] for key in PUBLISHED if cellvta_key(key) in ours}
    assert len(state) == len(ours)
    optimizer = torch.optim.AdamW(network.parameters())
    return {
        "arch": "CellViTUNIAdapter",
        "epoch": 79,
        "model_state_dict": state,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": {"gamma": 0.95, "last_epoch": 80},
        "best_metric": np.float64(0.668),
        "best_epoch": 79,
        "config": CONFIG,
        "wandb_id": "abc",
        "logdir": "/logs",
        "run_name": "run",
        "scaler_state_dict": None,
    }


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "split1.pth"
    torch.save(as_published(small_network()), path)
    return path


def test_a_checkpoint_as_cellvta_saves_it_gives_its_network(published):
    network, spec, digest = load_model(published)
    image = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        got, wanted = network(image), small_network()(image)
    assert got.keys() == {"nuclei", "offsets", "types", "tissue"}
    assert all(torch.equal(value, wanted[key]) for key, value in got.items())
    assert (spec.name, spec.architecture, spec.mpp) == ("split1", "cellvta", 0.25)
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.25), (0.5, 0.25, 0.5))
    assert spec.class_names == CONSEP_CLASSES
    assert len(set(spec.class_colours)) == 5
    assert len(digest) == 64


def test_segment_runs_with_a_published_checkpoint(published, tmp_path, make_svs):
    pixels = np.random.default_rng(0).integers(60, 255, (192, 192, 3), np.uint8)
    slide, out = make_svs(tmp_path / "small.svs", pixels, levels=1), tmp_path / "out"
    options = ["--out", str(out), "--no-tissue-mask", "--device", "cpu", "--precision", "fp32"]
    done = CliRunner().invoke(app, ["segment", str(slide), "--model", str(published), *options])
    assert done.exit_code == 0, done.output
    assert (out / "nuclei.parquet").is_file()


def test_a_converted_checkpoint_gives_the_same_network(published, tmp_path):
    out = tmp_path / "ours.safetensors"
    for expected in (0, 1):  # a file that is there is kept
        done = CliRunner().invoke(app, ["models", "convert", str(published), "--out", str(out)])
        assert done.exit_code == expected, done.output
    (ours, spec, _), (theirs, upstream, _) = load_model(out), load_model(published)
    assert spec == upstream
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_training_state_beside_the_weights_is_never_read_into_memory(tmp_path):
    content = as_published(small_network())
    content["optimizer_state_dict"] = {"state": {0: {"exp_avg": torch.zeros(50_000_000)}}}
    path = tmp_path / "big.pth"
    torch.save(content, path)
    del content
    load_model(path)  # so that what is loaded once is there
    before = psutil.Process().memory_info().rss
    loaded = load_model(path)
    grown = psutil.Process().memory_info().rss - before
    assert loaded[1].architecture == "cellvta"
    assert grown < 100e6  # the state has 200 MB


def test_inspect_says_what_a_file_is(published):
    shown = CliRunner().invoke(app, ["models", "inspect", str(published)])
    assert shown.exit_code == 0, shown.output
    for text in ("cellvta", "spindle-shaped", "0.25 µm/px", "epoch 79", "0.668"):
        assert text in shown.output


class _Harmful:
    """What a harmful file holds: opening it without care creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle", "newer pickle", "inside"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, way):
    target, path = tmp_path / "owned", tmp_path / "model.pth"
    if "pickle" in way:
        path.write_bytes(pickle.dumps({"model_state_dict": _Harmful(target)}, 2 if way == "pickle" else 4))
    elif way == "inside":
        torch.save({**as_published(small_network()), "best_metric": _Harmful(target)}, path)
    else:
        torch.save(_Harmful(target), path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(ModelError, match=r"asks for (posix|os|nt)\.system when it is opened|is damaged"):
        load_model(path)
    assert not target.exists()
    os.system(f"touch {target}")  # it would have
    assert target.exists()


def _change(content: dict[str, Any], change: str) -> None:
    state = content["model_state_dict"]
    if change == "missing":
        del state["encoder.level_embed"]
    elif change == "extra":
        state["encoder.spare"] = torch.zeros(1)
    elif change == "shape":
        state["encoder.level_embed"] = torch.zeros(2, 32)
    elif change == "nan":
        state["encoder.level_embed"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 tensors are missing \(encoder.level_embed\), 0 do not belong"),
        ("extra", r"0 tensors are missing .* 1 do not belong \(encoder.spare\)"),
        ("shape", r"encoder.level_embed has shape \(2, 32\), expected \(3, 32\)"),
        ("nan", "encoder.level_embed holds values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_saying_what_was_expected_and_found(tmp_path, change, message):
    content, path = as_published(small_network()), tmp_path / "x.pth"
    _change(content, change)
    torch.save(content, path)
    with pytest.raises(ModelError, match=message):
        load_model(path)
    with pytest.raises(ModelError, match=message):
        convert(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path, published):
    whole = published.read_bytes()
    path = tmp_path / "x.pth"
    for cut in (0, 10, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="is damaged, or not a file of weights"):
            load_model(path)
    path.write_text("no weights at all")
    with pytest.raises(ModelError, match="is damaged, or not a file of weights"):
        load_model(path)
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ModelError, match=r"its 1 tensors begin with fc\.weight; expected are those of CellVTA"):
        load_model(path)
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="holds a list, expected tensors by name"):
        load_model(path)
    torch.save({"model": timm.create_model("vit_small_patch16_224", **SMALL_BACKBONE).state_dict()}, path)
    with pytest.raises(ModelError, match="an encoder alone"):
        load_model(path)


def sam_shapes(dim: int, depth: int, global_blocks: list[int], prefix: str) -> dict[str, tuple[int, ...]]:
    """Tensors of SAM's image encoder under the names that SAM's own code gives them."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 64, 64, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "neck.0.weight": (256, dim, 1, 1),
        "neck.1.weight": (256,),
        "neck.1.bias": (256,),
        "neck.2.weight": (256, 256, 3, 3),
        "neck.3.weight": (256,),
        "neck.3.bias": (256,),
    }
    head = dim // {768: 12, 1024: 16, 1280: 16, 64: 4}[dim]
    for n in range(depth):
        reach = 127 if n in global_blocks else 27
        block = {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.rel_pos_h": (reach, head),
            "attn.rel_pos_w": (reach, head),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            "mlp.lin1.weight": (4 * dim, dim),
            "mlp.lin1.bias": (4 * dim,),
            "mlp.lin2.weight": (dim, 4 * dim),
            "mlp.lin2.bias": (dim,),
        }
        shapes |= {f"blocks.{n}.{key}": shape for key, shape in block.items()}
    return {prefix + key: shape for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("cellvit-256", None),
        ("cellvit-uni", None),
        ("cellvit-sam-b", (768, 12, [2, 5, 8, 11])),
        ("cellvit-sam-l", (1024, 24, [5, 11, 17, 23])),
        ("cellvit-sam-h", (1280, 32, [7, 15, 23, 31])),
    ],
)
def test_cellvit_files_are_recognised_by_names_and_shapes(name, encoder):
    """On tensors without memory. The decoder's names are those of the reference files."""
    with torch.device("meta"):
        network = build(SPECS[name])
        ours = network.state_dict()
        kind = "cellvituni" if name == "cellvit-uni" else "cellvit"
        theirs = list(json.loads((PARITY / f"model_{kind}_meta.json").read_text())["state_dict_shapes"])
        if encoder is not None:
            theirs = [key for key in theirs if not key.startswith("encoder.")]
            shapes = sam_shapes(*encoder, "encoder.") | {
                "classifier_head.weight": (19, 256),
                "classifier_head.bias": (19,),
            }
            state = {key: torch.empty(shape) for key, shape in shapes.items()}
        else:
            depth = 12 if name == "cellvit-256" else 24
            first = [key for key in theirs if ".blocks.0." in key]
            theirs += [key.replace(".0.", f".{n}.", 1) for key in first for n in range(4, depth)]
            state = {}
        state |= {key: torch.empty(ours[cellvta_key(key)].shape) for key in theirs}
        spec, weights = recognise({"arch": "CellViT", "model_state_dict": state, "config": {}}, name)
        found = build(spec)
    assert replace(spec, settings={}) == replace(SPECS[name], settings={})
    assert found.encoder.taps == network.encoder.taps
    assert repr(found) == repr(network)
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in ours.items()}


def test_the_published_names_and_shapes_are_recognised_as_the_registered_model():
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in PUBLISHED.items()}
    spec, _ = recognise({"model_state_dict": state, "config": {"data": {"magnification": 40}}}, "cellvta-uni")
    with torch.device("meta"):
        ours, theirs = build(SPECS["cellvta-uni"]), build(spec)
    assert spec.class_names == PANNUKE_CLASSES
    assert spec.mpp == 0.25
    assert repr(ours) == repr(theirs)
    assert ours.encoder.stages == theirs.encoder.stages


def test_encoder_files_of_uni_sam_and_timm_start_a_network(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("vit_small_patch16_224", init_values=1e-5, **SMALL_BACKBONE)
    uni, sam, saved = (tmp_path / name for name in ("pytorch_model.bin", "sam.pth", "model.safetensors"))
    torch.save(plain.state_dict(), uni)
    save_file(plain.state_dict(), saved)
    for path in (uni, saved):
        encoder = make_encoder(dim=64, depth=4, heads=4)
        load_encoder(encoder, path)
        assert torch.equal(encoder.blocks[3].mlp.fc2.weight, plain.blocks[3].mlp.fc2.weight)
    shapes = sam_shapes(64, 4, [1, 3], "image_encoder.")
    torch.save({"mask_decoder.weight": torch.zeros(1), **{k: torch.randn(s) for k, s in shapes.items()}}, sam)
    encoder = make_encoder("samvit_base_patch16", {**SMALL_BACKBONE, "global_attn_indexes": [1, 3]})
    load_encoder(encoder, sam)
    wanted = torch.load(sam, weights_only=True)["image_encoder.blocks.2.mlp.lin1.weight"]
    assert torch.equal(encoder.blocks[2].mlp.fc1.weight, wanted)
    with pytest.raises(ModelError, match="tensors are missing"):
        load_encoder(encoder, uni)


def test_positions_of_an_encoder_of_another_grid_are_resampled(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "dino.safetensors"
    settings = {**SMALL_BACKBONE, "img_size": 112}
    save_file(timm.create_model("vit_small_patch14_reg4_dinov2", **settings).state_dict(), path)
    encoder = make_encoder("vit_small_patch14_reg4_dinov2", {**SMALL_BACKBONE, "img_size": 224})
    load_encoder(encoder, path)
    assert encoder.pos_embed.shape == (1, 256, 64)


def test_an_encoder_that_cannot_be_had_says_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="give its path"):
        load_encoder(make_encoder(dim=64, depth=4, heads=4), "no_such_network.anywhere")
