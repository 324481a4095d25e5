"""What is measured on a GPU, rehearsed on a CPU in a copy of the repository's files alone."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import call, refused
from test_pack import write_set

import checkpoint
import gpu
import results
import train
from models import build_student

ROOT = Path(__file__).resolve().parents[1]


def run(root, *command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=root, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files, and two packs of drawn people in runs/packs."""
    root, people = tmp_path_factory.mktemp("home") / "tree", tmp_path_factory.mktemp("sets") / "drawn-people"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout.splitlines()
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    write_set(people, 0, (("train", 36), ("valid", 12)))
    run(root, "studies/pack.py", "--data", people, "--out", "runs/packs", "--megabytes", "0.11",
        "--side", "208", "--quality", "50")
    return root


def test_all_of_it(copy):
    """A call without people, one with all that is left; nothing is left for a third."""
    packs = sorted((copy / "runs/packs").iterdir())
    assert [path.name for path in packs] == ["people-1.zip", "people-2.zip"]
    names = [item.name for stage in gpu.items(gpu.REHEARSAL).values() for item in stage]
    command = "studies/gpu.py", "--rehearse", "--device", "cpu", "--back", "back"

    said = run(copy, *command, "--packs")
    found = json.loads((copy / "back/gpu.json").read_text())
    assert "teacher is left out: no people" in said and found["step teacher"]["done"]
    assert not {"teacher", "resumed", *gpu.REHEARSAL.students} & set(found)
    seconds = found["layers"]["layers"][0]["seconds"]

    run(copy, *command)
    found = json.loads((copy / "back/gpu.json").read_text())
    assert found["packs"]["names"] == ["people-1.zip", "people-2.zip"]
    assert found["layers"]["layers"][0]["seconds"] == seconds                      # not again
    assert set(found) == {*names, "packs", "epochs"} and not [f for f in found.values() if "error" in f]
    assert all(found[name]["done"] for name in names)
    assert found["card"]["rates"]["float32"] > 1e9 < found["card"]["bytes_per_second"]
    assert {timing["filter"] for timing in found["speed cc-none 2"]["timings"]} == {"gs", "gd", "attention"}
    assert all(0 < layer["fraction"] for layer in found["layers"]["layers"])
    for name in ("teacher", *gpu.REHEARSAL.students):
        figures = found[name]
        assert figures["people"] == 36 and figures["fraction"] > 0 and figures["images_per_second"] > 0
        assert figures["log"][0]["pckh@0.5"] == figures["scores"]["pckh@0.5"]["mean"]
        assert ("heatmap" in figures["log"][0]) == (name not in ("teacher", "reg-gs-none-alone"))
    assert found["resumed"]["same"] and found["resumed"]["off"] == 0
    sizes = {path.name: path.stat().st_size for path in (copy / "back").iterdir()}
    assert len(sizes) <= gpu.FILES and max(sizes.values()) <= gpu.FILE_BYTES
    model, metadata = checkpoint.load(copy / "back/teacher.pt")
    assert model.config["student"] == "teacher" and metadata["samples"] == 36

    said = run(copy, *command)
    assert said.splitlines() == ["runs/gpu/gpu.json has what was found"]


def test_packs_are_unpacked_in_order_and_once(copy, visit):
    del visit.people
    first, second = sorted((copy / "runs/packs").iterdir())
    numbers = []
    for packs in ([first], [second], [second, first]):
        visit.args.packs = packs
        visit.unpack()
        numbers.append(visit.people())
    assert 0 < numbers[0] < numbers[1] == numbers[2] == 36
    assert [path.name for path in visit.folders()] == ["drawn-people"]
    assert gpu.Visit(visit.args).found["packs"]["names"] == [first.name, second.name]


class Calls:
    """Stands in for train.py: keeps the flags, and writes what a run of some epochs leaves."""

    def __init__(self, epochs, finished=False):
        self.epochs, self.finished, self.flags = epochs, finished, []

    def __call__(self, visit, flags, heard):
        self.flags.append(flags)
        out = flags["out"]
        out.mkdir(exist_ok=True)
        log = gpu.read_log(out) + [{"images_per_second": 300.0}] * self.epochs
        checkpoint.save_log(out, log)
        for name in ("last.pt", "best.pt"):
            (out / name).touch()
        if self.finished:
            (out / "result.json").write_text('{"scores": {}, "flip_test": {}}')
        heard()


@pytest.fixture
def visit(tmp_path):
    """Of the paper's size; 6,000 people to learn from, steps of 300 (teacher) to 2,000 images a second."""
    args = SimpleNamespace(out=tmp_path, back=None, rehearse=False, minutes=1000, packs=[], init=None,
                           device="cpu")
    visit = gpu.Visit(args)
    visit.people = lambda: 6000
    for name, rate in zip(("teacher", *gpu.FULL.students), (300, 2000, 1500, 1000, 2000, 2000)):
        visit.note(f"step {name}", step=rate, fraction=0.1)
    return visit


