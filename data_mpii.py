"""MPII Human Pose: labels and images, from HRNet's json layout or from MPII's own release.

    python studies/pictures.py samples --data DATA      # number of samples, and some crops with their joints

Put the data like this (the layout that HRNet's authors publish and most pose code reads):

    DATA/images/*.jpg
    DATA/annot/train.json, valid.json              image, joints, joints_vis, center, scale of each person
    DATA/annot/gt_valid.mat                        what PCKh is computed against: joints and head boxes

If there is only MPII's release (mpii_human_pose_v1_u12_1.mat in DATA or DATA/annot), that is read instead. It
does not contain the standard split with its 2,958 validation people, so its labelled images are split by file
name.

Label files count pixels from 1, as Matlab does. After loading, the centre of the top left pixel is (0, 0),
and a joint without a label has visible = False.
"""

import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from common import BadInput

JOINTS = ("r-ankle", "r-knee", "r-hip", "l-hip", "l-knee", "l-ankle", "pelvis", "thorax",
          "upper neck", "head top", "r-wrist", "r-elbow", "r-shoulder", "l-shoulder", "l-elbow", "l-wrist")

# MPII's `scale` is the standing height of a person in pixels / 200. HRNet and its followers enlarge the box
# by a quarter and move it down, as MPII's centre lies on the chest.
PIXELS_PER_SCALE = 200
BOX_ENLARGEMENT = 1.25
CENTER_SHIFT = 15                    # pixels per unit of scale, before the enlargement
HEAD_SIZE_OF_DIAGONAL = 0.6          # PCKh's unit of length is 0.6 x the diagonal of the head box
HEAD_SIZE_PER_SCALE = 25             # that unit in MPII for nearly everyone, used where there is no head box
MOST_PIXELS = 200_000_000            # larger images are refused before they are decoded
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")      # no EPS: it starts a program
Image.MAX_IMAGE_PIXELS = None        # MOST_PIXELS is checked here, with a message in one line
FARTHEST = 100_000                   # pixels; a coordinate beyond that is an error
MAX_BAD_FRACTION = 0.05              # of the entries that --skip-bad-data may leave out
VALIDATION_EVERY = 8                 # one in eight images of the release is for validation


@dataclass
class Samples:
    """N labelled people, one per crop: everything that training and scoring need of a data set."""
    name: str                                  # printed with every result
    joints: np.ndarray                         # (N, 16, 2) float32: x, y in pixels of the image
    visible: np.ndarray                        # (N, 16) bool: labelled (occluded joints included)
    center: np.ndarray                         # (N, 2) float32: middle of the square box, pixels
    side: np.ndarray                           # (N,) float32: side of that box, pixels
    head_size: np.ndarray                      # (N,) float32: PCKh's unit of length, pixels
    image: Callable[[int], Image.Image]        # RGB image of sample i
    files: tuple = ()                         # paths of the images, one per sample; none for synthetic people
    note: str = ""                             # a caveat printed with every result
    skipped: tuple = ()                        # why entries of the file were left out, one line each

    def __len__(self):
        return len(self.joints)

    def first(self, count):
        """The first `count` samples."""
        cut = ("joints", "visible", "center", "side", "head_size", "files")
        return replace(self, **{name: getattr(self, name)[:count] for name in cut})


def join(sets):
    """The Samples of several data sets as one, in order: "lspet+lsp/train"."""
    if len(sets) == 1:
        return sets[0]
    names, splits = zip(*(samples.name.split("/", 1) for samples in sets))
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"two data sets are called {twice[0]}: rename one folder, or name it once")
    starts = np.cumsum([0, *map(len, sets)])
    arrays = {field: np.concatenate([getattr(samples, field) for samples in sets])
              for field in ("joints", "visible", "center", "side", "head_size")}

    def image(i):
        of = int(np.searchsorted(starts, i, side="right")) - 1
        return sets[of].image(i - starts[of])

    return Samples(f"{'+'.join(names)}/{splits[0]}", **arrays, image=image,
                   files=sum((tuple(samples.files) for samples in sets), ()),
                   note="; ".join(samples.note for samples in sets if samples.note),
                   skipped=sum((tuple(samples.skipped) for samples in sets), ()))


