"""results/: an entry is what its run's result.json says; nothing is lost where processes add at once."""

import json
from multiprocessing import get_context

import pytest

import results

JOINTS = ("head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle", "mean", "mean_unweighted")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def scores(half, tenth):
    return {"pckh@0.5": dict.fromkeys(JOINTS, half), "pckh@0.1": dict.fromkeys(JOINTS, tenth)}


def made(**more):
    """The content of a result.json of three epochs, the second and the third of them scored."""
    log = [{"epoch": 1, "lr": 0.1, "task": 1.0, "loss": 3.0, "images_per_second": 100.0},
           {"epoch": 2, "lr": 0.1, "task": 1.0, "loss": 2.0, "images_per_second": 300.0,
            "pckh@0.5": 40.0, "pckh@0.1": 2.0},
           {"epoch": 3, "lr": 0.1, "task": 1.0, "loss": 1 / 3, "images_per_second": 200.0,
            "pckh@0.5": 50.0, "pckh@0.1": 4.0}]
    arguments = {"student": "cc", "data": ["/home/me/lspet"], "teacher": "/home/me/runs/t/best.pt",
                 "init": None, "amp": False, "compile": True, "seed": 0, "out": "/home/me/runs/x",
                 "device": "cuda:1", "distill": True, "select": ["lspet"], "changes": []}
    return {"arguments": arguments, "network": "cc", "metadata": {}, "scores": scores(50.0, 4.0),
            "flip_test": scores(52.0, 5.0), "torch": "2", "log": log, **more}


def test_an_entry_goes_to_its_studys_file_and_comes_back():
    results.add("drawn-x", results.entry_of(made()))
    results.add("drawn-a", results.entry_of(made()))
    results.add("parts-x", {"log": {}})
    assert list(results.read("drawn")) == ["drawn-a", "drawn-x"]
    assert list(results.read("parts")) == ["parts-x"]
    assert results.result("drawn-y") is None and results.result("paper-x") is None
    assert results.result("drawn-x") == {
        "arguments": {"student": "cc", "data": "lspet", "teacher": "best.pt", "compile": True, "seed": 0,
                      "changes": []},
        "scores": scores(50.0, 4.0), "flip_test": scores(52.0, 5.0), "images_per_second": 200,
        "log": {"epoch": [2, 3], "loss": [2.0, 0.33333333], "pckh@0.5": [40.0, 50.0], "pckh@0.1": [2.0, 4.0]}}


def test_a_changed_run_keeps_what_the_tables_ask_of_it():
    entry = results.entry_of(made(confidence=dict(ece=0.1, auroc=0.8, curve=[[0.5, 0.4, 10]]),
                                  dynamic=dict(blocks=[dict(dead=27 / 72)], live=50.0, frozen=49.0)))
    assert entry["confidence"] == dict(ece=0.1, auroc=0.8)
    assert entry["dynamic"] == dict(blocks=[dict(dead=0.375)], live=50.0, frozen=49.0)


def test_several_validation_sets():
    both = made(scores={"lspet": scores(50.0, 4.0), "coco": scores(30.0, 2.0)},
                flip_test={"lspet": scores(52.0, 5.0), "coco": scores(34.0, 3.0)})
    both["arguments"]["data"] = ["/home/me/lspet", "coco"]
    for line, value in zip(both["log"][1:], (20.0, 30.0)):
        line["coco@0.5"] = value
    results.add("photos-x", results.entry_of(both))
    entry = results.result("photos-x")
    assert entry["arguments"]["data"] == ["lspet", "coco"] and entry["log"]["coco@0.5"] == [20.0, 30.0]
    assert results.pckh(entry, data="coco") == 30 and results.pckh(entry, data="lspet") == 50
    with pytest.raises(KeyError):
        results.pckh(entry, data="mpii")
    assert results.pckh(entry) == 40 and results.pckh(entry, 0.1, "hip", "flip_test") == 4
    assert results.pckh(results.entry_of(made()), 0.1, "hip", "flip_test", data="lspet") == 5


def test_a_run_is_some_lines_and_a_list_of_objects_has_a_line_for_each(folder):
    results.add("speed-x", {"machine": "M", "timings": [{"fps": 1}, {"fps": 2}]})
    results.add("speed-y", {"machine": "M", "timings": []})
    assert (folder / "speed.json").read_text().splitlines() == [
        "{", '"speed-x": {', ' "machine": "M",', ' "timings": [', '  {"fps": 1},', '  {"fps": 2}]},',
        '"speed-y": {', ' "machine": "M",', ' "timings": []}', "}"]
    assert json.loads((folder / "speed.json").read_text())["speed-x"]["timings"][1] == {"fps": 2}


def add_some(process):
    for number in range(25):
        results.add(f"drawn-{process}-{number}", {"log": {"epoch": [number]}})


def test_processes_that_finish_at_once_lose_nothing():
    processes = [get_context("fork").Process(target=add_some, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert len(results.read("drawn")) == 100 and all(process.exitcode == 0 for process in processes)


def test_an_entry_that_cannot_be_written_leaves_the_others():
    results.add("drawn-x", {"log": {}})
    with pytest.raises(TypeError):
        results.add("drawn-y", {"log": {1, 2}})
    assert results.read("drawn") == {"drawn-x": {"log": {}}}
