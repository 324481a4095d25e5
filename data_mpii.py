"""MPII Human Pose: labels and pictures, from HRNet's json layout or from MPII's own release.

    python studies/pictures.py samples --data DATA      # how many people there are, and some crops with their joints

Put the data like this (the layout that HRNet's authors publish and most pose code reads):

    DATA/images/*.jpg
    DATA/annot/train.json, valid.json              image, joints, joints_vis, center, scale of each person
    DATA/annot/gt_valid.mat                        what PCKh is scored against: joints and head boxes

Where only MPII's release is there (mpii_human_pose_v1_u12_1.mat in DATA or DATA/annot), it is read instead. It does
not say who the 2,958 standard validation people are, so its labelled pictures are split by their name, for good.

The label files count pixels from 1, as Matlab does. Here, and everywhere after loading, the centre of the top
left pixel is (0, 0), and a joint that is not labelled has visible = False.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from common import BadInput

JOINTS = ("r-ankle", "r-knee", "r-hip", "l-hip", "l-knee", "l-ankle", "pelvis", "thorax",
          "upper neck", "head top", "r-wrist", "r-elbow", "r-shoulder", "l-shoulder", "l-elbow", "l-wrist")

# MPII states a person's size as `scale`: standing height in pixels / 200. HRNet and its followers enlarge the box by
# a quarter, and move it down, as MPII's centre lies on the chest.
PIXELS_PER_SCALE = 200
BOX_ENLARGEMENT = 1.25
CENTER_SHIFT = 15                    # pixels per unit of scale, before the enlargement
HEAD_SIZE_OF_DIAGONAL = 0.6          # PCKh's unit of length is 0.6 x the diagonal of the head box
HEAD_SIZE_PER_SCALE = 25             # what that unit is in MPII for nearly everyone, where no head box is at hand
MOST_PIXELS = 200_000_000            # a larger picture is refused before it is decoded
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")        # none that starts another program, as EPS does
Image.MAX_IMAGE_PIXELS = None        # by us, in one line, instead of by Pillow
FARTHEST = 100_000                   # no picture is wider: a coordinate beyond is a mistake
MAX_BAD_FRACTION = 0.05                     # of the entries that --skip-bad-data may leave out
VALIDATION_SHARE = 8                 # of the release's pictures, every eighth goes to validation


@dataclass
class Samples:
    """N labelled people, one per crop: everything that training and scoring need to know of a data set."""
    name: str                                  # what outputs call it
    joints: np.ndarray                         # (N, 16, 2) float32: x, y in pixels of the picture
    visible: np.ndarray                        # (N, 16) bool: labelled (occluded included)
    center: np.ndarray                         # (N, 2) float32: middle of the square box, pixels
    side: np.ndarray                           # (N,) float32: side of that box, pixels
    head_size: np.ndarray                      # (N,) float32: PCKh's unit of length, pixels
    image: Callable[[int], Image.Image]        # RGB image of sample i
    files: tuple = ()                          # paths of the pictures, one a person; none for drawn people
    note: str = ""                             # what a reader of any figure on these people must know
    skipped: tuple = ()                        # why entries of the file were left out, one line each

    def __len__(self):
        return len(self.joints)

    def first(self, count):
        """The first `count` of these people."""
        arrays = (self.joints, self.visible, self.center, self.side, self.head_size)
        return Samples(self.name, *(array[:count] for array in arrays), self.image, self.files[:count], self.note)


def box(center, scale):
    """MPII's center (N, 2) and scale (N,) -> middle (N, 2) and side (N,) in pixels of the square that is cropped."""
    center, scale = np.array(center, np.float32), np.array(scale, np.float32)
    center[:, 1] += CENTER_SHIFT * scale
    return center, PIXELS_PER_SCALE * BOX_ENLARGEMENT * scale