def box(center, scale):
    """MPII's center (N, 2) and scale (N,) -> middle (N, 2) and side (N,) of the square to crop, in pixels."""
    center, scale = np.array(center, np.float32), np.array(scale, np.float32)
    center[:, 1] += CENTER_SHIFT * scale
    return center, PIXELS_PER_SCALE * BOX_ENLARGEMENT * scale


def load_samples(root, split, images=True, skip_bad=False):
    """The Samples of one split, 'train' or 'valid', of a folder in MPII's or COCO's layout (data_coco.py).

    BadInput if it cannot be used.

    images=False: read the labels alone, for a folder without images.
    skip_bad: leave out json entries that cannot be used and list them in Samples.skipped, instead of stopping
    at the first. Every image is then decoded once.
    """
    root, file = Path(root), find_labels(root, split)
    if file.name.startswith("person_keypoints_"):
        from data_coco import load_coco              # here, as that file imports this one
        return load_coco(root, file, split, images, skip_bad)
    released, truth, note = file.suffix == ".mat", root / "annot" / "gt_valid.mat", ""
    if released and skip_bad:
        raise BadInput(f"--skip-bad-data leaves out entries of annot/{split}.json, and {root} has MPII's "
                       f"release {file.name}: leave the flag out")
    entries = read_release(file, split) if released else read_json(file)
    rows, skipped = check_entries(file, entries, root / "images" if images else None, skip_bad)
    names, joints, visible, center, scale = zip(*rows)
    files = tuple(root / "images" / name for name in names)
    joints = np.array(joints, np.float32) - 1                                  # from 1-based to 0-based
    visible, scale = np.array(visible, bool), np.array(scale, np.float32)
    middle, side = box(np.array(center, np.float32) - 1, scale)
    head_size = HEAD_SIZE_PER_SCALE * scale
    if released:
        head_size = np.array([entry["head_size"] for entry in entries])
        note = "split by image from MPII's release: not the standard validation set"
    elif split == "valid" and truth.is_file():              # it replaces the labels of the json file
        labels, (joints, visible, head_size) = joints, read_truth(truth)
        if len(joints) != len(labels):
            raise BadInput(f"{truth} has {len(joints)} people and {file} {len(labels)}: they do not "
                           f"belong together")
        apart = np.median(np.abs(joints - labels).max(-1)[visible])
        if apart > 1:
            raise BadInput(f"{truth} and {file} disagree by {apart:.0f} pixels on most joints: they list "
                           f"people in different orders")
    elif split == "valid":
        note = f"no gt_valid.mat: head sizes taken as {HEAD_SIZE_PER_SCALE} x scale, PCKh is approximate"
    return Samples(f"{root.name}/{split}{' by image' if released else ''}", joints, visible, middle, side,
                   head_size.astype(np.float32), lambda i: open_image(files[i]), files, note, tuple(skipped))


def find_labels(root, split):
    """The file with the labels of a split: annot/SPLIT.json, else MPII's release; or COCO's json file.

    BadInput without any of these, and where a folder has both MPII's and COCO's.
    """
    from data_coco import find_labels as find_coco   # here, as that file imports this one
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"{root} is not a folder: name one with images/ and annot/train.json, "
                       f"annot/valid.json")
    json_file = root / "annot" / f"{split}.json"
    releases = sorted([*root.glob("mpii_human_pose*.mat"), *root.glob("annot/mpii_human_pose*.mat")])
    if coco := find_coco(root, split):
        if releases or any((root / "annot" / f"{name}.json").is_file() for name in ("train", "valid")):
            raise BadInput(f"{root} has labels of MPII's layout and of COCO's: move annotations/ and its "
                           f"images into a folder of their own")
        return coco
    if not (json_file.is_file() or releases):
        raise BadInput(f"{root} has neither annot/{split}.json nor MPII's release "
                       f"mpii_human_pose_v1_u12_1.mat nor COCO's annotations/person_keypoints_*2017.json: "
                       f"put one of them there")
    return json_file if json_file.is_file() else releases[0]


# ------------------------------------------------------------------------------- HRNet's json layout

def read_json(file):
    """The entries of annot/train.json or valid.json, a dictionary for each person; unchecked."""
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read as json ({error}): download it again") from error
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{file} holds no list of people: download it again")
    return entries


