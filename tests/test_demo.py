"""The page of demo/ in a real browser: headless Chromium, over its debugging protocol.

    python -m pytest tests/test_demo.py                     # the server, and people.js in Node.js
    LONG_TESTS=1 python -m pytest tests/test_demo.py        # in Chromium; needs npm --prefix demo install

people.js is compared with people.py, whose numbers it has, the page's joints in a box with those of
predict.py, and its people with those of people.py by the page's own flip test (`agree`): on synthetic people
and, where POSE_DATA is set, on photos.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_following import crossing
from test_people import PEOPLE, StandIn, drawn

import checkpoint
import people
import videos
from crops import FLIP, cut
from data_mpii import BOX_ENLARGEMENT
from export import SHIPPED_STUDENT, export_onnx
from finding import agree, predict_crops_as_the_page
from images import LEFT, RIGHT, read_image
from people import (Found, box_matrix, box_of_joints, candidates, find_people, is_new, person_score,
                    poses_in_boxes, shared, suppress, windows)
from synthetic import draw_person
from videos import LOOK_AGAIN, Tracker

DEMO = Path(__file__).resolve().parents[1] / "demo"
# a photo of a person who stands upright
DATA = os.environ.get("POSE_DATA")
STANDING = DATA and Path(DATA).resolve() / "lspet" / "images" / "im05307.jpg"
PARTS = "index.html", "demo.js", "people.js", "demo.css"
SERVE = DEMO / "serve.py"
PACKAGE = DEMO / "node_modules" / "onnxruntime-web"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sys.path.insert(0, str(DEMO))
import serve  # noqa: E402

MISSING = ("needs LONG_TESTS=1" if not os.environ.get("LONG_TESTS") else
           "no Chromium is installed" if not BROWSER else
           "demo/node_modules is missing: npm --prefix demo install" if not PACKAGE.is_dir() else "")
in_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING)


# ------------------------------------------------------------------------------- what is cheap

@pytest.fixture
def command():
    """python demo/serve.py -> its address."""
    process = subprocess.Popen([sys.executable, SERVE, "--port", "0"], stdout=subprocess.PIPE, text=True)
    yield next(line.split()[0] for line in process.stdout if line.startswith("http"))
    process.terminate()
    process.wait()


def test_server_isolates_the_page(command):
    assert re.fullmatch(r"http://localhost:\d+/", command)
    with urllib.request.urlopen(command.replace("localhost", "127.0.0.1") + "demo.js") as answer:
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert answer.headers["Content-Type"] == "text/javascript"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_server_listens_on_loopback_only():
    with serve.server() as server:
        assert server.server_address[0] == "127.0.0.1"


def test_taken_port_is_one_line():
    with serve.server() as server:
        for port, error in ((str(server.server_port), "error: port"), ("x", "error: argument --port")):
            done = subprocess.run([sys.executable, SERVE, "--port", port], capture_output=True, text=True)
            assert done.returncode == 2 and done.stderr.startswith(error) and done.stderr.count("\n") == 1


def test_policy_allows_nothing_from_elsewhere():
    page = (DEMO / "index.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy == serve.POLICY
    assert {source for part in policy.split("; ") for source in part.split()[1:]} <= {
        "'none'", "'self'", "'wasm-unsafe-eval'", "data:", "blob:"}
    for file in PARTS:
        text = (DEMO / file).read_text().replace("http://www.w3.org/2000/svg", "")     # no address
        assert not re.search(r"//[\w-]+\.\w+", text), file


def test_versions_are_pinned_and_no_host_is_named():
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version)
               for version in json.loads((DEMO / "package.json").read_text())["dependencies"].values())
    assert "resolved" not in (DEMO / "package-lock.json").read_text()


# ------------------------------------------------------------------------------- people.js and people.py

EVALUATE = """
import {createInterface} from "node:readline";
Object.assign(globalThis, await import(process.argv[1]));
const plain = (_, value) => value instanceof Map ? [...value] : value;
for await (const line of createInterface({input: process.stdin}))
  console.log(JSON.stringify((0, eval)(line), plain) ?? "null");
