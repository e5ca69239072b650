"""Files of weights for the fuzz harness: whole ones, and how a harmed one is read."""

import io
import json
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

from fuzz_harm import NUMBERS, Payload, Seeds, any_json, changed, harmed
from fuzz_slides import written

TINY_SETTINGS = {
    "dim": 16, "depth": 4, "heads": 2, "stages": [[0, 0], [1, 1], [2, 2], [3, 3]], "prior_width": 4,
    "attention_heads": 2, "extra_extractors": 0, "decoder_widths": [2, 2, 2, 2], "layer_scale": None,
}  # fmt: skip


def checkpoint_seeds() -> Seeds:
    from dataclasses import replace

    import torch

    from wsipipe.model.registry import SPECS, build
    from wsipipe.model.weights import save_checkpoint

    spec = replace(SPECS["cellvta-nano"], name="tiny", settings=TINY_SETTINGS)
    torch.manual_seed(0)
    whole = written(lambda path: save_checkpoint(path, build(spec), spec), ".safetensors")
    saved = written(lambda path: torch.save({"a": torch.zeros(3), "b": [1, 2]}, path), ".pth")
    old = written(lambda path: torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False), ".pth")
    evil = written(lambda path: torch.save({"model": Payload()}, path), ".pth")
    return {"whole": whole, "saved": saved, "old": old, "evil": evil, "pickle": pickle.dumps(Payload())}


def _archive_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    return out.getvalue()


def checkpoint_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    from wsipipe.model.weights import inspect, load_model, read_spec

    path = folder / rng.choice(("x.safetensors", "x.pth", "x.tar"))
    kind = rng.random()
    whole = seeds["whole"]
    size = int.from_bytes(whole[:8], "little")
    if kind < 0.55:  # a header that lies
        header = json.loads(whole[8 : 8 + size])
        if rng.random() < 0.7:
            spec = json.loads(header["__metadata__"]["wsipipe_spec"])
            spec = changed(spec, rng)
            if isinstance(spec, dict) and rng.random() < 0.4:
                spec["settings"] = changed(TINY_SETTINGS, rng)
            header["__metadata__"]["wsipipe_spec"] = json.dumps(spec)
        else:
            header = changed(header, rng)
        text = json.dumps(header).encode()
        length = rng.choice((len(text), len(text), len(text), *NUMBERS))
        content = length.to_bytes(8, "little") + text + whole[8 + size :]
    elif kind < 0.65:
        content = harmed(whole[: 8 + size], rng) + whole[8 + size :]
    elif kind < 0.67:
        content = _archive_bomb()
    else:
        name = rng.choice(sorted(seeds.keys() - {"whole"}))
        content = harmed(seeds[name], rng, (seeds["evil"],)) if rng.random() < 0.8 else seeds[name]
    path.write_bytes(content)
    if rng.random() < 0.1:
        return inspect(path)
    return read_spec(path).name if rng.random() < 0.3 else load_model(path)[2]


def upstream_seeds() -> Seeds:
    import torch
    from test_upstream import as_published, small_network

    return {"published": written(lambda path: torch.save(as_published(small_network()), path), ".pth")}


def upstream_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    """Another project's checkpoint with tensors and settings that are not as they should be."""
    import torch

    from wsipipe.model.weights import load_model

    path = folder / "x.pth"
    if rng.random() < 0.2:
        path.write_bytes(harmed(seeds["published"], rng))
        return load_model(path)[2]
    content = torch.load(io.BytesIO(seeds["published"]), weights_only=False)
    del content["optimizer_state_dict"]
    state = content["model_state_dict"]
    for _ in range(rng.choice((1, 1, 2))):
        what = rng.randrange(4)
        if what == 0:
            content["config"] = changed(content["config"], rng)
        elif what == 1:
            content = {**content, rng.choice(list(content)): any_json(rng)}
        else:
            _change_tensor(state, rng)
    if rng.random() < 0.3:
        content = rng.choice((state, {"desc": state}, {"state_dict": content}, {"module": state}))
    torch.save(content, path)
    return load_model(path)[2]


def encoder_seeds() -> Seeds:
    import torch
    from safetensors.torch import save

    from wsipipe.model.encoder import make_encoder

    torch.manual_seed(0)
    state = make_encoder(**SMALL_ENCODER).state_dict()
    return {"timm": save(state), "uni": written(lambda path: torch.save(dict(state), path), ".bin")}


SMALL_ENCODER: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2}


def encoder_case(seeds: Seeds, rng: random.Random, folder: Path) -> object:
    """A pretrained encoder to start a training with."""
    import torch
    from safetensors.torch import load, save_file

    from wsipipe.model.encoder import make_encoder
    from wsipipe.model.weights import load_encoder

    kind = rng.random()
    path = folder / rng.choice(("x.safetensors", "x.bin", "x.pth"))
    if kind < 0.5:
        path.write_bytes(harmed(seeds[rng.choice(sorted(seeds))], rng))
    else:
        state: dict[str, Any] = load(seeds["timm"])
        _change_tensor(state, rng, "pos_embed" if rng.random() < 0.5 else None)
        prefix = rng.choice(("", "", "module.", "encoder.vit.", "image_encoder."))
        state = {prefix + key: value for key, value in state.items()}
        if kind < 0.75 and all(isinstance(value, torch.Tensor) for value in state.values()):
            save_file({key: value for key, value in state.items() if value.is_contiguous()}, path)
        else:
            torch.save(state if rng.random() < 0.5 else {rng.choice(("teacher", "model", "other")): state}, path)
    encoder = make_encoder(**SMALL_ENCODER)
    load_encoder(encoder, path)
    return float(encoder.state_dict()["pos_embed"].sum())


def _change_tensor(state: dict[str, Any], rng: random.Random, name: str | None = None) -> None:
    """Give one tensor another shape, kind, value or name, or none."""
    import torch

    key = rng.choice(list(state)) if name is None else name
    value = state[key]
    match rng.randrange(8):
        case 0:
            del state[key]
        case 1:
            state[key] = torch.full(value.shape, rng.choice((float("nan"), float("inf"))))
        case 2:
            state[key] = torch.zeros([rng.choice((0, 1, 2, 3, 7, 64)) for _ in range(rng.randrange(6))])
        case 3:
            state[key] = torch.zeros(
                value.shape, dtype=rng.choice((torch.bool, torch.int8, torch.int64, torch.bfloat16))
            )
        case 4:
            state[key] = torch.zeros(value.shape, dtype=torch.complex64)
        case 5:
            state[rng.choice((key + ".", "module." + key, "", key.replace("0", "99999999"), "blocks.-1"))] = state.pop(
                key
            )
        case 6:
            state[key] = torch.zeros(1).expand([rng.choice((1, 1 << 20, 1 << 33))])  # one number of many places
        case _:
            state[key] = value.reshape(1, *value.shape)
