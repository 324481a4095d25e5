"""MPII Human Pose: labels and images, from HRNet's json layout or from MPII's own release.

Folders in COCO's layout are told apart and read here, too, by data_coco.py; several folders are joined.

    python studies/pictures.py samples --data DATA      # number of samples, and some crops with their joints

Put the data like this (the layout that HRNet's authors publish and most pose code reads):

    DATA/images/*.jpg
    DATA/annot/train.json, valid.json              image, joints, joints_vis, center, scale of each person
    DATA/annot/gt_valid.mat                        what PCKh is computed against: joints and head boxes

If there is only MPII's release (mpii_human_pose_v1_u12_1.mat in DATA, in DATA/annot or in the folder it comes
in), that is read instead. It does not contain the standard split with its 2,958 validation people, so its
labelled images are split by file name.

Label files count pixels from 1, as Matlab does, in the image as it is seen: turned upright by its Exif. After
loading, the centre of the top left pixel is (0, 0), and a joint without a label has visible = False.
"""

import json
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

import data_coco
from common import BadInput, check_all, read_mat, refuse
from images import FARTHEST, check_image, open_image, open_safely

JOINTS = ("r-ankle", "r-knee", "r-hip", "l-hip", "l-knee", "l-ankle", "pelvis", "thorax",
          "upper neck", "head top", "r-wrist", "r-elbow", "r-shoulder", "l-shoulder", "l-elbow", "l-wrist")

# MPII's `scale` is the standing height of a person in pixels / 200. HRNet and its followers enlarge the box
# by a quarter and move it down, as MPII's centre lies on the chest.
PIXELS_PER_SCALE = 200
BOX_ENLARGEMENT = 1.25
CENTER_SHIFT = 15                    # pixels per unit of `scale` as it is labelled, by which it moves down
HEAD_SIZE_OF_DIAGONAL = 0.6          # PCKh's unit of length is 0.6 x the diagonal of the head box
HEAD_SIZE_PER_SCALE = 25             # that unit / scale, for nearly everyone in MPII; used without a head box
SMALL_PERSON = 10                    # pixels; smaller people are warned of
# Of check_units: how many images are opened; least fraction of labels inside the crops, and inside the images
# (real sets: 0.99); largest median of side / span of the joints (real: 1.2 to 1.8), and of side / image
LOOKED_AT, LEAST_INSIDE, WIDEST_CROP = 64, 0.8, 10
VALIDATION_EVERY = 8                 # one in eight images of the release is for validation
NOT_RELEASED = "002878268.jpg", "013401523.jpg", "040348287.jpg"     # listed in the release without an image

ARRAYS = "joints", "visible", "center", "side", "head_size", "empty"      # of Samples


@dataclass
class Samples:
    """N people, one per crop, or crops of nobody: everything that training and scoring need of a data set."""
    name: str                                  # SET/SPLIT, printed with every result
    joints: np.ndarray                         # (N, 16, 2) float32: x, y in pixels of the image
    visible: np.ndarray                        # (N, 16) bool: labelled (occluded joints included)
    center: np.ndarray                         # (N, 2) float32: middle of the square box, pixels
    side: np.ndarray                           # (N,) float32: side of that box, pixels
    head_size: np.ndarray                      # (N,) float32: PCKh's unit of length, pixels
    image: Callable[[int], Image.Image]        # RGB image of sample i
    files: tuple = ()                          # paths of the images, one per sample; none for synthetic
    note: str = ""                   # a caveat printed with every result; of training sets how many people
    empty: np.ndarray | None = None            # (N,) bool: crops without a person; None: there are none
    everybody: dict = field(default_factory=dict)      # {image: boxes of all its people}: x, y, width, height

    def __post_init__(self):
        if self.empty is None:
            self.empty = np.zeros(len(self.joints), bool)

    def __len__(self):
        return len(self.joints)

    def first(self, count):
        """The first `count` samples."""
        return replace(self, **{name: getattr(self, name)[:count] for name in (*ARRAYS, "files")})


def join(sets):
    """The Samples of one or more data sets as one, in order: "lspet+lsp/train"."""
    if len(sets) == 1:
        return sets[0]
    names, splits = zip(*(samples.name.split("/", 1) for samples in sets))
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"two data sets are called {twice[0]}: rename one folder, or name it once")
    starts = np.cumsum([0, *map(len, sets)])
    arrays = {field: np.concatenate([getattr(samples, field) for samples in sets]) for field in ARRAYS}

    def image(i):
        number = int(np.searchsorted(starts, i, side="right")) - 1
        return sets[number].image(i - starts[number])

    return Samples(f"{'+'.join(names)}/{splits[0]}", **arrays, image=image,
                   files=sum((tuple(samples.files) for samples in sets), ()),
                   note="; ".join(samples.note for samples in sets if samples.note))


