"""Every run of the paper's tables at its full size, for some steps on a few drawn people: does each command
work to its end?

    LONG_TESTS=1 python -m pytest tests/test_paper_size.py          # 33 runs of 256 x 256 networks: 18
    minutes on two cores
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from costs import PAPER
from synthetic import draw_people

ROOT = Path(__file__).resolve().parents[1]
PEOPLE = 4
TEACHER_EPOCHS = 20          # of one step


def write_folder(folder):
    """Drawn people in MPII's layout, the same to learn from and to be scored on.

    One more, to learn from, is far out of his box: nobody learns from him, but the mean pose moves away, and
    a teacher of 20 steps is still better than that, or no student would be allowed to learn from it.
    """
    (folder / "images").mkdir(parents=True), (folder / "annot").mkdir()
    drawn = draw_people(PEOPLE, 5, 256, workers=1)
    entries = []
    for n, (picture, joints, visible, center, scale, _) in enumerate(zip(*drawn)):
        Image.fromarray(picture).save(folder / f"images/{n}.png")
        entries.append(dict(image=f"{n}.png", joints=(joints + 1).tolist(), center=(center + 1).tolist(),
                            joints_vis=visible.astype(int).tolist(), scale=float(scale)))
    astray = dict(entries[0], center=[entries[0]["center"][0] + 10_000, entries[0]["center"][1]])
    (folder / "annot/train.json").write_text(json.dumps([*entries, astray]))
    (folder / "annot/valid.json").write_text(json.dumps(entries))


def run(script, *arguments, cwd):
    done = subprocess.run([sys.executable, script, *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.mark.long
def test_every_row_of_the_paper(tmp_path):
    clone = tmp_path / "clone"                   # sweep.py writes into its own repository
    clone.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, clone)
    shutil.copytree(ROOT / "studies", clone / "studies")
    write_folder(tmp_path / "dry")
    recipe = (clone / "train.py").read_text()    # little augmentation, for so few steps
    assert recipe.count('photos="tokenpose"') == 1
    (clone / "train.py").write_text(recipe.replace('photos="tokenpose"', 'photos="upright"'))
    flags = "--batch-size", PEOPLE
    run(clone / "train.py", "--data", "dry", "--preset", "paper", "--amp", "--train-teacher", *flags,
        "--epochs", TEACHER_EPOCHS, cwd=tmp_path)
    made = tmp_path / "runs/teacher-paper-dry/result.json"        # taken as done, as of the sweep's epochs
    result = json.loads(made.read_text())
    made.write_text(json.dumps({**result, "arguments": {**result["arguments"], "epochs": 2}}))
    said = run(clone / "studies/paper.py", "--data", "dry", "--", *flags, "--epochs", 2, cwd=tmp_path)
    results = json.loads((clone / "results/dry.json").read_text())
    names = {f"dry-{'-'.join(row[:3])}-{side}" for row in PAPER for side in ("alone", "distilled")}
    assert set(results) == names | {"dry-teacher"} and "next: python studies/tables.py" in said
    for name, result in results.items():
        assert result["log"]["epoch"][-1] >= 2 and result["log"]["pckh@0.5"][-1] >= 0, name
        assert result["arguments"]["preset"] == "paper" and set(result["flip_test"]) == set(result["scores"])
        print(f"{name}: loss {result['log']['loss'][-1]:.3g}, {result['images_per_second']} images a second")
    logs = list((tmp_path / "runs").glob("*/log.jsonl"))
    assert len(logs) == len(results)
    for file in logs:
        distilled = not (file.parent.name.startswith("teacher") or file.parent.name.endswith("-no-distill"))
        assert ("keypoint_tokens" in json.loads(file.read_text().splitlines()[0])) == distilled, file