FIELDS = "image", "joints", "joints_vis", "center", "scale"
# How an error describes an entry, and what must hold of it instead; fields with numbers are arrays.
RULES = (
    ("image {image!r:.200} does not name a file inside images/", lambda image, **_:
        isinstance(image, str) and not Path(image).is_absolute() and ".." not in Path(image).parts
        and "\0" not in image),
    ("has joints {joints.shape} and joints_vis {joints_vis.shape}, must be (16, 2) and (16,)",
        lambda joints, joints_vis, **_: (joints.shape, joints_vis.shape) == ((16, 2), (16,))),
    (f"joints and center must be finite, within {FARTHEST:,} pixels, and joints_vis 0 or 1",
        lambda joints, joints_vis, center, **_: center.shape == (2,) and (np.abs(center) < FARTHEST).all()
        and (np.abs(joints) < FARTHEST).all() and np.isin(joints_vis, (0, 1)).all()),
    (f"scale {{scale}} must be above 0: a person is at least a pixel tall, and below {FARTHEST:,}",
        lambda scale, **_: not scale.shape and 1 <= PIXELS_PER_SCALE * scale < FARTHEST),
    ("has no labelled joint", lambda joints_vis, **_: joints_vis.any()),
)


def check_entry(file, index, entry):
    """One entry of a json file -> (image, joints, visible, center, scale). BadInput if it violates a rule."""
    try:
        values = {key: entry[key] if key == "image" else numbers(entry[key]) for key in FIELDS}
    except TypeError:
        fault = "is not a person"
    except KeyError as error:
        fault = f"has no {error}"
    except (ValueError, OverflowError):
        fault = "joints, joints_vis, center and scale must be numbers"
    else:
        fault = next((text.format(**values) for text, holds in RULES if not holds(**values)), None)
    if fault:
        raise BadInput(f"{file}, entry {index}: {fault}: correct or remove this entry")
    return tuple(values.values())


def numbers(value):
    """A number, or nested lists of numbers, as an array. ValueError for anything else: "12", null."""
    array = np.array(value)
    if array.dtype.kind not in "iuf":
        raise ValueError(array.dtype)
    return array.astype(np.float64)


def check_image(file, index, path, images, decode):
    """BadInput where an image is missing, lies outside the folder `images`, or (decode) cannot be decoded."""
    if not isfile(path):                                   # False for a name that is too long, too
        raise BadInput(f"{file}, entry {index}: there is no image {str(path)[:200]!r}: unpack the images "
                       f"into {images}")
    if not path.resolve().is_relative_to(images.resolve()):
        raise BadInput(f"{file}, entry {index}: {path} is a link to something outside {images}: put the "
                       f"image there")
    if decode:
        open_image(path)


def check_entries(file, entries, images, skip_bad):
    """-> rows of the entries that can be used, and for each other entry a line that says why not.

    BadInput at the first of these unless skip_bad, and if they are more than MAX_BAD_FRACTION. images: the
    folder that must hold each image, or None.
    """
    keys = [json.dumps(entry, sort_keys=True) for entry in entries]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}     # of equal entries

    def attempt(index):
        try:
            row = check_entry(file, index, entries[index])
            if first[keys[index]] != index:
                raise BadInput(f"{file}, entry {index}: is the same as one before: remove this entry")
            if images is not None:
                check_image(file, index, images / row[0], images, decode=skip_bad)
            return row
        except BadInput as error:
            if not skip_bad:
                raise
            return str(error)

    return try_all(file, attempt, len(entries), skip_bad)


def try_all(file, attempt, count, skip_bad):
    """attempt(index) of `count` entries, a row or a line that says why there is none -> rows, these lines.

    BadInput if the lines are more than MAX_BAD_FRACTION.
    """
    with ThreadPoolExecutor() as pool:             # where images are decoded: Pillow releases the GIL
        found = list(tqdm((pool.map if skip_bad else map)(attempt, range(count)), "checking entries",
                          count, leave=False, disable=None))
    skipped = [row for row in found if isinstance(row, str)]
    if len(skipped) > MAX_BAD_FRACTION * count:
        raise BadInput(f"{file}: {len(skipped):,} of {count:,} entries cannot be used, more than "
                       f"{MAX_BAD_FRACTION:.0%}: the file as a whole seems wrong; the first: {skipped[0]}")
    return [row for row in found if not isinstance(row, str)], skipped


