"""docs/tour.md: its snippets run, they print what the page says, and the functions that it names exist."""

import importlib
import re

import pytest
from PIL import Image

import tour

FLOAT = re.compile(r"\d+\.\d+")


@pytest.fixture(scope="module")
def run():
    return tour.run_snippets()


def test_snippets_print_what_the_page_says(run):
    _, printed = run
    promised = [text for _, text in tour.snippets()]
    assert len(promised) == tour.PAGE.read_text().count("```python") == len(printed) > 5
    for said, output in zip(promised, printed):
        assert FLOAT.sub("#", output) == FLOAT.sub("#", said)              # shapes and words, to the letter
        values, expected = (list(map(float, FLOAT.findall(text))) for text in (output, said))
        assert values == pytest.approx(expected, abs=0.02)


def test_pictures_are_there_and_small():
    named = re.findall(r"\]\((tour/.*?\.png)\)", tour.PAGE.read_text())
    assert named == [f"tour/{name}.png" for name in tour.PICTURES]
    for name in named:
        file = tour.PAGE.parent / name
        assert file.stat().st_size < 60_000
        Image.open(file).verify()


def test_hops_exist_and_are_few():
    hops = re.findall(r"^\| `(\w+)\.(\w+)` \|", tour.PAGE.read_text(), re.MULTILINE)
    assert 5 <= len(hops) <= 12
    for module, name in hops:
        assert hasattr(importlib.import_module(module), name), f"docs/tour.md names {module}.{name}"