def load_samples(root, split, images=True, skip_bad=False):
    """The people of one split, 'train' or 'valid', of an MPII folder. BadInput where the folder cannot be used.

    images=False reads the labels alone, for a folder without images.
    skip_bad: leave out json entries that cannot be used, and say so in Samples.skipped, instead of stopping at the first;
    every picture is then decoded once to know.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"{root} is not a folder: name one with images/ and annot/train.json, annot/valid.json")
    json_file = root / "annot" / f"{split}.json"
    if json_file.is_file():
        return read_json(root, split, json_file, images, skip_bad)
    releases = sorted([*root.glob("mpii_human_pose*.mat"), *root.glob("annot/mpii_human_pose*.mat")])
    if releases and skip_bad:
        raise BadInput(f"--skip-bad-data leaves out entries of annot/{split}.json, and {root} has MPII's release "
                       f"{releases[0].name}: leave the flag out")
    if releases:
        return read_release(root, split, releases[0], images)
    raise BadInput(f"{root} has neither annot/{split}.json nor MPII's release mpii_human_pose_v1_u12_1.mat: "
                   f"put one of them there")


# ------------------------------------------------------------------------------- HRNet's json layout

def read_json(root, split, file, images, skip_bad):
    """annot/train.json or annot/valid.json; gt_valid.mat beside it, if there, overrules the validation labels."""
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read as json ({error}): get the file anew") from error
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{file} holds no list of people: get the file anew")
    rows, skipped = check_entries(file, entries, root / "images" if images else None, skip_bad)
    names, joints, visible, center, scale = (list(column) for column in zip(*rows))
    files = [root / "images" / name for name in names]

    joints = np.array(joints, np.float32) - 1                                  # from 1-based to 0-based
    visible = np.array(visible, bool)
    scale = np.array(scale, np.float32)
    middle, side = box(np.array(center, np.float32) - 1, scale)
    head_size, note = HEAD_SIZE_PER_SCALE * scale, ""
    truth = root / "annot" / "gt_valid.mat"
    if split == "valid" and truth.is_file():
        joints_mat, visible, head_size = read_truth(truth)
        if len(joints_mat) != len(files):
            raise BadInput(f"{truth} has {len(joints_mat)} people and {file} {len(files)}: they must come from one place")
        apart = np.abs(joints_mat - joints).max(-1)[visible]
        if np.median(apart) > 1:
            raise BadInput(f"{truth} and {file} disagree by {np.median(apart):.0f} pixels on most joints: "
                           f"their people stand in different orders")
        joints = joints_mat
    elif split == "valid":
        note = f"no gt_valid.mat: head sizes taken as {HEAD_SIZE_PER_SCALE} x scale, PCKh is approximate"
    return Samples(f"{root.name}/{split}", joints, visible, middle, side, head_size.astype(np.float32),
                  lambda i: open_image(files[i]), tuple(files), note, tuple(skipped))


def check_entries(file, entries, images, skip_bad):
    """-> rows of the entries that can be used, and why the others cannot, in a line each; BadInput at the first of these
    unless skip_bad, and where they are more than MAX_BAD_FRACTION. images: folder where each picture must be, or None."""
    def check(numbered):
        index, entry = numbered
        row = check_entry(file, index, entry)
        if images is not None:
            path = images / row[0]
            try:
                there = path.is_file()
            except OSError:                                # a name that is too long
                there = False
            if not there:
                raise BadInput(f"{file}, entry {index}: there is no picture {str(path)[:200]!r}: "
                               f"unpack the pictures into {images}")
            if not path.resolve().is_relative_to(images.resolve()):
                raise BadInput(f"{file}, entry {index}: {path} is a link to something outside {images}: put the picture there")
            if skip_bad:
                open_image(path)
        return row

    def attempt(numbered):
        try:
            return check(numbered)
        except BadInput as error:
            if not skip_bad:
                raise
            return str(error)

    if skip_bad and images is not None:
        with ThreadPoolExecutor() as pool:                 # Pillow lets go of the interpreter while it decodes
            found = list(tqdm(pool.map(attempt, enumerate(entries)), total=len(entries), desc="checking pictures", leave=False,
                              disable=None))
    else:
        found = list(map(attempt, enumerate(entries)))
    seen = set()
    for index, what in enumerate(found):                   # in order, whichever thread was first
        key = json.dumps(entries[index], sort_keys=True)
        if not isinstance(what, str) and key in seen:
            found[index] = f"{file}, entry {index}: is the same as one before: remove this entry"
            if not skip_bad:
                raise BadInput(found[index])
        seen.add(key)
    skipped = [what for what in found if isinstance(what, str)]
    if len(skipped) > MAX_BAD_FRACTION * len(entries):
        raise BadInput(f"{file}: {len(skipped):,} of {len(entries):,} entries cannot be used, more than {MAX_BAD_FRACTION:.0%}: "
                       f"something is wrong with the whole; the first: {skipped[0]}")
    return [what for what in found if not isinstance(what, str)], skipped


def numbers(value):
    """A number, or lists of numbers, as an array; ValueError where something else is among them: "12", true, null."""
    def check(part):
        if isinstance(part, list):
            for each in part:
                check(each)
        elif type(part) not in (int, float):
            raise ValueError(part)

    check(value)
    return np.array(value, np.float64)


def check_entry(file, index, entry):
    """One person of the json list -> (image, joints, visible, center, scale); BadInput names the first fault."""
    def refuse(fault):
        raise BadInput(f"{file}, entry {index}: {fault}: mend or remove this entry")

    if not isinstance(entry, dict):
        refuse("is not a person")
    for key in ("image", "joints", "joints_vis", "center", "scale"):
        if key not in entry:
            refuse(f"has no '{key}'")
    if not isinstance(entry["image"], str) or Path(entry["image"]).is_absolute() or ".." in Path(entry["image"]).parts \
            or "\0" in entry["image"]:
        refuse(f"image {entry['image']!r} does not name a file inside images/")
    try:
        joints, visible, center, scale = (numbers(entry[key]) for key in ("joints", "joints_vis", "center", "scale"))
    except (TypeError, ValueError, OverflowError):
        refuse("joints, joints_vis, center and scale must be numbers")
    if joints.shape != (len(JOINTS), 2) or visible.shape != (len(JOINTS),):
        refuse(f"has joints {joints.shape} and joints_vis {visible.shape}, must be (16, 2) and (16,)")
    if center.shape != (2,) or not (np.abs(center) < FARTHEST).all() or not (np.abs(joints) < FARTHEST).all() \
            or not np.isin(visible, (0, 1)).all():
        refuse(f"joints and center must be finite, within {FARTHEST:,} pixels, and joints_vis 0 or 1")
    if scale.shape or not 1 <= PIXELS_PER_SCALE * scale < FARTHEST:
        refuse(f"scale {entry['scale']} must be above 0: a person is at least a pixel tall, and below {FARTHEST:,}")
    if not visible.any():
        refuse("has no labelled joint")
    return entry["image"], joints, visible, center, float(scale)


def read_truth(file):
    """gt_valid.mat -> joints (N, 16, 2) 0-based, visible (N, 16), head sizes (N,), for PCKh."""
    try:
        mat = loadmat(file)
        joints, missing, heads = (mat[key].astype(np.float64) for key in ("pos_gt_src", "jnt_missing", "headboxes_src"))
        N = joints.shape[2]
        if (joints.shape, missing.shape, heads.shape) != ((16, 2, N), (16, N), (2, 2, N)):    # heads: corner, x y, N
            raise ValueError(f"shapes {joints.shape}, {missing.shape}, {heads.shape}")
    except Exception as error:          # scipy raises a dozen kinds on damaged files
        raise BadInput(f"{file} is not MPII's validation truth ({error!r:.80}): it needs pos_gt_src (16, 2, N), "
                       f"jnt_missing (16, N) and headboxes_src (2, 2, N)") from error
    head_size = HEAD_SIZE_OF_DIAGONAL * np.linalg.norm(heads[1] - heads[0], axis=0)           # (N,)
    bad = ~(head_size > 0) | ~np.isfinite(joints).all((0, 1))
    if bad.any():
        raise BadInput(f"{file}, person {bad.argmax()} (of 0 to {N - 1}): head box or joints are empty or not finite")
    return (joints.transpose(2, 0, 1) - 1).astype(np.float32), missing.T == 0, head_size.astype(np.float32)


# ------------------------------------------------------------------------------- MPII's own release

def read_release(root, split, file, images):
    """RELEASE.annolist(i).annorect(j) of MPII's .mat: the labelled people of the training pictures, split by picture."""
    try:
        release = loadmat(file, struct_as_record=False, squeeze_me=True)["RELEASE"]
        annolist = np.atleast_1d(release.annolist)
        training = np.atleast_1d(release.img_train)
    except Exception as error:
        raise BadInput(f"{file} is not MPII's release ({error!r:.80}): it must hold RELEASE.annolist") from error
    try:
        found = [(n, picture.image.name, *person)
                 for n, (picture, train) in enumerate(zip(annolist, training))
                 if train and (zlib.crc32(picture.image.name.encode()) % VALIDATION_SHARE == 0) == (split == "valid")
                 for person in map(read_person, np.atleast_1d(getattr(picture, "annorect", []))) if person is not None]
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{file} is not MPII's release ({error!r:.80}): get it anew") from error
    if not found:
        raise BadInput(f"{file} has no labelled person of the {split} split: get it anew")
    rows = []
    for n, name, joints, visible, center, scale, head_size in found:           # the same rules as for a json file
        entry = dict(image=name, joints=joints.tolist(), joints_vis=visible.astype(int).tolist(), center=list(center),
                     scale=scale)
        rows.append((root / "images" / check_entry(file, n, entry)[0], joints, visible, center, scale, head_size))
    files, joints, visible, center, scale, head_size = (list(column) for column in zip(*rows))
    for path in files:
        if images and not path.is_file():
            raise BadInput(f"{file} names a picture {path}, which is not there: unpack all pictures into {root / 'images'}")
    middle, side = box(np.array(center) - 1, scale)
    return Samples(f"{root.name}/{split} by picture", np.array(joints, np.float32) - 1, np.array(visible), middle, side,
                  np.array(head_size, np.float32), lambda i: open_image(files[i]), tuple(files),
                  "split by picture from MPII's release: not the standard validation set")