def of_files(name, files, **fields):
    """Samples whose images are files, one for each crop. fields: those of Samples, by name."""
    numbers = {part: fields[part].astype(np.float32) for part in ("joints", "center", "side", "head_size")}
    return Samples(name, **fields | numbers, files=files, image=lambda i: open_image(files[i]))


def box(center, scale):
    """MPII's center (N, 2) and scale (N,) -> middle (N, 2) and side (N,) of the square to crop, in pixels."""
    center, scale = np.array(center, np.float32), np.array(scale, np.float32)
    center[:, 1] += CENTER_SHIFT * scale
    return center, PIXELS_PER_SCALE * BOX_ENLARGEMENT * scale


def load_samples(root, split, images=True):
    """The Samples of one split, 'train' or 'valid', of a folder in MPII's or COCO's layout (data_coco.py).

    BadInput if it cannot be used. images=False: read the labels alone, for a folder without images.
    """
    root, file = Path(root), find_labels(root, split)
    name = f"{root.resolve().name}/{split}"
    if file.name.startswith("person_keypoints_"):                              # COCO's layout
        fields = data_coco.load_people(root, file, split, images)
        fields["side"] = BOX_ENLARGEMENT * fields["side"]
        rule = "keypoints and bbox (x, y, width, height) must be in pixels"
    else:
        fields = load_people(root, file, split, images)
        name += " by image" if file.suffix == ".mat" else ""
        rule = ("joints, center and head boxes must be in pixels of the upright image, counted from 1, and "
                f"scale the person's height in pixels / {PIXELS_PER_SCALE}")
    samples = of_files(name, **fields)
    check_units(file, samples, images, rule)
    return samples


def load_people(root, file, split, images=True):
    """The people of one split, by the names of Samples, of HRNet's json layout or of MPII's release."""
    released, truth, note = file.suffix == ".mat", root / "annot" / "gt_valid.mat", ""
    entries = read_release(file, split) if released else read_json(file)
    rows = check_entries(file, entries, root / "images" if images else None)
    names, joints, visible, center, scale = zip(*rows)
    joints = np.array(joints, np.float32) - 1                                  # from 1-based to 0-based
    visible, scale = np.array(visible, bool), np.array(scale, np.float32)
    middle, side = box(np.array(center, np.float32) - 1, scale)
    head_size = HEAD_SIZE_PER_SCALE * scale
    if released:
        head_size = np.array([entry["head_size"] for entry in entries])
        note = "split by image from MPII's release: not the standard validation set"
    elif split == "valid" and truth.is_file():              # it replaces the labels of the json file
        labels = joints
        joints, visible, head_size = read_truth(truth)
        if len(joints) != len(labels):
            raise BadInput(f"{truth} has {len(joints)} people and {file} {len(labels)}: they do not "
                           f"belong together")
        apart = np.median(np.abs(joints - labels).max(-1)[visible])
        if apart > 1:
            raise BadInput(f"{truth} and {file} disagree by {apart:.0f} pixels on most joints: they list "
                           f"people in different orders")
    elif split == "valid":
        note = f"no gt_valid.mat: head sizes taken as {HEAD_SIZE_PER_SCALE} x scale, PCKh is approximate"
    if (small := PIXELS_PER_SCALE * scale < SMALL_PERSON).any():
        warnings.warn(f"{file}: {small.sum()} people are less than {SMALL_PERSON} pixels tall by their "
                      f"scale, first in {names[small.argmax()]}: their crops show next to nothing",
                      stacklevel=2)
    return dict(joints=joints, visible=visible, center=middle, side=side, head_size=head_size, note=note,
                files=tuple(root / "images" / name for name in names),
                everybody=data_coco.read_everybody(root, images))


def load_joined(folders):
    """The Samples to train on of one or more folders, and crops without people where these can be found.

    note: how many people of each.
    """
    sets = [load_samples(folder, "train") for folder in folders]
    people = join(sets)
    without = [samples for samples in map(crops_without_people, sets) if samples]
    counts = " + ".join(f"{len(samples):,}" for samples in sets) + " people"
    counts += f", {sum(map(len, without)):,} crops of nobody" if without else ""
    return replace(join([people, *without]), name=people.name, note=counts)


def crops_without_people(samples):
    """Samples of squares that show nobody, from photos of which everybody's box is known; or None."""
    fields = data_coco.squares_without_people(samples.files, samples.everybody)
    return fields and of_files(f"nobody of {samples.name}", **fields)


