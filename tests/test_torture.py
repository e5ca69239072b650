"""The short form of the kill harness."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
HARNESS = Path(__file__).with_name("torture.py")


def tortured(*options: str) -> dict[str, dict[str, int]]:
    done = subprocess.run(
        [sys.executable, str(HARNESS), *options], capture_output=True, text=True, check=False, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return summary


def test_segment_killed_at_five_moments_goes_on_to_the_same_bytes():
    (figures,) = tortured("--kills", "5", "--stages", "segment").values()
    assert figures["identical"] == figures["kills"] == 7  # SIGTERM and Ctrl-C once each
    assert figures["tiles_twice"] < 60  # of 120: it did not begin anew


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tissue", "maps", "nuclei", "export"])
def test_a_stage_killed_at_five_moments_goes_on_to_the_same_bytes(stage):
    (figures,) = tortured("--kills", "5", "--stages", stage).values()
    assert figures["identical"] == figures["kills"]