"""


@pytest.fixture(scope="module")
def js():
    """A function from a line of JavaScript to its value, beside what people.js exports, in Node.js."""
    if not shutil.which("node"):
        pytest.skip("no Node.js is installed")
    command = ["node", "--input-type=module", "-e", EVALUATE, (DEMO / "people.js").as_uri()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        def evaluate(line):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield evaluate
        process.stdin.close()


def in_js(*found):
    """Found people as people.js has them."""
    return json.dumps([{"box": np.array(person.box, float).tolist(),
                        "joints": np.c_[person.joints, person.confidence].tolist()} for person in found])


def answered(js, steps, model, image, asked=None):
    """What one of the generators of people.js returns, to which Python's network shows an image's boxes.

    asked: a list to which (tight, mirrored) of each request is added.
    """
    step = js(f"steps = {steps}; steps.next()")
    while not step["done"]:
        boxes, tight, mirrored = (step["value"][name] for name in ("boxes", "tight", "mirrored"))
        assert 0 < len(boxes) * (1 + mirrored) <= 4
        if asked is not None:
            asked.append((tight, mirrored))
        seen = poses_in_boxes(model, image, boxes, flip_test=mirrored, tight=tight)
        step = js(f"steps.next({in_js(*seen)})")
    return step["value"]


def same(found, expected):
    """Are people of people.js, a list, those of people.py, in this order?"""
    return len(found) == len(expected) and all(
        np.allclose(one["box"], other.box, atol=0.01)
        and np.allclose(one["joints"], np.c_[other.joints, other.confidence], atol=0.01)
        for one, other in zip(found, expected))


def test_numbers_are_those_of_people_py():
    """Of all that is used to find people, and by videos.py to follow them; none is left over."""
    to_find = inspect.getsource(people).partition("- people in an image\n")[2]
    using = to_find + inspect.getsource(Tracker)
    written = dict(re.findall(r"\b([A-Z][A-Z_]+) = (\[.*?\]|[\d.]+)", (DEMO / "people.js").read_text()))
    numbers = vars(videos) | vars(people)
    used = set(re.findall(r"\b[A-Z][A-Z_]+\b", using)) & numbers.keys()
    assert written.keys() == used
    for name, value in written.items():
        assert np.array_equal(json.loads(value), numbers[name]), name


@pytest.mark.parametrize("width, height", [(640, 480), (97, 211), (1, 1), (4096, 17), (333, 332)])
def test_windows_are_the_same(js, width, height):
    np.testing.assert_allclose(js(f"windows({width}, {height})"), windows(width, height), atol=1e-9)


def test_people_are_told_apart_in_the_same_way(js):
    random = np.random.default_rng(0)
    for _ in range(40):
        corners, sides = random.uniform(0, 60, (12, 1, 2)), random.uniform(1, 60, (12, 1, 2))
        joints = corners + sides * random.uniform(size=(12, 16, 2))
        again = joints[:6] + random.uniform(-6, 6, (6, 16, 2))        # half of them seen twice, in part
        joints[6:] = np.where(random.uniform(size=(6, 16, 1)) < 0.6, again, joints[6:])
        sure = random.uniform(0, random.uniform(), (12, 16))
        crowd = [Found([0, 0, 1, 1], *one) for one in zip(joints, sure)]
        boxes = list(map(box_of_joints, crowd))
        js(f"crowd = {in_js(*crowd)}, undefined")
        np.testing.assert_allclose(js("crowd.map(boxOfJoints)"), boxes)
        np.testing.assert_allclose(js("crowd.map(personScore)"), list(map(person_score, crowd)))
        np.testing.assert_allclose(js("crowd.map(one => shared(boxOfJoints(crowd[0]), boxOfJoints(one)))"),
                                   [shared(boxes[0], box) for box in boxes])
        new = [is_new(one, crowd[:2]) for one in crowd]
        assert js("crowd.map(one => isNew(one, crowd.slice(0, 2)))") == new
        kept = [next(n for n, one in enumerate(crowd) if one is person) for person in suppress(crowd)]
        assert js("suppress(crowd).map(person => crowd.indexOf(person))") == kept
        kept = [next(n for n, one in enumerate(crowd) if one is person) for person in candidates(crowd)]
        assert js("candidates(crowd).map(person => crowd.indexOf(person))") == kept


@pytest.mark.parametrize("who, sure", [(PEOPLE, 1), (PEOPLE, 0.6), (PEOPLE, 0.2), (crossing(9), 1), ((), 1)])
def test_everybody_is_the_same(js, who, sure):
    """By a network of Python that people.js asks, too."""
    image, model = drawn(*who), StandIn(sure)
    asked = []
    found = answered(js, f"findPeople({image.width}, {image.height})", model, image, asked)
    rounds = [(False, False), (True, False), (True, True)]                     # windows, then two refinements
    assert [of for of, _ in groupby(asked)] == (rounds if who and sure > 0.2 else rounds[:1])
    assert same(found, find_people(model, image))


def test_who_is_followed_is_the_same(js):
    """Two people cross, one leaves, a third comes, and all are unsure now and then; where a search ends in
    its frame and boxes do not lag.
    """
    model, blue = StandIn(), ((0, 0, 255), 20, 100, 50, 80)
    tracker = Tracker(model)
    js("tracker = new Tracker(null, Infinity, 1), undefined")
    for n in range(LOOK_AGAIN + 18):
        image = drawn(*(crossing(n / 2) if n < 12 else [crossing(n / 2)[0], blue][:1 + (n > 15)]))
        model.sure = 0.3 if n in (3, 6, 44) else 1
        found = answered(js, "tracker.next(320, 200)", model, image)
        before = tracker.people | tracker.lost
        expected = tracker(image)
        assert [number for number, _ in found] == list(expected)
        # the page keeps the box in which it looked, that of the joints before
        looked = [person._replace(box=box_of_joints(before.get(number, person)))
                  for number, person in expected.items()]
        assert same([person for _, person in found], looked), n
    assert tracker.ids == 3


def test_following_looks_at_few_boxes_in_a_frame(js):
    """As on the page: a portion of the windows a frame, until all who walk are found; they keep their ids,
    also when they are not seen for some frames, in which a look around begins, lasts, or ends.
    """
    js("tracker = new Tracker(), undefined")
    model, ids = StandIn(), []
    unseen = [*range(2 * LOOK_AGAIN - 2, 2 * LOOK_AGAIN + 2), *range(2 * LOOK_AGAIN + 4, 3 * LOOK_AGAIN, 3)]
    for n in range(3 * LOOK_AGAIN):
        model.looked.clear()
        model.sure = 0.3 if n in unseen else 1
        found = answered(js, "tracker.next(320, 200)", model, drawn(*crossing(n / 4)))
        ids.append([number for number, _ in found])
        assert sum(model.looked) <= 8
    assert ids[0] == []
    assert all(of == ([] if n in unseen else [0, 1]) for n, of in enumerate(ids) if n >= LOOK_AGAIN)


def test_only_the_chosen_person_is_followed(js):
    """From the box on; when lost, looked for there again. It is always number 0."""
    js("tracker = new Tracker([200, 60, 60, 90]), undefined")
    for n in range(2 * LOOK_AGAIN):
        (red, green), left = PEOPLE, n % 20 * 4
        image = drawn(red, (green[0], 200 - left, *green[2:])) if n < 40 else drawn()
        (number, person), = answered(js, "tracker.next(320, 200)", StandIn(), image)
        assert number == 0
        if n < 20:
            joints = np.array(person["joints"])                                # (16, 3)
            box = box_of_joints(Found([], joints[:, :2], joints[:, 2]))
            assert np.abs(np.subtract(box[:2], [200 - left, 60])).max() < 4


# ------------------------------------------------------------------------------- the browser

class Chromium:
    """Headless Chromium by its debugging protocol: JSON over two pipes, each message ended by a zero byte."""

    def __init__(self, profile, *switches):
        (its_in, ours_out), (ours_in, its_out) = os.pipe(), os.pipe()
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            switches += ("--no-sandbox",)
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "bash", BROWSER, "--headless=new",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-dev-shm-usage",
             "--no-first-run", "--disable-background-networking", *switches, "about:blank"],
            pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(its_in), os.close(its_out)
        self.out, self.inward = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb")
        self.number, self.events, self.unread = 0, [], b""

    def call(self, method, session=None, **params):
        """One command -> its result; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        self.out.write(json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def read(self):
        while b"\0" not in self.unread:
            part = self.inward.read1(1 << 20)
            assert part, "Chromium has ended"
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def close(self):
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


class Page:
    """A tab."""

    def __init__(self, browser, url, width=1200, height=900, phone=False, scheme="light"):
        self.browser, self.url, self.first = browser, url, len(browser.events)
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def js(self, code):
        """The value of an expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True,
                           userGesture=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not self.js(f"(() => {{ try {{ return Boolean({condition}) }} catch {{ return false }} }})()"):
            assert time.monotonic() < end, f"{condition} is not true: {self.js('document.body.innerText')}"
            time.sleep(0.05)

    def text(self, name):
        return self.js(f"document.getElementById('{name}').textContent")

    def ready(self):
        self.wait("parseFloat(time.textContent) > 0")
        return self

    def still(self):
        """The joints (people x 16, 3) of a still image once they are found: x, y, confidence."""
        self.wait("/ found$/.test(message.textContent)")
        self.js("list.open = true, new Promise(done => setTimeout(done, 600))")     # until the table is new
        rows = self.js("[...joints.rows].map(row => [...row.cells].map(cell => cell.textContent))")
        return np.array([row[1:] for row in rows], float)

    def drop(self, *files):
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

    def drag(self, x0, y0, x1, y1):
        """A box over the view, in fractions of it -> what the page says that it is, in pixels."""
        left, top, width, height = self.view()
        middle = (x0 + x1) / 2, (y0 + y1) / 2
        for kind, x, y in (("Pressed", x0, y0), ("Moved", *middle), ("Moved", x1, y1), ("Released", x1, y1)):
            self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=left + x * width, y=top + y * height,
                      button="left", buttons=1, clickCount=1)
        self.wait("/ joints found$/.test(message.textContent)")
        self.js("new Promise(done => setTimeout(done, 600))")                  # until the figures are new
        return [int(number) for number in self.text("box").split(", ")]

    def key(self, key, shift=False):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift,
                      windowsVirtualKeyCode={"Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowDown": 40}[key])

    def view(self):
        """x, y, width and height of the canvas in the window."""
        return self.js("(({x, y, width, height}) => [x, y, width, height])(view.getBoundingClientRect())")

    def allow(self, what):
        camera = {"name": "camera"}
        self.browser.call("Browser.setPermission", permission=camera, setting=what, origin=self.url)

    def events(self, *methods):
        return [event["params"] for event in self.browser.events[self.first:]
                if event.get("sessionId") == self.session and event["method"] in methods]

    def complaints(self):
        said = [event for event in self.events("Runtime.consoleAPICalled") if event["type"] == "error"]
        logged = [event for event in self.events("Log.entryAdded") if event["entry"]["level"] == "error"]
        return said + logged + self.events("Runtime.exceptionThrown")

    def requests(self):
        return [url for event in self.events("Network.requestWillBeSent")
                if not (url := event["request"]["url"]).startswith(("blob:", "data:"))]

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)


@pytest.fixture(scope="module")
def model():
    return checkpoint.load(SHIPPED_STUDENT)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """What demo/ holds after its two commands, with the shipped student."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("demo")
    for name in PARTS:
        shutil.copy(DEMO / name, folder)
    (folder / "node_modules").symlink_to(DEMO / "node_modules")
    export_onnx(model, folder / "student.onnx", "a test")
    return folder


@contextmanager
def served(folder):
    with serve.server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def address(folder):
    with served(folder) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, whose camera shows a person who moves sideways: of a photo, or drawn where there is none."""
    folder = tmp_path_factory.mktemp("browser")
    person = Image.open(STANDING) if STANDING else Image.fromarray(draw_person(1, 6, 240).image)
    person = ImageOps.contain(person.convert("RGB"), (360, 360))
    with open(folder / "camera.mjpeg", "wb") as film:
        for shift in (*range(0, 200, 10), *range(200, 0, -10)):
            frame = Image.new("RGB", (640, 480), (90, 110, 100))
            frame.paste(person, (40 + shift, 60))
            frame.save(film, "JPEG", quality=90)
    chromium = Chromium(folder / "profile", "--use-fake-device-for-media-stream",
                        f"--use-file-for-fake-video-capture={folder / 'camera.mjpeg'}")
    yield chromium
    chromium.close()


@pytest.fixture
def page(browser, address):
    page = Page(browser, address).ready()
    yield page
    page.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory, model):
    """Six files of synthetic people: small, large, wide, turned by their Exif, transparent.

    Of forty drawings those whose joints the student, who knows photos, is surest of: elsewhere two bins of a
    joint may be equally likely, and a grey level or rounding decides between them. None has clothes or a
    background in the colours of limbs, by which skeletons are seen.
    """
    folder = tmp_path_factory.mktemp("images")
    drawings = [Image.fromarray(draw_person(1, n, 128).image) for n in range(40)]
    sure = [-1 if in_limb_colours(np.asarray(image)) else
            poses_in_boxes(model, image, [[0, 0, *image.size]])[0].confidence.min() for image in drawings]
    sizes = (30, 300, 128, 128, 128)
    people = [Image.fromarray(draw_person(1, int(n), size).image)
              for n, size in zip(np.argsort(sure)[::-1], sizes)]
    people[0].save(folder / "small.png")
    people[1].save(folder / "large.jpg", quality=92)
    people[2].crop((0, 30, 192, 181)).save(folder / "wide.webp", lossless=True)
    exif = people[3].getexif()
    exif[274] = 6
    # decoders enlarge halved colours differently, by a grey level, which moves a joint that the student is
    # unsure of: full colours
    stored = people[3].transpose(Image.Transpose.ROTATE_90)           # as a camera does that is held upright
    stored.save(folder / "turned.jpg", exif=exif, quality=100, subsampling=0)
    stored.save(folder / "turned.webp", exif=exif, lossless=True)
    people[4].putalpha(Image.linear_gradient("L").resize(people[4].size))
    people[4].save(folder / "clear.png")
    return sorted(folder.iterdir())


def photos():
    """Five small and five large photos of POSE_DATA, if it is set."""
    data = Path(os.environ.get("POSE_DATA", "nowhere"))
    return [path for of in ("lspet", "mpii_sample")
            for path in sorted((data / of / "images").glob("*.jpg"))[:5]]


# ------------------------------------------------------------------------------- the same as in Python

@in_browser
@pytest.mark.parametrize("size", (64, 128))
def test_crops_are_those_of_pillow(page, size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (150, 211, 4), np.uint8)
    pixels[..., 3] = 255
    picture = Image.fromarray(pixels).convert("RGB")
    page.js(f"""globalThis.drawn = new OffscreenCanvas(211, 150).getContext('2d');
        drawn.putImageData(new ImageData(Uint8ClampedArray.from({pixels.ravel().tolist()}), 211), 0, 0);""")
    boxes = [[0, 0, 211, 150], [40, 30, 20, 25], [10, 5, 60, 90], [-200, -100, 700, 600], [900, 900, 50, 50],
             [150, 100, 128, 128], *rng.integers((-50, -50, 5, 5), (200, 140, 400, 400), (20, 4)).tolist()]
    for box in boxes:
        for tight in (False, True):
            expected = cut(picture, box_matrix(box, size, tight), size)
            found = page.js(f"""import('./demo.js').then(({{boxMap, cut}}) =>
                Array.from(cut(drawn, boxMap({box}, {size}, {BOX_ENLARGEMENT if tight else 1}), {size})))""")
            apart = np.abs(np.array(found).reshape(size, size, 3) - expected.astype(int))
            assert apart.max() <= 1 and (apart > 0).mean() < 0.005, (box, tight)


def pixels_apart(model, expected, joints):
    """How far the page's joints (people x 16, 3) are from those expected, in pixels of their crops."""
    assert len(joints) == 16 * len(expected)
    apart = [0]
    for person, found in zip(expected, joints.reshape(-1, 16, 3)):
        assert np.abs(found[:, 2] - person.confidence).max() < 0.02
        side = BOX_ENLARGEMENT * max(person.box[2:])
        apart.append(np.abs(found[:, :2] - person.joints).max() * model.size / side)
    return max(apart)


@in_browser
def test_joints_in_a_box_are_those_of_predict(page, model, images):
    for path in [*images, *photos()]:
        page.drop(path)
        page.wait(f"message.textContent.startsWith({json.dumps(path.name)})")
        page.still()
        box = page.drag(0.02, 0.02, 0.98, 0.98)
        apart = pixels_apart(model, poses_in_boxes(model, read_image(path)[0], [box]), page.still())
        print(f"{path.name}: {apart:.3f} pixels of the crop")
        assert apart < 1, path.name


@pytest.fixture
def page_flip_test(monkeypatch):
    """Has people.py do as the page does, which has joints instead of distributions for its flip test."""
    monkeypatch.setattr(people, "predict_crops", predict_crops_as_the_page)


@in_browser
def test_joints_of_mirror_images_agree(page):
    """Nearer than a twentieth of the crop their mean, weighted by confidence, else the surer half."""
    rng = np.random.default_rng(0)
    one, other = np.concatenate([128 * rng.random((2, 16, 2)), rng.random((2, 16, 1))], -1)
    other[FLIP[:12], :2] = [127, 0] + [-1, 1] * one[:12, :2] + 20 * (rng.random((12, 2)) - 0.5)
    code = f"import('./demo.js').then(({{agree}}) => agree({one.tolist()}, {other.tolist()}))"
    (xy, sure), (mirrored_xy, mirrored_sure) = (torch.tensor(of).split([2, 1], -1) for of in (one, other))
    joints, confidence = agree(xy, sure[:, 0], mirrored_xy, mirrored_sure[:, 0], 128)
    np.testing.assert_allclose(page.js(code), np.c_[joints, confidence], rtol=1e-9)
    crop = rng.integers(0, 256, (2, 128, 128, 3))
    code = f"""import('./demo.js').then(({{mirror}}) =>
        Array.from(mirror(Uint8Array.from({crop.ravel().tolist()}))))"""
    assert np.array_equal(page.js(code), crop[:, :, ::-1].ravel())


def is_settled(model, image, tries=5):
    """Do people.py's joints stay where they are if a grey level changes in one of 200 pixels of the image?

    The page's crops may be as far apart (test_crops_are_those_of_pillow). Where two bins of a joint are
    equally likely, that decides between them, and the box of the joints, the next crop, moves with it.
    """
    expected, random = find_people(model, image), np.random.default_rng(0)
    for _ in range(tries):
        pixels = np.asarray(image).astype(int)
        pixels += random.choice([-1, 1], pixels.shape) * (random.random(pixels.shape) < 0.005)
        found = find_people(model, Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        if len(found) != len(expected) or any(
                np.abs(one.joints - other.joints).max() * model.size > BOX_ENLARGEMENT * max(one.box[2:])
                for one, other in zip(expected, found)):
            return False
    return True


@in_browser
def test_people_are_those_of_predict(page, model, images, tmp_path, page_flip_test):
    """Where nobody is, in a drawing and in photos: as many, the same, in the same order, by `agree`."""
    Image.new("RGB", (300, 200)).save(tmp_path / "nobody.png")
    settled = [path for path in photos() if is_settled(model, read_image(path)[0])]
    assert len(settled) >= 3 or not photos()
    for path in [images[1], *settled[:4]]:
        read_image(path)[0].convert("RGB").save(tmp_path / f"{path.stem}.png")      # decoded by both alike
    page.js("threshold.value = 0, threshold.oninput()")            # limbs are drawn if only the trunk is sure
    for path in sorted(tmp_path.iterdir(), reverse=True):
        page.drop(path)
        page.wait(f"message.textContent.startsWith({json.dumps(path.name)})")
        image = read_image(path)[0]
        joints, expected = page.still(), find_people(model, image)
        count = {0: "nobody", 1: "1 person"}.get(len(expected), f"{len(expected)} people")
        assert page.text("message") == f"{path.name}: {count} found"
        assert len(page.text("box").split("\n")) == max(len(expected), 1)
        assert pixels_apart(model, expected, joints) < 1 and (coloured(page) > 0) == bool(expected)
        if path.name == "nobody.png":
            assert not expected and page.text("box") == "–"
    assert page.complaints() == []


@in_browser
def test_search_is_shown_and_gives_way(page, images):
    """Windows are counted while it lasts; a new image, a box or a click ends it."""
    page.js("said = [], new MutationObserver(() => said.push(message.textContent)).observe(message, "
            "{childList: true}), undefined")
    page.drop(images[1])
    page.still()
    said = page.js("said")
    assert sum(bool(re.fullmatch(r"looking: \d+ of \d+ windows", line)) for line in said) > 4
    page.drop(images[1])
    page.wait("message.textContent.startsWith('looking: ')")
    page.drop(images[-1])
    page.wait("/^looking: [48]/.test(message.textContent) && view.height < view.width")
    page.drag(0.1, 0.1, 0.9, 0.9)
    assert page.text("message").startswith(images[-1].name) and len(page.still()) == 16
    page.js("everybody.click()")
    page.wait("message.textContent.startsWith('looking')")
    page.js("sample.click()")
    page.wait("message.textContent.startsWith('A person drawn by this page')")
    page.wait("parseFloat(fps.textContent) > 0.5")
    assert page.complaints() == []


@in_browser
@pytest.mark.parametrize("orientation", range(1, 9))
def test_webp_is_upright_by_its_exif(page, tmp_path, orientation):
    """Whether or not the browser honours it: four quarters of one colour each."""
    stored = Image.new("RGB", (80, 48))
    for n, colour in enumerate(("red", "lime", "blue", "white")):
        stored.paste(colour, (n % 2 * 40, n // 2 * 24, n % 2 * 40 + 40, n // 2 * 24 + 24))
    exif = Image.Exif()
    exif[270], exif[274] = "more", orientation
    stored.save(tmp_path / "a.webp", exif=exif, lossless=True)
    upright, _ = read_image(tmp_path / "a.webp")
    page.js("threshold.value = 1, threshold.oninput()")                        # no skeleton
    page.drop(tmp_path / "a.webp")
    page.wait("message.textContent.startsWith('a.webp')")
    page.still()
    width, height = page.js("[view.width, view.height]")
    assert width / height == pytest.approx(upright.width / upright.height, rel=0.01)
    for x, y in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
        at = round(x * width), round(y * height)
        found = page.js(f"Array.from(view.getContext('2d').getImageData({at[0]}, {at[1]}, 1, 1).data)")[:3]
        assert np.allclose(found, upright.getpixel((x * upright.width, y * upright.height)), atol=3)


@in_browser
def test_formats_that_a_browser_lacks_are_said(page, tmp_path, images):
    Image.open(images[0]).convert("RGB").save(tmp_path / "a.tif")
    page.drop(tmp_path / "a.tif")
    page.wait("message.textContent === "
              "'a.tif cannot be read as an image by this browser: convert it to JPEG or PNG'")
    assert page.complaints() == []


@in_browser
def test_box_dragged_by_the_mouse(page, model, images):
    path = images[-1]
    page.drop(path)
    page.wait(f"message.textContent.startsWith('{path.name}')")
    everybody, said = page.still(), page.text("message")
    box, size = page.drag(.3, .2, .8, .9), Image.open(path).size
    assert np.allclose(box, np.array([.3, .2, .5, .7]) * [*size, *size], atol=2)
    assert pixels_apart(model, poses_in_boxes(model, read_image(path)[0], [box]), page.still()) < 1
    page.js("document.getElementById('view').focus()")
    page.key("ArrowLeft"), page.key("ArrowDown", shift=True)
    # the second key, too
    page.wait(f"box.textContent !== '–' && Number(box.textContent.split(', ')[3]) !== {box[3]}")
    moved = [int(number) for number in page.text("box").split(", ")]
    assert moved[0] < box[0] and moved[3] > box[3] and moved[1:3] == box[1:3]
    page.key("Escape")
    page.wait(f"message.textContent === '{said}'")
    assert np.allclose(page.still(), everybody)


@in_browser
def test_network_of_another_size_and_without_metadata(browser, folder, tmp_path, images):
    onnx = pytest.importorskip("onnx")
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    make, kinds = onnx.helper, onnx.TensorProto
    xy, sure = np.tile(np.float32([[31.5, 95.5]]), (14, 1)), np.full(14, 0.5, np.float32)
    values = [("sure", sure), ("xy", xy)]
    shapes = [(f"{name} of all", ["n", *value.shape]) for name, value in values]
    constant = lambda name, value: make.make_node("Constant", [], [name],
                                                  value=onnx.numpy_helper.from_array(value))
    nodes = [make.make_node("Shape", ["pixels"], ["count"], start=0, end=1)]
    for name, value in values:                           # (1, 14) and (1, 14, 2) for each crop
        nodes += [constant(name, value), constant(f"{name} shape", np.array(value.shape)),
                  make.make_node("Concat", ["count", f"{name} shape"], [f"{name} shapes"], axis=0),
                  make.make_node("Expand", [name, f"{name} shapes"], [f"{name} of all"])]
    graph = make.make_graph(
        nodes, "constant", [make.make_tensor_value_info("pixels", kinds.UINT8, ["n", 128, 128, 3])],
        [make.make_tensor_value_info(name, kinds.FLOAT, shape) for name, shape in shapes])
    network = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    onnx.save(network, tmp_path / "student.onnx")
    with served(tmp_path) as url:
        page = Page(browser, url).ready()
        assert page.text("crop") == "128 × 128 pixels" and page.text("parameters") == "not stated"
        page.drop(images[0])
        page.still()
        x, y, width, height = page.drag(0.02, 0.02, 0.98, 0.98)
        joints = page.still()
        assert len(joints) == 14 and np.allclose(joints[:, 2], 0.5)
        side = BOX_ENLARGEMENT * max(width, height)
        middle = np.array([x + (width - 1) / 2, y + (height - 1) / 2])
        assert np.allclose(joints[:, :2], middle + [-side / 4, side / 4], atol=0.01)
        assert not page.complaints()
        page.close()


# ------------------------------------------------------------------------------- what a visitor does

@in_browser
def test_sample_moves_and_nothing_is_fetched_after_loading(page, model):
    assert page.js("crossOriginIsolated") and "WebAssembly" in page.text("backend")
    assert page.text("parameters") == f"{sum(weights.numel() for weights in model.parameters()):,}"
    page.wait("parseFloat(fps.textContent) > 1")
    before = len(page.requests())
    page.js("pause.click()")
    page.wait("fps.textContent === '–'")
    page.js("sample.click()")
    page.wait("parseFloat(fps.textContent) > 1")
    assert page.requests()[before:] == [] and before
    assert all(url.startswith(page.url) for url in page.requests())
    assert page.complaints() == []
    assert page.js("fetch('http://127.0.0.1:1/').then(() => '', error => error.name)") == "TypeError"
    assert any("Content Security Policy" in json.dumps(event) for event in page.complaints())


@in_browser
@pytest.mark.parametrize("way", ("dropped", "chosen", "pasted"))
def test_image_gives_a_skeleton(page, images, way):
    path, before = images[1], len(page.requests())
    if way == "dropped":
        page.drop(path)
    elif way == "chosen":
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        file = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=file, files=[str(path)])
    else:
        page.js(f"""(() => {{
            const data = new DataTransfer(), bytes = new Uint8Array({list(path.read_bytes())});
            data.items.add(new File([bytes], '{path.name}', {{type: 'image/jpeg'}}));
            document.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: data}})); }})()""")
    page.wait(f"message.textContent.startsWith('{path.name}')")
    page.still()
    page.drag(0.02, 0.02, 0.98, 0.98)        # a network that learned from photos may not find drawn people
    page.js("threshold.value = 0, threshold.oninput()")                        # nor be sure of their joints
    assert page.still().shape == (16, 3) and coloured(page) > 300
    page.js("threshold.value = 1, threshold.oninput()")
    page.wait("message.textContent.endsWith(': 0 of 16 joints found')")
    assert coloured(page) < 30
    assert page.requests()[before:] == [] and page.complaints() == []


def coloured(page):
    """Pixels of the view in the colours of limbs, or nearly so."""
    pixels = page.js("Array.from(view.getContext('2d').getImageData(0, 0, view.width, view.height).data)")
    return in_limb_colours(np.array(pixels).reshape(-1, 4)[:, :3])


def in_limb_colours(pixels):
    """How many pixels (..., 3) there are in the colours of limbs, or nearly so."""
    return sum(int((np.abs(pixels.astype(int) - colour).sum(-1) < 150).sum()) for colour in (RIGHT, LEFT))


@in_browser
def test_saved_image(page, images, tmp_path):
    path = images[1]
    page.drop(path)
    page.wait(f"message.textContent.startsWith('{path.name}')")
    page.drag(0.02, 0.02, 0.98, 0.98)
    page.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.js("save.click()")
    file, end = tmp_path / f"{path.stem}-pose.jpg", time.monotonic() + 20
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)
        page.js("1")
    with Image.open(file) as saved, Image.open(path) as original:
        assert saved.size == original.size
        apart = np.abs(np.asarray(saved, int) - np.asarray(original, int)).max(-1) > 60
        assert 0.002 < apart.mean() < 0.2
    assert page.complaints() == []


@in_browser
def test_camera_gives_frames(page):
    page.allow("granted")
    before = len(page.requests())
    page.js("said = [], new MutationObserver(() => said.push(message.textContent)).observe(message, "
            "{childList: true}), undefined")
    page.js("camera.click()")
    page.wait("message.textContent === 'Video: camera' && parseFloat(fps.textContent) > 1")
    page.wait("box.textContent.includes(',')")
    progress = r"Video: camera \(looking: \d+ of \d+ windows\)"
    assert any(re.fullmatch(progress, line) for line in page.js("said"))
    assert page.js("mirror.checked") and page.js("view.width") == 640
    for threshold in (0.25, 0):                          # it follows the person, whatever is shown
        page.js(f"threshold.value = {threshold}, threshold.oninput()")
        boxes = set()
        for _ in range(20):
            boxes.add(page.text("box"))
            time.sleep(0.2)
        boxes = [box for text in boxes - {"–"} for box in text.split("\n")]
        boxes = [[int(number) for number in box.split(", ")] for box in boxes]
        assert len(boxes) > 5
        if STANDING:                 # the photo student loses the drawn person
            assert np.median([box[3] for box in boxes]) > 240
    print(f"{page.text('fps')} frames a second, network {page.text('time')}")
    page.js("facing.value = 'environment', facing.onchange()")
    page.wait("!mirror.checked && parseFloat(fps.textContent) > 1")
    page.js("facing.value = 'user', facing.onchange()")
    page.wait("mirror.checked")
    page.js("sample.click()")
    page.wait("!mirror.checked")
    assert page.requests()[before:] == [] and page.complaints() == []


RECORDED = """new Promise(done => {
        const recorder = new MediaRecorder(CANVAS.captureStream(10));
        recorder.ondataavailable = ({data}) => {
            const files = new DataTransfer();
            files.items.add(new File([data], 'film.webm', {type: 'video/webm'}));
            document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: files}));
            done();
        };
        recorder.start();
        setTimeout(() => recorder.stop(), 1500); })"""


@in_browser
def test_video_file(page):
    """The page's own sample, recorded by the browser."""
    page.js(RECORDED.replace("CANVAS", "view"))
    page.wait("message.textContent.startsWith('Video: film.webm') && parseFloat(fps.textContent) > 1")
    page.js("pause.click()")
    page.wait("fps.textContent === '–' && pause.getAttribute('aria-pressed') === 'true'")
    assert page.complaints() == []


@in_browser
def test_video_of_nobody(page, tmp_path):
    """It is said, but not over an error, which stands for some seconds."""
    page.js("pen = document.createElement('canvas').getContext('2d'), "
            "setInterval(() => pen.fillRect(0, 0, 300, 150), 50), undefined")
    page.js(RECORDED.replace("CANVAS", "pen.canvas"))
    page.wait("message.textContent === 'Video: film.webm (nobody found)'")
    page.wait("parseFloat(fps.textContent) > 0.5")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    page.drop(tmp_path / "broken.jpg")
    page.wait("message.className === 'error'")
    error = page.text("message")
    assert error.startswith("broken.jpg cannot be read")
    time.sleep(4)
    assert page.text("message") == error and page.js("parseFloat(fps.textContent) > 0")
    page.wait("message.textContent === 'Video: film.webm (nobody found)'")
    assert page.complaints() == []


@in_browser
def test_refused_camera_is_said(page):
    page.allow("denied")
    page.js("camera.click()")
    page.wait("message.getAttribute('role') === 'alert'")
    assert page.text("message").startswith("the camera was refused")
    page.js("sample.click()")
    page.wait("message.className === ''")
    assert page.complaints() == []


@in_browser
def test_broken_file_is_said(page, tmp_path, images):
    (tmp_path / "broken.jpg").write_bytes(images[1].read_bytes()[:40] + b"x" * 1000)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for name, kind in (("broken.jpg", "an image"), ("notes.txt", "an image"), ("broken.mp4", "a video")):
        page.drop(tmp_path / name)
        page.wait(f"message.textContent === '{name} cannot be read as {kind}'")
        assert page.js("message.className") == "error"
        page.drop(images[1])
        page.wait("message.className === '' && message.textContent.startsWith('large.jpg')")
    # while an image is searched: the error stands, and then what was found in the image
    page.js("said = [], new MutationObserver(() => said.push(message.textContent)).observe(message, "
            "{childList: true}), undefined")
    page.drop(images[0])
    page.wait("message.textContent.startsWith('looking')")
    page.drop(tmp_path / "notes.txt")
    page.wait("message.className === 'error'")
    page.wait(f"message.textContent.startsWith('{images[0].name}')")
    said = page.js("said")
    error = said.index("notes.txt cannot be read as an image")
    assert said[error - 1].startswith("looking")
    assert said[error + 1:] == [page.text("message")] and page.js("message.className") == ""
    assert page.complaints() == []


@in_browser
@pytest.mark.parametrize("fault, message", [
    ("cut off", "student.onnx cannot be loaded"), ("no network", "student.onnx is missing: run python"),
    ("no package", "onnxruntime-web is missing: run npm install")])
def test_incomplete_page_is_said(browser, folder, tmp_path, fault, message):
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    if fault == "cut off":
        (tmp_path / "student.onnx").write_bytes((folder / "student.onnx").read_bytes()[:100_000])
    else:
        (tmp_path / ("student.onnx" if fault == "no network" else "node_modules")).unlink()
    with served(tmp_path) as url:
        page = Page(browser, url)
        page.wait("message.className === 'error'")
        assert page.text("message").startswith(message) and page.js("camera.disabled")
        page.close()


@in_browser
def test_phone(browser, address):
    page = Page(browser, address, width=390, height=844, phone=True).ready()
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    targets = "[...document.querySelectorAll('button, select, label, .row')]"
    assert page.js(f"{targets}.every(one => one.offsetHeight >= 44 || one.parentElement.offsetHeight >= 44)")
    left, top, width, height = page.view()
    assert width > 300 and top + height < 844
    page.js("track.click()")
    for kind, *finger in (("Start", .2, .2), ("Move", .5, .5), ("Move", .7, .8), ("End",)):
        page.call("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=[
            {"x": left + finger[0] * width, "y": top + finger[1] * height}] if finger else [])
    page.wait("parseInt(box.textContent) < 110")         # not the person's
    box = [int(number) for number in page.text("box").split(", ")]
    assert np.allclose(box, [96, 96, 240, 288], atol=3)
    assert page.complaints() == []
    page.close()


@in_browser
def test_keyboard_and_names(page):
    names, seen = [], set()
    for _ in range(20):
        page.key("Tab")
        name = page.js("document.activeElement.id || document.activeElement.tagName")
        if name != "BODY":
            names.append(name)
            assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", name
    assert {"view", "choose", "camera", "sample", "pause", "everybody", "save", "facing", "threshold",
            "mirror", "track", "SUMMARY"} <= set(names)
    for node in page.call("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value")
        if role in ("button", "checkbox", "slider", "combobox", "application", "table", "status"):
            seen.add(role)
            assert node.get("name", {}).get("value") or role in ("table", "status"), node
    assert {"button", "checkbox", "slider", "combobox", "application", "status"} <= seen


@in_browser
@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_scheme_has_contrast(browser, address, scheme):
    page = Page(browser, address, scheme=scheme).ready()
    texts = "h1, p, button:enabled, dt, dd, label, summary"
    colours = page.js(f"[...document.querySelectorAll('{texts}')]" + """.map(one => {
        let under = one;
        while (getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;
        return [getComputedStyle(one).color, getComputedStyle(under).backgroundColor]; })""")

    def luminance(colour):
        values = np.array([int(number) for number in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    for text, back in colours:
        bright, dark = sorted((luminance(text), luminance(back)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, back)
    assert (luminance(colours[0][1]) < 0.1) == (scheme == "dark")
    page.close()


@in_browser
def test_plain_http_server(browser, folder):
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = re.search(r"port (\d+)", process.stdout.readline())[1]
        page = Page(browser, f"http://localhost:{port}/").ready()
        assert page.text("backend") == "WebAssembly, threads: 1" and page.complaints() == []
        page.close()
    finally:
        process.terminate()
        process.wait()