def read_person(rect):
    """One annorect -> (joints, visible, center, scale, head size), or None where it is not labelled completely.

    The release leaves out what it does not have: the field is missing, or an empty array. A lone struct or number
    comes unwrapped from its array.
    """
    def number(struct, field):
        value = np.asarray(getattr(struct, field, np.nan), dtype=np.float64)
        return float(value) if value.size == 1 else np.nan

    points = np.atleast_1d(getattr(getattr(rect, "annopoints", None), "point", []))
    joints, visible = np.full((len(JOINTS), 2), -1.0), np.zeros(len(JOINTS), bool)
    for point in points:
        id, place = number(point, "id"), (number(point, "x"), number(point, "y"))
        if id in range(len(JOINTS)) and np.isfinite(place).all():
            joints[int(id)], visible[int(id)] = place, True
    objpos = getattr(rect, "objpos", None)
    center, scale = (number(objpos, "x"), number(objpos, "y")), number(rect, "scale")
    x1, y1, x2, y2 = (number(rect, corner) for corner in ("x1", "y1", "x2", "y2"))
    head_size = HEAD_SIZE_OF_DIAGONAL * np.hypot(x2 - x1, y2 - y1)
    if not (visible.any() and np.isfinite(center).all() and scale > 0 and head_size > 0):     # NaN is not above 0
        return None
    return joints, visible, center, scale, head_size


# ------------------------------------------------------------------------------- pictures

def open_image(path):
    """A decoded RGB picture; BadInput names a file that is none."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS // 10 ** 6} million")
            return image.convert("RGB")
    except Exception as error:          # Pillow raises a dozen kinds on damaged files
        fault = " ".join(str(error).split())[:160]
        raise BadInput(f"{path} cannot be read as a picture ({fault}): get the file anew") from error
