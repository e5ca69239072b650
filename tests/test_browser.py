"""The pages as a browser shows them: nothing to complain of, nothing fetched, and something to see."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import report

from wsipipe.summary import SlideSummary, as_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed"),
    pytest.mark.timeout(600),  # a busy machine is no fault of the code
]
WIDTH, HEIGHT = 1400, 3000
BROWSERS_OWN = "not an origin"  # who asks for updates and the like, as the log of the network says
# A page alone: no updates, no reports, no services of the browser's maker.
QUIET = (
    "--headless", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-default-apps", "--disable-extensions", "--disable-sync",
    "--no-default-browser-check", "--no-first-run", "--no-pings", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What came of a page: the console's lines, what was asked for besides the page and data in it, the pixels."""

    console: list[str]
    fetched: set[str]
    pixels: np.ndarray

    @property
    def drawn(self) -> np.ndarray:
        """(H, W) bool, where something stands on the page."""
        return (self.pixels != self.pixels[0, 0]).any(axis=2)


def seen(page: str, folder: Path) -> Seen:
    file, net, picture = folder / "page.html", folder / "net.json", folder / "page.png"
    file.write_text(page, encoding="utf-8")
    command = [
        str(BROWSER), *QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else []), "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={folder / 'profile'}", f"--log-net-log={net}", f"--window-size={WIDTH},{HEIGHT}",
        f"--screenshot={picture}", file.as_uri(),
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)
    assert picture.exists(), said.stderr
    told = [event.get("params", {}) for event in json.loads(net.read_text(errors="replace"))["events"]]
    return Seen(
        console=[line for line in said.stderr.splitlines() if ":CONSOLE" in line],
        fetched={one["url"] for one in told if one.get("initiator", BROWSERS_OWN) != BROWSERS_OWN},
        pixels=np.asarray(Image.open(picture).convert("RGB")),
    )


def test_a_fault_and_a_fetch_of_a_page_are_seen(tmp_path):
    """Or else the other tests here would pass whatever the pages do."""
    page = '<script>console.error("a fault")</script><img src="http://127.0.0.1:9/pixel.png">'
    found = seen(f"<!doctype html><title>t</title>{page}", tmp_path)
    assert any("a fault" in line for line in found.console)
    assert "http://127.0.0.1:9/pixel.png" in found.fetched
    assert found.drawn.mean() < 0.001


@pytest.mark.parametrize("name", ["report", "summary"])
def test_a_page_needs_nothing_and_shows_something(name, tmp_path):
    slides = [
        SlideSummary("a", "first", "done", tissue_mm2=2.0, nuclei={"round": 30, "long": 10}, seconds={"maps": 12.0}),
        SlideSummary("b", "second", "failed", "maps", "the disk is full; make room"),
    ]
    found = seen(report() if name == "report" else as_page(slides), tmp_path)
    assert found.console == []
    assert found.fetched == set()
    assert found.pixels.shape == (HEIGHT, WIDTH, 3)
    assert found.drawn[:400].mean() > 0.01  # text
    assert found.drawn.mean() > (0.3 if name == "report" else 0)  # pictures
