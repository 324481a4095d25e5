"""Photos as a few files: crops of people, small JPEGs with their labels, for a machine that has no network.

    python studies/pack.py --data LSPET everyday LSP --out runs/packs     # people-1.zip, people-2.zip, ...
    unzip -oq people-1.zip -d people                                      # there; then people-2.zip, ...
    python train.py --data people/LSPET people/everyday people/LSP ...

A pack holds each set as a folder in MPII's layout, which every command reads. people-1.zip has all the people
to score on, then people to learn from, of all sets in a random order; the next files have the rest. Labels
are of all people so far: each file is unpacked over those before it.

A photo in a pack is one person's box with the margin of stored crops (crops.MARGIN), black outside the
original; joints, box and PCKh's unit are in its pixels. Boxes of everybody (annot/boxes.json) are left out,
and with them the crops without people.
"""

import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import BadInput, CommandLine, check_writable, main_with_clear_errors, refuse
from crops import MARGIN, crop_matrix, cut, transform
from data_mpii import (BOX_ENLARGEMENT, CENTER_SHIFT, HEAD_SIZE_OF_DIAGONAL, PIXELS_PER_SCALE, load_samples)
from evaluate import names_of

SIDE, QUALITY = 256, 60      # of the JPEGs (docs/lab.md)
HEADERS = 76                 # bytes that a zip file needs for each of its files, beside its name twice
DEFLATED = 0.3               # size of labels in it, at most, as a fraction of their text
SPARE = 2000                 # bytes for the headers of labels


def crops_of(samples, side):
    """Maps image -> packed crop (N, 2, 3): the box with its margin becomes side x side pixels."""
    return crop_matrix(samples.center, samples.side * MARGIN, side)


def jpeg(samples, i, matrix, side, quality):
    """The packed crop of person i as a file's bytes."""
    try:
        crop = cut(samples.image(i), matrix[i], side)
    except BadInput as error:
        raise BadInput(f"{samples.name}, entry {i}: {error}") from error
    content = io.BytesIO()
    Image.fromarray(crop).save(content, "JPEG", quality=quality, optimize=True, progressive=True)
    return content.getvalue()


def entries_of(samples, matrix, split, side):
    """A person's entry of SPLIT.json each, in pixels of the packed crop, counted from 1 (inverts `box`)."""
    joints = (transform(matrix, torch.from_numpy(samples.joints)).numpy() + 1).round(1)        # (N, 16, 2)
    joints = np.where(samples.visible[..., None], joints, -1)
    scale = side / MARGIN / BOX_ENLARGEMENT / PIXELS_PER_SCALE
    middle = (side - 1) / 2 + 1
    return [dict(image=f"{split}-{i:05}.jpg", joints=xy.tolist(), joints_vis=seen.tolist(),
                 center=[middle, middle - CENTER_SHIFT * scale], scale=scale)
            for i, (xy, seen) in enumerate(zip(joints, samples.visible.astype(int)))]


def truth_of(samples, entries, side):
    """The content of gt_valid.mat: joints, and head boxes that keep PCKh's unit, in crop pixels."""
    diagonal = samples.head_size * side / (MARGIN * samples.side) / HEAD_SIZE_OF_DIAGONAL      # (N,)
    corner = np.stack([diagonal, 0 * diagonal]) + 1                                        # (2, N) x, y
    content = io.BytesIO()
    savemat(content, dict(pos_gt_src=np.array([entry["joints"] for entry in entries]).transpose(1, 2, 0),
                          jnt_missing=1.0 - samples.visible.T,
                          headboxes_src=np.stack([np.ones_like(corner), corner])))
    return content.getvalue()


def text(entries):
    """The content of SPLIT.json."""
    return json.dumps(entries, separators=(",", ":")).encode()


def pack(folders, out, megabytes, side=SIDE, quality=QUALITY, seed=0):
    """Write people-1.zip, ..., at most `megabytes` each, into `out`; yields (path, {set: people}) of each."""
    names, limit = names_of(folders), 1e6 * megabytes
    sets = {(name, split): load_samples(folder, split)
            for split in ("valid", "train") for name, folder in zip(names, folders)}
    maps = {key: crops_of(samples, side) for key, samples in sets.items()}
    labels = {key: entries_of(samples, maps[key], key[1], side) for key, samples in sets.items()}
    truth = {name: truth_of(sets[name, "valid"], labels[name, "valid"], side) for name in names}
    people = [(key, i) for key, samples in sets.items() for i in range(len(samples))]
    scored = sum(key[1] == "valid" for key, _ in people)
    order = scored + np.random.default_rng(seed).permutation(len(people) - scored)
    people = people[:scored] + [people[n] for n in order]
    written = {key: [] for key in sets}              # entries so far, also those of files before
    number, done, bar = 0, 0, tqdm(total=len(people), desc="people", leave=False, disable=None)
    while done < len(people):
        number, first, count = number + 1, number == 0, dict.fromkeys(sets, 0)
        path = out / f"people-{number}.zip"
        files = {f"{name}/annot/gt_valid.mat": truth[name] for name in names if first}
        kept = [key for key in sets if first or key[1] == "train"]           # whose labels are in this file
        size = SPARE + DEFLATED * sum(map(len, [*files.values(), *(text(written[key]) for key in kept)]))
        with zipfile.ZipFile(partial := path.with_suffix(".partial"), "w") as archive:
            while done < len(people):
                key, i = people[done]
                content, entry = jpeg(sets[key], i, maps[key], side, quality), labels[key][i]
                name = f"{key[0]}/images/{entry['image']}"
                size += len(content) + HEADERS + 2 * len(name.encode()) + DEFLATED * len(text([entry]))
                if size > limit:
                    break
                archive.writestr(zipfile.ZipInfo(name), content)
                written[key].append(entry)
                count[key] += 1
                done += 1
                bar.update()
            refuse((done < scored or first and not all(written.values()), f"--megabytes {megabytes:g} has no "
                    f"room for the {scored:,} people to score on and some to learn from: make it more"),
                   (not any(count.values()), f"--megabytes {megabytes:g} is full of labels: make it more"))
            files |= {f"{name}/annot/{split}.json": text(written[name, split]) for name, split in kept}
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        os.replace(partial, path)
        yield path, count


def main():
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders of photos")
    add("--out", type=Path, required=True, help="folder for the files")
    add("--megabytes", type=float, default=40, help="of a file, at most (default: 40)")
    add("--side", type=int, default=SIDE, help=f"of a crop with its margin, pixels (default: {SIDE})")
    add("--quality", type=int, default=QUALITY, help=f"of the JPEGs (default: {QUALITY})")
    add("--seed", type=int, default=0, help="of the order of those to learn from (default: 0)")
    args = parser.parse_args()
    names = names_of(args.data)
    refuse((len(set(names)) < len(names), "two folders of --data have the same name: rename one"),
           (not 1 <= args.quality <= 95, f"--quality {args.quality} must be 1 to 95"),
           (not 32 <= args.side <= 1024, f"--side {args.side} must be 32 to 1024"),
           (not args.megabytes > 0, f"--megabytes {args.megabytes:g} must be above 0"),
           (any(args.out.glob("people-*.zip")),
            f"{args.out} holds packs: remove them, or name another folder with --out"))
    check_writable(args.out, "--out ")
    args.out.mkdir(parents=True, exist_ok=True)
    for path, count in pack(args.data, args.out, args.megabytes, args.side, args.quality, args.seed):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, people: " + ", ".join(
            f"{number:,} of {name}/{split}" for (name, split), number in count.items() if number), flush=True)


if __name__ == "__main__":
    main_with_clear_errors(main)