def read_truth(file):
    """gt_valid.mat -> joints (N, 16, 2) 0-based, visible (N, 16), head sizes (N,) in pixels."""
    try:
        mat = loadmat(file)
        joints, missing, heads = (mat[key].astype(np.float64)
                                  for key in ("pos_gt_src", "jnt_missing", "headboxes_src"))
        N = joints.shape[2]
        # heads: corner, x y, N
        if (joints.shape, missing.shape, heads.shape) != ((16, 2, N), (16, N), (2, 2, N)):
            raise ValueError(f"shapes {joints.shape}, {missing.shape}, {heads.shape}")
    except Exception as error:          # scipy raises a dozen kinds on damaged files
        raise BadInput(f"{file} is not MPII's validation truth ({error!r:.80}): it needs pos_gt_src (16, 2, "
                       f"N), jnt_missing (16, N) and headboxes_src (2, 2, N)") from error
    head_size = HEAD_SIZE_OF_DIAGONAL * np.linalg.norm(heads[1] - heads[0], axis=0)           # (N,)
    bad = ~(head_size > 0) | ~np.isfinite(joints).all((0, 1))
    if bad.any():
        raise BadInput(f"{file}, person {bad.argmax()} (of 0 to {N - 1}): head box or joints are empty or "
                       f"not finite")
    return (joints.transpose(2, 0, 1) - 1).astype(np.float32), missing.T == 0, head_size.astype(np.float32)


# ------------------------------------------------------------------------------- MPII's own release

def read_release(file, split):
    """RELEASE.annolist(n).annorect(k) of MPII's .mat -> entries of the labelled people of a split, unchecked.

    The training images are split by file name. Entries are those of a json file, with head_size besides.
    """
    held_out = lambda name: zlib.crc32(name.encode()) % VALIDATION_EVERY == 0
    try:
        release = loadmat(file, struct_as_record=False, squeeze_me=True)["RELEASE"]
        annolist, training = np.atleast_1d(release.annolist), np.atleast_1d(release.img_train)
        entries = [dict(image=entry.image.name, annorect=(n, k), **person)
                   for n, (entry, train) in enumerate(zip(annolist, training))
                   if train and held_out(entry.image.name) == (split == "valid")
                   for k, rect in enumerate(np.atleast_1d(getattr(entry, "annorect", [])))
                   if (person := read_person(rect))]
    except Exception as error:          # scipy raises a dozen kinds on damaged files
        raise BadInput(f"{file} is not MPII's release ({error!r:.80}): it must hold "
                       f"RELEASE.annolist") from error
    if not entries:
        raise BadInput(f"{file} has no labelled person of the {split} split: download it again")
    return entries


def read_person(rect):
    """One annorect -> its joints, joints_vis, center, scale and head_size; None if its labels are incomplete.

    A value that the release does not have is a missing field or an empty array. loadmat unwraps arrays of
    length 1.
    """
    def number(struct, field):
        value = np.asarray(getattr(struct, field, np.nan), dtype=np.float64)
        return float(value) if value.size == 1 else np.nan

    points = np.atleast_1d(getattr(getattr(rect, "annopoints", None), "point", []))
    joints, visible = np.full((len(JOINTS), 2), -1.0), np.zeros(len(JOINTS), bool)
    for point in points:
        id, xy = number(point, "id"), (number(point, "x"), number(point, "y"))
        if id in range(len(JOINTS)) and np.isfinite(xy).all():
            joints[int(id)], visible[int(id)] = xy, True
    objpos = getattr(rect, "objpos", None)
    center, scale = [number(objpos, "x"), number(objpos, "y")], number(rect, "scale")
    x1, y1, x2, y2 = (number(rect, corner) for corner in ("x1", "y1", "x2", "y2"))
    head_size = HEAD_SIZE_OF_DIAGONAL * np.hypot(x2 - x1, y2 - y1)
    if not (visible.any() and np.isfinite(center).all() and scale > 0 and head_size > 0):     # false for NaN
        return None
    return dict(joints=joints.tolist(), joints_vis=visible.astype(int).tolist(), center=center, scale=scale,
                head_size=head_size)


# ------------------------------------------------------------------------------- images

def open_image(path, read=lambda image: image.convert("RGB")):
    """read(opened Pillow image), by default RGB. BadInput if it is no image or has more than MOST_PIXELS."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS // 10 ** 6} "
                                 f"million: make it smaller")
            return read(image)
    except Exception as error:          # Pillow raises a dozen kinds on damaged files
        why = " ".join(str(error).split())[:160]
        raise BadInput(f"{path} cannot be read as an image ({why}): replace it") from error
