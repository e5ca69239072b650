"""Memory of one process that segments many slides one after another: it must not grow with their number.

Usage: python benchmarks/steady.py [--slides 30] [--side 256] [--model NAME|PATH]

The slides are small pieces of the demonstration tissue, each of another size. The last line is JSON: `rss_mb` after the
first, the fifth and the last slide, and what a slide after the fifth added on average, `growth_mb_a_slide`.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path

import psutil

from wsipipe.config import Config
from wsipipe.demo import make_demo_slide
from wsipipe.folder import ResultFolder
from wsipipe.model.weights import DEFAULT_MODEL, load_model
from wsipipe.slide import open_slide
from wsipipe.stages.segment import segment

SETTLED = 5  # slides after which everything was used once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=30)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    arguments = parser.parse_args()
    if arguments.slides <= SETTLED:
        parser.error(f"growth is measured from slide {SETTLED} on; give more --slides")
    model, rss_mb = load_model(arguments.model), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.slides):
            path = make_demo_slide(Path(folder) / f"{number}.svs", arguments.side + 16 * (number % 4))
            with open_slide(path) as slide:
                segment(slide, model, ResultFolder(Path(folder) / path.stem), Config())
            gc.collect()
            rss_mb.append(psutil.Process().memory_info().rss / 2**20)
            print(f"{number + 1:>3} slides: {rss_mb[-1]:.0f} MB", flush=True)
    growth = (rss_mb[-1] - rss_mb[SETTLED - 1]) / max(1, len(rss_mb) - SETTLED)
    told = {str(n): round(rss_mb[n - 1], 1) for n in (1, SETTLED, len(rss_mb))}
    print(json.dumps({"rss_mb": told, "growth_mb_a_slide": round(growth, 2)}))


if __name__ == "__main__":
    main()