def find_labels(root, split):
    """The file with the labels of a split: annot/SPLIT.json, else MPII's release; or COCO's json file.

    BadInput without any of these, where a folder has both MPII's and COCO's, and where one split has a json
    file and the other would come from the release, which divides the images otherwise.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"{root} is not a folder: name one with images/ and annot/train.json, "
                       f"annot/valid.json")
    there = [name for name in ("train", "valid") if (root / "annot" / f"{name}.json").is_file()]
    releases = sorted(path for place in (".", "annot", "mpii_human_pose*")
                      for path in root.glob(f"{place}/mpii_human_pose*.mat"))
    if coco := data_coco.find_annotations(root, split):
        if releases or there:
            raise BadInput(f"{root} has labels of MPII's layout and of COCO's: move annotations/ and its "
                           f"images into a folder of their own")
        return coco
    if split in there:
        return root / "annot" / f"{split}.json"
    if not releases:
        raise BadInput(f"{root} has neither annot/{split}.json nor MPII's release "
                       f"mpii_human_pose_v1_u12_1.mat nor COCO's annotations/person_keypoints_*2017.json: "
                       f"put one of them there (mmpose's mpii_{split.replace('valid', 'val')}.json is the "
                       f"first of them)")
    if there:
        raise BadInput(f"{root} has annot/{there[0]}.json and no annot/{split}.json, and {releases[0].name} "
                       f"divides the images otherwise: add the second file, or move the first away")
    return releases[0]


def check_units(file, samples, images, rule):
    """BadInput, with the rule, where the labels of a whole set are in other units: no single entry shows it.

    images: whether there are any; the sizes of LOOKED_AT are compared with the labels.
    """
    joints, visible, side = samples.joints, samples.visible, samples.side
    if not visible.any():
        return
    rows, longest = [], []               # samples that are looked at, and the longer side of their images
    for row in np.unique(np.linspace(0, len(side) - 1, LOOKED_AT).astype(int)) if images else ():
        with suppress(BadInput):         # reported where it is decoded
            longest.append(open_safely(samples.files[row], lambda image: max(image.size)))
            rows.append(row)
    rows, longest = np.array(rows, int), np.array(longest, int)
    inside_image = ((joints[rows] > -1) & (joints[rows] < longest[:, None, None])).all(-1)[visible[rows]]
    inside_crop = (np.abs(joints - samples.center[:, None]) <= side[:, None, None] / 2).all(-1)[visible]
    labelled = visible[..., None]
    span = (joints.max(1, where=labelled, initial=-np.inf)
            - joints.min(1, where=labelled, initial=np.inf)).max(-1)           # (N,), pixels
    side_per_span, side_per_image = side[span > 0] / span[span > 0], side[rows] / longest
    head = np.median(samples.head_size / side)
    fault = ""
    if np.abs(joints[visible] + 1).max() <= 2:                                 # from 1, as in the file
        fault = "no joint is beyond 2, as if they were fractions"
    elif np.abs(samples.center[:, 0] + 1).max() <= 2:
        fault = "no center is beyond 2, as if they were fractions"
    elif len(side_per_span) and np.median(side_per_span) > WIDEST_CROP:
        fault = f"crops are {np.median(side_per_span):,.0f} times as wide as what their joints span"
    elif len(side_per_image) and np.median(side_per_image) > WIDEST_CROP:
        fault = f"crops are {np.median(side_per_image):,.0f} times as wide as their images"
    elif inside_crop.mean() < LEAST_INSIDE:
        fault = f"only {inside_crop.mean():.0%} of the labels lie inside their crops"
    elif len(inside_image) and inside_image.mean() < LEAST_INSIDE:
        fault = f"only {inside_image.mean():.0%} of the labels lie inside their images"
    elif not 0.01 < head < 1:
        fault = f"head sizes are {head:.2g} of the crops' sides, not about 0.1"
    if fault:
        raise BadInput(f"{file}: {fault}: {rule}")


# ------------------------------------------------------------------------------- HRNet's json layout

def read_json(file):
    """The entries of annot/train.json or valid.json, a dictionary for each person; unchecked."""
    try:
        entries = json.loads(file.read_bytes())      # UTF-8 in any locale, with or without a byte order mark
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read as json ({error}): correct or replace it") from error
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{file} holds no list of people: each must have {', '.join(FIELDS)}")
    return entries


FIELDS = "image", "joints", "joints_vis", "center", "scale"


def check_entry(entry):
    """One entry of a json file -> (image, joints, visible, center, scale). BadInput names the wrong field.

    joints_vis: 0 without a label, 1, true or COCO's 2 with one. Joints without a label may be NaN or null.
    """
    refuse((not isinstance(entry, dict), "is not a person"))
    refuse(*((field not in entry, f"has no '{field}'") for field in FIELDS))
    image = entry["image"]
    joints, seen, center, scale = (numbers(field, entry[field]) for field in FIELDS[1:])
    refuse((not isinstance(image, str) or Path(image).is_absolute() or ".." in Path(image).parts
            or "\0" in image, f"image {image!r:.200} does not name a file inside images/"),
           (joints.shape != (16, 2), f"has joints {joints.shape}, must be (16, 2)"),
           (seen.shape != (16,), f"has joints_vis {seen.shape}, must be (16,)"),
           (center.shape != (2,), f"has center {center.shape}, must be (2,)"),
           (scale.shape != (), f"has scale {scale.shape}, must be one number"))
    visible, near = seen > 0, (np.abs(joints) < FARTHEST).all(-1)              # false for NaN
    refuse((not np.isin(seen, (0, 1, 2)).all(), "joints_vis must be 0 (no label), 1 or 2"),
           (not near[visible].all(), f"joints must be finite, within {FARTHEST:,} pixels"),
           (not (np.abs(center) < FARTHEST).all(), f"center must be finite, within {FARTHEST:,} pixels"),
           (not 1 <= PIXELS_PER_SCALE * scale < FARTHEST,
            f"scale {scale} is a person of {PIXELS_PER_SCALE * scale:,.6g} pixels: scale is the height in "
            f"pixels / {PIXELS_PER_SCALE}, and the height must be 1 to {FARTHEST:,} pixels"),
           (not visible.any(), "has no labelled joint"))
    joints[~near] = -1
    return image, joints, visible, center, scale


def numbers(field, value):
    """A number, or nested lists of numbers, as an array; null is NaN. BadInput for others, also "12"."""
    try:
        array = np.array(value)
        if array.dtype.kind not in ("iufb" if field == "joints_vis" else "iuf"):
            if not {type(part) for part in array.flat} <= {int, float, type(None)}:
                raise ValueError
        return array.astype(np.float64)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"{field} must be numbers") from error


def check_entries(file, entries, images):
    """-> what `check_entry` gives for each. images: the folder that must hold each image, or None."""
    before = set()

    def check(index):
        row, key = check_entry(entries[index]), json.dumps(entries[index], sort_keys=True)
        refuse((key in before, "is the same as one before"))
        before.add(key)
        if images is not None:
            check_image(images / row[0], images)
        return row

    return check_all(file, check, len(entries))


def read_truth(file):
    """gt_valid.mat -> joints (N, 16, 2) 0-based, visible (N, 16), head sizes (N,) in pixels."""
    mat = read_mat(file)
    try:
        joints, missing, heads = (mat[key].astype(np.float64)
                                  for key in ("pos_gt_src", "jnt_missing", "headboxes_src"))
        N = joints.shape[2]
        # heads: corner, x y, N
        if (joints.shape, missing.shape, heads.shape) != ((16, 2, N), (16, N), (2, 2, N)):
            raise ValueError(f"shapes {joints.shape}, {missing.shape}, {heads.shape}")
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise BadInput(f"{file} is not MPII's validation truth ({error!r:.80}): it needs pos_gt_src (16, 2, "
                       f"N), jnt_missing (16, N) and headboxes_src (2, 2, N)") from error
    head_size = HEAD_SIZE_OF_DIAGONAL * np.linalg.norm(heads[1] - heads[0], axis=0)           # (N,)
    joints = np.where((missing != 0)[:, None] & ~np.isfinite(joints), 0, joints)
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
    mat = read_mat(file, struct_as_record=False, squeeze_me=True)
    try:
        release = mat["RELEASE"]
        annolist, training = np.atleast_1d(release.annolist), np.atleast_1d(release.img_train)
        # annorect tells entries of people with equal labels apart
        entries = [dict(image=entry.image.name, annorect=(n, k), **person)
                   for n, (entry, train) in enumerate(zip(annolist, training))
                   if train and entry.image.name not in NOT_RELEASED
                   and held_out(entry.image.name) == (split == "valid")
                   for k, rect in enumerate(np.atleast_1d(getattr(entry, "annorect", [])))
                   if (person := read_annorect(rect))]
    except Exception as error:          # a structure with anything in it
        raise BadInput(f"{file} is not MPII's release ({error!r:.80}): it must hold "
                       f"RELEASE.annolist") from error
    if not entries:
        raise BadInput(f"{file} has no labelled person of the {split} split: put the whole release there")
    return entries


def read_annorect(rect):
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
