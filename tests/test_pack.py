"""Packs: what is unpacked is the same people, in the pixels of their crops."""

import json
import zipfile

import numpy as np
import pytest
import torch
from commands import call, refused
from scipy.io import savemat

import evaluate
from crops import crop_keypoints, store
from data_mpii import load_joined, load_samples
from pack import DEFLATED, HEADERS, SPARE, pack, text
from synthetic import drawn_people

SIZE = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small sets of drawn people in MPII's layout; boxes are off the middle of the image."""
    root = tmp_path_factory.mktemp("sets")
    for name, start in (("one", 0), ("two", 40)):
        write_set(root / name, start)
    return [root / "one", root / "two"]


def write_set(folder, start, people=(("train", 30), ("valid", 10))):
    (folder / "images").mkdir(parents=True)
    (folder / "annot").mkdir()
    for split, count in people:
        drawn, entries = drawn_people("train", start + count, 150), []
        for i in range(start, start + count):
            drawn.image(i).save(folder / "images" / f"{split}{i}.jpg", quality=95)
            x, y = drawn.center[i] + 1
            scale = float(drawn.side[i]) / 250
            entries.append(dict(image=f"{split}{i}.jpg", joints=(drawn.joints[i] + 1).tolist(),
                                joints_vis=[int(joint != i % 16) for joint in range(16)],
                                center=[float(x) + 4, float(y) - 15 * scale], scale=scale))
        (folder / "annot" / f"{split}.json").write_text(json.dumps(entries))
        if split == "valid":
            heads = np.ones((2, 2, count))
            heads[1] += 10 + np.arange(count)
            savemat(folder / "annot" / "gt_valid.mat", dict(
                pos_gt_src=np.array([entry["joints"] for entry in entries]).transpose(1, 2, 0),
                jnt_missing=1 - np.array([entry["joints_vis"] for entry in entries]).T, headboxes_src=heads))


def unpacked(paths, folder):
    for path in paths:
        zipfile.ZipFile(path).extractall(folder)
    return folder


def test_labels_boxes_and_heads_survive(folders, tmp_path):
    """Joints as fractions of the box, its place, PCKh's unit in sides of it, and the picture."""
    paths = [path for path, _ in pack(folders, tmp_path, 1)]
    assert [path.name for path in paths] == ["people-1.zip"]
    root = unpacked(paths, tmp_path / "people")
    for split in ("valid", "train"):
        before, after = (load_samples(folder / "one", split) for folder in (folders[0].parent, root))
        assert after.name == before.name
        if split == "train":                                       # packed in a random order
            images = [file.name for file in after.files]
            order = [int(name[6:11]) for name in images]
            assert sorted(order) == list(range(30)) and order != sorted(order)
        else:
            order = list(range(10))
        rows = torch.tensor(order)
        _, xy, visible = crop_keypoints(before, rows, SIZE)
        _, packed_xy, packed_visible = crop_keypoints(after, torch.arange(len(order)), SIZE)
        assert (visible == packed_visible).all() and not visible.all()
        assert (xy - packed_xy)[visible].abs().max() < 0.1 / 150
        heads = (before.head_size / before.side)[order]
        np.testing.assert_allclose(after.head_size / after.side, heads, 1e-5)
        crops, packed = (store(samples, SIZE).astype(int) for samples in (before, after))
        assert np.abs(crops[order] - packed).mean() < 4


def test_files_keep_their_size_and_join(folders, tmp_path):
    counts, paths = [], []
    for path, count in pack(folders, tmp_path, 0.1, side=96):
        assert path.stat().st_size <= 1e5
        paths.append(path), counts.append(count)
        root = unpacked([path], tmp_path / "people")
        people = load_joined([root / "one", root / "two"])         # after each file, all so far
        assert len(people) == sum(count[name, "train"] for count in counts for name in ("one", "two"))
    assert len(paths) > 1 and len(people) == 60
    assert counts[0]["one", "valid"] == counts[0]["two", "valid"] == 10
    assert not any(count[name, "valid"] for count in counts[1:] for name in ("one", "two"))
    with zipfile.ZipFile(paths[0]) as archive:
        labels = [info for info in archive.infolist() if "/annot/" in info.filename]
        assert all(info.compress_size <= DEFLATED * info.file_size for info in labels)
        headers = sum(HEADERS + 2 * len(info.filename) for info in archive.infolist())
        content = sum(info.compress_size for info in archive.infolist())
        assert paths[0].stat().st_size == 22 + headers + content
        assert sum(HEADERS + 2 * len(info.filename) for info in labels) < SPARE
    assert text([]) == b"[]"


def test_what_cannot_be_packed_is_refused(folders, tmp_path):
    command = "studies/pack.py", "--data", *folders, "--out", tmp_path / "packs"
    refused(call(*command, "--megabytes", "0.02", cwd=tmp_path), "no room for the 20 people to score on")
    refused(call(*command, "--quality", "100", cwd=tmp_path), "--quality 100 must be 1 to 95")
    refused(call(*command[:3], folders[0], *command[2:], cwd=tmp_path), "same name")
    done = call(*command, cwd=tmp_path)
    assert done.returncode == 0 and "10 of one/valid" in done.stdout and "30 of two/train" in done.stdout
    refused(call(*command, cwd=tmp_path), "holds packs")


def test_the_shipped_student_scores_as_before(real_data, tmp_path):
    """PCKh@0.5 of the same people, packed and not. Of 150 people they differ by 2, by chance."""
    path = evaluate.Path(evaluate.__file__).parent / "weights" / "student-small-photos.pt"
    model, _ = evaluate.checkpoint.load(path)
    data, scores = real_data / "lsp", []
    if not data.is_dir():
        pytest.skip("no lsp in POSE_DATA")
    valid = load_samples(data, "valid")
    root = unpacked([path for path, _ in pack([data], tmp_path, 100)], tmp_path / "people")
    for samples in (valid, load_samples(root / "lsp", "valid")):
        samples = samples.first(500)
        scores.append(evaluate.evaluate(model, samples, store(samples, model.size))["pckh@0.5"]["mean"])
    assert abs(scores[0] - scores[1]) < 1.5
