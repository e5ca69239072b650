"""The network prepared for inference against the plain graph: time, multiply-adds, memory, difference, nuclei.

    python benchmarks/forward.py                                     the full-size model, some minutes
    python benchmarks/forward.py --models cellvta-nano --px 512 1024 --batch 2 --repeats 10

The plain graph computes the skip features anew for each of the three branches, as the published code does. All run in
turn on the same images and weights; ratios are of CPU seconds, which other work on the machine changes less than time.
Nuclei are compared with the default model on real tissue: the panoptic quality of what the prepared network finds, in
float32 and in bfloat16, taking for true what the plain graph finds in float32. The last line is JSON.
"""

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wsipipe.config import NucleiConfig
from wsipipe.demo import draw_tissue
from wsipipe.instances import label_nuclei
from wsipipe.maps import Maps, to_input, to_maps
from wsipipe.metrics import panoptic_quality
from wsipipe.model.cellvta import to_cells, to_pixels
from wsipipe.model.inference import prepare_for_inference
from wsipipe.model.registry import SPECS, build
from wsipipe.model.spec import ModelSpec
from wsipipe.model.weights import DEFAULT_MODEL, load_model

TISSUE = Path(__file__).parents[2] / "shared" / "data" / "tnbc_naylor" / "images"  # else the tissue of the demo
IMAGES = 4
GIB = 2**30
GRAPHS = [name for name, spec in SPECS.items() if spec.architecture in ("cellvta", "cellvit")]
Forward = Callable[[Tensor], dict[str, Tensor]]


class Plain(nn.Module):
    """The graph as published: every branch computes the skip features for itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = network.encoder
        self.decoder: Any = network.decoder
        self.cell_px = getattr(network, "cell_px", 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        cells = to_cells(image, self.cell_px)
        features, _ = self.encoder(cells)
        branches = self.decoder.branches.items()
        maps = {name: branch(self.decoder.skips(cells, features), features[3]) for name, branch in branches}
        return to_pixels(maps, self.cell_px)


def make_network(spec: ModelSpec) -> nn.Module:
    """Random weights, with norms that do something."""
    torch.manual_seed(0)
    network = build(spec).eval()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3)  # type: ignore[union-attr, operator]
                part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
    return network


def multiply_adds(forward: Forward, image: Tensor) -> float:
    """In billions; of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        forward(image)
    return counter.get_total_flops() / 2e9


def extra_memory(forward: Forward, image: Tensor) -> float:
    """GiB that a forward pass takes at its peak."""
    gc.collect()
    process, done = psutil.Process(), threading.Event()
    peak = before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with torch.inference_mode():
        forward(image)
    done.set()
    watcher.join()
    return (peak - before) / GIB


def measure(name: str, px: int, batch: int, repeats: int) -> dict[str, float]:
    network = make_network(SPECS[name])
    image = torch.rand(batch, 3, px, px).mul_(2).sub_(1).to(memory_format=torch.channels_last)
    ways: dict[str, tuple[nn.Module, Tensor]] = {"plain fp32": (Plain(network), image.contiguous())}
    ways["prepared fp32"] = (prepare_for_inference(network), image)
    ways["prepared bf16"] = (prepare_for_inference(network, dtype=torch.bfloat16), image.bfloat16())
    gmacs = {way: multiply_adds(forward, shown) for way, (forward, shown) in ways.items()}
    memory = {way: extra_memory(forward, shown) for way, (forward, shown) in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    outputs: dict[str, dict[str, Tensor]] = {}
    with torch.inference_mode():
        for _ in range(repeats):
            for way, (forward, shown) in ways.items():
                started = time.process_time()
                outputs[way] = forward(shown)
                seconds[way].append(time.process_time() - started)
    plain = statistics.median(seconds["plain fp32"])
    print(f"\n{name}, {batch} x {px} px, {torch.get_num_threads()} threads")
    for way in ways:
        taken = statistics.median(seconds[way])
        differences = [
            (outputs[way][key].float() - value).abs().max().item() for key, value in outputs["plain fp32"].items()
        ]
        print(
            f"  {way:14} {taken:8.3f} CPU s ({min(seconds[way]):.3f} to {max(seconds[way]):.3f}), "
            f"ratio {taken / plain:.3f}, "
            f"{gmacs[way]:8.1f} billion multiply-adds, {memory[way]:6.2f} GiB more at the peak, "
            f"largest difference {max(differences):.2g}"
        )
    largest = max(value.abs().max().item() for value in outputs["plain fp32"].values())
    print(f"  outputs reach {largest:.2f}")
    return {
        "fp32_ratio": statistics.median(seconds["prepared fp32"]) / plain,
        "bf16_ratio": statistics.median(seconds["prepared bf16"]) / plain,
        "max_abs_diff": max(
            (outputs["prepared fp32"][key] - value).abs().max().item() for key, value in outputs["plain fp32"].items()
        ),
        "gmac_ratio": gmacs["prepared fp32"] / gmacs["plain fp32"],
    }


def tissue() -> list[npt.NDArray[np.uint8]]:
    """Real tissue at 0.25 µm/px, 512 px a side."""
    paths = sorted(TISSUE.glob("*.png"))[:IMAGES] if TISSUE.is_dir() else []
    if paths:
        return [cv2.imread(str(path), cv2.IMREAD_COLOR)[:512, :512, ::-1].copy() for path in paths]
    drawn = draw_tissue(1024)
    return [cv2.resize(drawn[y : y + 256, 384:640], (512, 512), interpolation=cv2.INTER_CUBIC) for y in (256, 512)]


def nuclei_agreement() -> dict[str, float]:
    """Panoptic quality of what the prepared default model finds, against the plain graph, mean over images."""
    network, spec, _ = load_model(DEFAULT_MODEL)
    ways = {
        "plain": (Plain(network), torch.float32),
        "fp32": (prepare_for_inference(network), torch.float32),
        "bf16": (prepare_for_inference(network, dtype=torch.bfloat16), torch.bfloat16),
    }
    quality: dict[str, list[float]] = {"fp32": [], "bf16": []}
    count = 0
    for picture in tissue():
        found = {}
        for way, (forward, dtype) in ways.items():
            pixels = to_input(
                torch.from_numpy(picture)[None], spec.mean, spec.std, device=torch.device("cpu"), dtype=dtype
            )
            with torch.inference_mode():
                maps = to_maps(forward(pixels), 0)
            stored = Maps(*(values[0].numpy() for values in maps[:3]))
            found[way] = label_nuclei(stored, spec.mpp, NucleiConfig())
        count += int(found["plain"].max())
        for way, values in quality.items():
            values.append(panoptic_quality(found["plain"], found[way]).pq)
    print(f"\n{count} nuclei found by {spec.name} on real tissue; panoptic quality against the plain graph:")
    for way, values in quality.items():
        print(f"  {way}: mean {np.mean(values):.4f}, least {min(values):.4f}")
    return {f"{way}_nuclei_pq": float(np.mean(values)) for way, values in quality.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["cellvta-uni"], choices=GRAPHS)
    parser.add_argument("--px", nargs="+", type=int, default=[256])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    agreement = nuclei_agreement()
    results = {}
    for name in arguments.models:
        for px in arguments.px:
            results[f"{name} {px}"] = measure(name, px, arguments.batch, arguments.repeats)
    first = next(iter(results.values()))
    more = {"others": results} if len(results) > 1 else {}
    print(json.dumps({**{key: float(f"{value:.4g}") for key, value in {**first, **agreement}.items()}, **more}))


if __name__ == "__main__":
    main()