def test_trainings_go_on_and_join(visit, monkeypatch):
    """Epochs fit the minutes that are left; with a second pack the teacher starts from its weights."""
    monkeypatch.setattr(gpu, "call_train", calls := Calls(epochs=3))
    visit.note("packs", names=["people-1.zip"])
    found = gpu.teacher(8, visit)
    assert not found["done"] and found["images_per_second"] == 300 and found["fraction"] == pytest.approx(0.1)
    found = gpu.teacher(8, visit)
    visit.note("packs", names=["people-1.zip", "people-2.zip"], people={"1": 6000, "2": 9000})
    visit.people = lambda: 9000
    gpu.teacher(8, visit)
    first, again, joined = calls.flags
    assert first["epochs"] == int(0.8 * 8 * 60 * 300 / 6000) == 19 and "resume" not in first
    assert again["resume"] and again["epochs"] == 3 + int(0.8 * (8 - 3 * 20 / 60) * 60 * 300 / 6000) == 19
    assert joined["out"].name == "teacher-2" and joined["init"] == visit.args.out / "teacher-1" / "best.pt"
    assert "resume" not in joined and "init" not in first
    assert joined["epochs"] == int(0.8 * (8 - 6 * 20 / 60) * 60 * 300 / 9000) == 9     # six epochs of 6,000


def test_a_step_that_could_not_be_timed_costs_no_training(visit, monkeypatch):
    monkeypatch.setattr(gpu, "call_train", Calls(epochs=3, finished=True))
    visit.found["step teacher"] = dict(tries=1, error="CUDA error")
    visit.note("packs", names=["people-1.zip"])
    found = gpu.teacher(8, visit)
    assert found["done"] and found["images_per_second"] == 300 and "fraction" not in found


def test_ten_packs_are_unpacked_in_their_order(visit):
    for n in range(1, 12):
        with zipfile.ZipFile(visit.args.out / f"people-{n}.zip", "w") as archive:
            archive.writestr("set/last.txt", str(n))
        visit.args.packs.append(visit.args.out / f"people-{n}.zip")
    visit.unpack()
    assert (visit.args.out / "people/set/last.txt").read_text() == "11"
    assert visit.found["packs"]["names"] == [f"people-{n}.zip" for n in range(1, 12)]
    assert visit.found["packs"]["people"] == {str(n): 6000 for n in range(1, 12)}


def test_students_have_one_number_of_epochs_and_the_newest_teacher(visit, monkeypatch):
    monkeypatch.setattr(gpu, "call_train", calls := Calls(epochs=16, finished=True))
    visit.note("packs", names=["people-1.zip"])
    assert gpu.student("cc-gs-none", 2, visit) == dict(done=False, tries=0, waits="for a teacher")
    gpu.teacher(8, visit)
    for name in gpu.FULL.students:
        assert gpu.student(name, 2, visit)["done"]
    _, *students = calls.flags
    assert {flags["epochs"] for flags in students} == {int(0.8 * 2 * 60 * 1000 / 6000)} == {16}
    teachers = [flags.get("teacher") for flags in students]
    best = visit.args.out / "teacher-1" / "best.pt"
    assert teachers == [best, best, best, None, best] and students[3]["no-distill"]
    assert [students[2][key] for key in ("student", "filter", "backbone")] == ["cc", "attention", "none"]


def test_train_understands_every_training(visit, monkeypatch):
    """Of the paper's size, as it would be called on a GPU."""
    commands = []

    def popen(command, **how):
        commands.append(command[1:])
        return SimpleNamespace(stdout=iter(["a line\n"]), wait=lambda: 0, poll=lambda: 0, terminate=None)

    (visit.args.out / "people/set/annot").mkdir(parents=True)
    (visit.args.out / "teacher-1").mkdir()
    for name in ("best.pt", "last.pt"):
        (visit.args.out / "teacher-1" / name).touch()
    visit.note("packs", names=["people-1.zip"])
    monkeypatch.setattr(gpu.subprocess, "Popen", popen)
    monkeypatch.setattr(gpu.Visit, "take_home", lambda *_: None)
    trainings = [item for stage in gpu.items(gpu.FULL).values() for item in stage if item.trains]
    for item in trainings:
        assert not item.run(visit)["done"]
    assert len(commands) == len(trainings) == 9
    for item, command in zip(trainings, commands):
        monkeypatch.setattr("sys.argv", [str(word) for word in command])
        args = train.parse_arguments()
        assert args.amp and 0 < args.stop_after < visit.args.minutes and args.select == ["set"]
        assert args.preset == ("small" if "photos" in item.name else "paper")
        assert args.train_teacher == item.name.startswith("teacher")


