"""Real data for the tests: the folder named by POSE_DATA, with lspet/, mpii_sample/, mpii_annot/ and
official_keys.json.

Tests that need it skip where the variable is unset; nothing of it is part of the repository.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

# A shell ignores SIGINT in what it starts before &, and so would every process that a test starts and
# interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
from common import separate_compiler_cache  # noqa: E402, the path comes first

separate_compiler_cache()


def pytest_collection_modifyitems(items):
    if not os.environ.get("LONG_TESTS"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="LONG_TESTS=1 runs it"))


@pytest.fixture
def mini(monkeypatch):
    """A preset beside 'tiny' and 'paper', for tests of what is around a network: milliseconds a step."""
    from models import PRESETS, Preset
    from train import RECIPES

    sizes = dict(size=32, dim=16, depth=2, heads=2, teacher_width=4, simcc_sigma=2, grid=4)
    monkeypatch.setitem(PRESETS, "mini", Preset(heatmap=16, **sizes))
    monkeypatch.setitem(RECIPES, "mini", dict(RECIPES["tiny"], batch_size=8))


@pytest.fixture(scope="session")
def real_data():
    folder = os.environ.get("POSE_DATA")
    if not folder:
        pytest.skip("POSE_DATA is not set: it names a folder with real photos and labels (docs/faq.md)")
    return Path(folder).resolve()
