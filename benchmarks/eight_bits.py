"""What it costs to store maps in 8 bits: PQ on real tissue, against the same algorithm in floating point throughout.

    python benchmarks/eight_bits.py [--images 12] [--sets FOLDER] [--model NAME|PATH]

The network's maps of images of CoNSeP (test) and TNBC are labelled three times and scored against the truth: as they
come, with the filter, the levels and scikit-image's watershed in floating point; rounded to 8 bits, as they are stored,
by the same algorithm; and as the package labels these (whole-number filter, levels of 8 bits). `--sets` holds `consep`
and `tnbc_naylor`; by default a folder `shared/data` beside the project, and without it nothing is measured. The last
line is JSON: mean PQ of the three, `loss` of 8-bit maps against maps in floats, and `loss_in_all` of the package's way.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from skimage.segmentation import watershed

from wsipipe.config import NucleiConfig
from wsipipe.instances import OPENING, label_nuclei
from wsipipe.maps import Maps, to_input, to_maps
from wsipipe.metrics import panoptic_quality
from wsipipe.model.weights import DEFAULT_MODEL, load_model
from wsipipe.runs import fill_small_holes, label_regions

SIDE = 512
SETS = (("consep", "test_*.png", 0.275), ("tnbc_naylor", "*.png", 0.25))
CONFIG = NucleiConfig()
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int32]


def label_in_floats(nuclei: Floats, offsets: Floats, mpp: float) -> Labels:
    """`label_nuclei` with nothing rounded."""
    mask = (nuclei >= CONFIG.np_threshold).astype(np.uint8)
    widest = round(CONFIG.max_hole_um / mpp)
    fill_small_holes(mask, widest)
    size = 2 * round((CONFIG.hv_kernel_um / mpp - 1) / 2) + 1
    derive, smooth = (kernel.ravel() for kernel in cv2.getDerivKernels(1, 0, size, ktype=cv2.CV_64F))
    unit = float((derive * (np.arange(size) - size // 2)).sum() * smooth.sum()) * mpp  # of a slope of 1/µm
    along_x = cv2.sepFilter2D(offsets[0], cv2.CV_64F, derive, smooth, borderType=cv2.BORDER_REPLICATE)
    along_y = cv2.sepFilter2D(offsets[1], cv2.CV_64F, smooth, derive, borderType=cv2.BORDER_REPLICATE)
    assert isinstance(CONFIG.hv_scale, tuple)
    lowest, highest = CONFIG.hv_scale
    flat = np.clip((np.minimum(along_x, along_y) / unit - lowest) / (highest - lowest), 0, 1) * mask
    markers = ((flat > 1 - CONFIG.marker_threshold) & (mask > 0)).astype(np.uint8)
    fill_small_holes(markers, widest)
    markers = np.asarray(cv2.morphologyEx(markers, cv2.MORPH_OPEN, OPENING), np.uint8)
    seeds = np.zeros(mask.shape, np.int32)
    label_regions(markers, seeds)
    labels: Labels = watershed(-cv2.GaussianBlur(flat, (3, 3), 0), seeds, mask=mask > 0).astype(np.int32)
    return labels


def images(sets: Path, count: int, mpp: float) -> Iterator[tuple[str, npt.NDArray[np.uint8], Labels]]:
    """Upper left corners of images, brought to `mpp`, and their true nuclei; of each set at most `count`."""
    for name, pattern, own in SETS:
        for file in sorted((sets / name / "masks").glob(pattern))[:count]:
            picture = next((sets / name / "images").glob(f"{file.stem}.*"))
            part = np.s_[: round(SIDE * mpp / own), : round(SIDE * mpp / own)]
            rgb = cv2.cvtColor(cv2.imread(str(picture), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)[part]
            true = cv2.imread(str(file), cv2.IMREAD_UNCHANGED).astype(np.int32)[part]
            yield (
                name,
                cv2.resize(rgb, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR),
                cv2.resize(true.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST).astype(np.int32),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12, help="of each set")
    parser.add_argument("--sets", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    arguments = parser.parse_args()
    network, spec, _ = load_model(arguments.model)
    scores: dict[str, list[tuple[float, float, float]]] = {}
    for name, rgb, true in images(arguments.sets, arguments.images, spec.mpp):
        batch = torch.from_numpy(rgb)[None]
        with torch.inference_mode():
            outputs = network(to_input(batch, spec.mean, spec.std, device=torch.device("cpu"), dtype=torch.float32))
        stored = to_maps(outputs, 0)
        maps = Maps(stored.nuclei[0].numpy(), stored.offsets[0].numpy(), stored.types[0].numpy())
        nuclei = outputs["nuclei"].softmax(1)[0, 1].numpy().astype(np.float64)
        offsets = outputs["offsets"].clamp(-1, 1)[0].numpy().astype(np.float64)
        ways = (
            label_in_floats(nuclei, offsets, spec.mpp),
            label_in_floats(maps.nuclei / 255, maps.offsets / 127, spec.mpp),
            label_nuclei(maps, spec.mpp, CONFIG),
        )
        floats, maps_only, ours = (panoptic_quality(true, labels).pq for labels in ways)
        scores.setdefault(name, []).append((floats, maps_only, ours))
    if not scores:
        print(f"{arguments.sets} holds no images: nothing is measured")
        print(json.dumps({"images": 0}))
        return
    summary = {}
    scores["all"] = [row for of_set in scores.values() for row in of_set]
    for name, rows in scores.items():
        table = np.array(rows)
        floats, maps_only, ours = table.mean(0)
        error = (table[:, :1] - table[:, 1:]).std(0) / np.sqrt(len(rows))
        print(
            f"{name:12}{len(rows):3} images: PQ {floats:.4f} in floats; {maps_only:.4f} from 8-bit maps, loss "
            f"{floats - maps_only:+.4f} (standard error {error[0]:.4f}); {ours:.4f} by the package, loss "
            f"{floats - ours:+.4f} ({error[1]:.4f})"
        )
        summary = {"images": len(rows), "pq_floats": floats, "pq_8_bit_maps": maps_only, "pq_package": ours}
        summary |= {"loss": floats - maps_only, "loss_in_all": floats - ours}
    print(json.dumps({key: value if key == "images" else round(float(value), 4) for key, value in summary.items()}))


if __name__ == "__main__":
    main()