def test_what_fails_is_told_once_and_the_rest_goes_on_in_a_new_process(visit, monkeypatch, capsys):
    def fails(visit):
        raise RuntimeError("CUDA error:\nan illegal memory access")

    class Replaced(Exception):
        pass

    def execute(program, words):
        assert program == words[0] == sys.executable and words[-2] == "--minutes" and float(words[-1]) < 1000
        raise Replaced

    stages = {"speed": [gpu.Item("bad", 1, fails), gpu.Item("good", 1, lambda visit: dict(figure=7)),
                        gpu.Item("long", 2000, fails), gpu.Item("killed", 1, fails)]}
    monkeypatch.setattr(gpu, "items", lambda size: stages)
    monkeypatch.setattr(gpu.os, "execv", execute)
    visit.note("killed", tries=2)
    with pytest.raises(Replaced):
        gpu.go_on(visit)
    assert "error: bad: CUDA error: an illegal memory access" in capsys.readouterr().err
    visit = gpu.Visit(visit.args)                                  # as the new process reads it
    gpu.go_on(visit)
    assert visit.found["good"] == dict(tries=1, done=True, figure=7)
    assert "illegal memory access" in visit.found["bad"]["error"] and visit.found["bad"]["tries"] == 1
    assert "long is left out: no time" in capsys.readouterr().out and "error" not in visit.found["killed"]


def test_networks_come_home_in_parts_as_far_as_they_fit(visit, monkeypatch, tmp_path):
    visit.args.back = back = tmp_path / "back"
    back.mkdir()
    checkpoint.save(tmp_path / "best.pt", model := build_student("cc", "gs", "none", "tiny"), {})
    monkeypatch.setattr(gpu, "FILE_BYTES", 2 * 10 ** 5)
    visit.take_home("a", tmp_path / "best.pt")
    visit.take_home("a", tmp_path / "best.pt")                     # in place of the first
    parts = sorted(back.iterdir())
    assert [path.name for path in parts] == ["a.pt.1", "a.pt.2", "a.pt.3", "a.pt.4"]
    (tmp_path / "joined.pt").write_bytes(b"".join(path.read_bytes() for path in parts))
    loaded, _ = checkpoint.load(tmp_path / "joined.pt")
    assert all((loaded.state_dict()[name] - weight).abs().max() < 1e-2
               for name, weight in model.state_dict().items())
    visit.take_home("b", tmp_path / "best.pt")
    visit.take_home("c", tmp_path / "best.pt")                     # would be too many
    assert len(list(back.iterdir())) == 8
    visit.take_home("d", tmp_path / "there-is-none.pt")


def test_the_plan_and_what_is_refused(tmp_path, monkeypatch):
    done = call("studies/gpu.py", "--plan", cwd=tmp_path)
    names = [item.name for stage in gpu.items(gpu.FULL).values() for item in stage]
    assert done.returncode == 0 and len(set(names)) == len(names)
    lines = [line.split(None, 2) for line in done.stdout.splitlines() if line.startswith("   ")]
    assert [line[2] for line in lines] == names and not list(tmp_path.iterdir())
    rows = {name.split()[1] for name in names if name.startswith("speed ")}
    assert rows == set(gpu.speed.ROWS)
    refused(call("studies/gpu.py", "--minutes", "0", cwd=tmp_path), "--minutes 0 must be above 0")
    refused(call("studies/gpu.py", "--packs", "people-1.zip", cwd=tmp_path), "there is no file people-1.zip")
    (tmp_path / "people-2.zip").write_bytes(b"")
    (tmp_path / "people-1.zip").write_bytes(b"not a zip file")
    words = "studies/gpu.py", "--device", "cpu", "--rehearse", "--packs"
    refused(call(*words, "people-2.zip", cwd=tmp_path), "name people-1.zip first")
    refused(call(*words, "people-1.zip", cwd=tmp_path), "people-1.zip is no pack of people")
    refused(call("studies/gpu.py", "--save", "h100", cwd=tmp_path), "nothing was found yet")


def test_speeds_become_an_entry_of_results(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    timing = gpu.speed.Timing("cc-none", "gs", "graph", "tf32", 64, 3.0, 2.0, 4.0, 0.5, 0.0)._asdict()
    gpu.save("card", {"card": dict(machine="a card", rates=dict(tf32=1e14)), "step teacher": dict(step=300.0),
                      "speed cc-none 64": dict(timings=[timing]), "step cc-gs-none": dict(error="no memory")})
    entry = results.read("speed")["speed-card"]
    assert entry["timings"] == [timing] and entry["training"] == [dict(step=300.0)]
