"""Tables are what the results say, blank where nothing was run; the pages hold them."""

import pytest

import results
import sweep
import tables
from common import BadInput
from evaluate import GROUPS


@pytest.fixture
def put(tmp_path, monkeypatch):
    """A function that adds a run to an empty results/: its PCKh@0.5 of every joint, its mean PCKh@0.1."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")

    def add(name, half=0, tenth=0, **more):
        scores = {"pckh@0.5": dict.fromkeys((*GROUPS, "mean"), half), "pckh@0.1": {"mean": tenth}}
        results.add(name, {"arguments": {"data": "drawn"}, "scores": scores, "flip_test": scores,
                           "log": {"epoch": [8]}} | more)

    return add


def cells(text, *beginning):
    """The cells of the one row that begins so."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    row, = [row for row in rows if tuple(row[:len(beginning)]) == beginning]
    return row[len(beginning):]


def test_mean_spread_and_gain(put):
    for seed, value in enumerate((50, 52, 54)):
        put(f"drawn-cc-gd-distilled-{seed}", value, 5)
    put("drawn-cc-gd-alone-0", 40, 3)                     # the gain is that of the seed that both have
    row = ["40.0", "52.0 ± 2.0†", "+10.0", "3.0", "5.0 ± 0.0†", "+2.0"]
    assert cells(tables.drawn_table(), "cc", "gd")[:6] == row


def test_real_people_are_of_the_sets_that_the_runs_name(put):
    """Whatever the folders are called; a run of one set alone stands under its own name."""
    two = {name: {"pckh@0.5": {"mean": value}} for name, value in (("SPORTS", 20), ("STREET", 30))}
    put("photos-cc-gs-none-alone-0", scores=two, arguments={"data": ["SPORTS", "STREET"]})
    put("photos-cc-gd-none-terms-0", 40, arguments={"data": "MINE"})
    text = tables.real_people_table()
    head = text.splitlines()[0].split("|")
    names = [cell.split(":")[0].strip() for cell in head if "labels → terms" in cell]
    assert sorted(names) == ["MINE", "SPORTS", "STREET"]
    where = {name: 4 + n for n, name in enumerate(names)}          # behind labels, terms, gain, weights
    gs, gd = (cells(text, "cc", filter, "none") for filter in ("gs", "gd"))
    assert [gs[where[name]] for name in ("SPORTS", "STREET", "MINE")] == ["20.0", "30.0", ""]
    assert [gd[where[name]] for name in ("SPORTS", "STREET", "MINE")] == ["", "", "40.0"]
    assert gs[0] == "25.0" and gd[1] == "40.0"


def test_blank_where_nothing_was_run(put):
    assert cells(tables.drawn_table(), "reg", "gs")[:6] == [""] * 6
    assert cells(tables.TABLES["real"](), "cc", "gs", "none")[:4] == [""] * 4
    assert tables.parts_table("terms") == "(not measured yet)"
    row = cells(tables.paper_table(), "cc", "gd", "w32")
    assert row[0] == "87.67 → 89.25" and row[1] == row[3] == ""


def test_the_papers_rows_are_scored_with_flip_test(put):
    scores = {"pckh@0.5": {"mean": 71.0}}
    put("mpii-cc-gd-w32-alone", 70, 5, flip_test=scores)
    assert cells(tables.paper_table(), "cc", "gd", "w32")[1] == "71.0 →"


def test_cells_of_parts_say_what_is_asked_of_the_part(put):
    for seed, frozen in enumerate((48, 49)):
        put(f"parts-gd-{seed}", 50, 5,
            dynamic=dict(blocks=4 * [dict(deviation=0.06, dead=0.1)], live=50, frozen=frozen))
    row = ["2", "50.0 ± 0.0", "5.0 ± 0.0", "0.06, 0.06, 0.06, 0.06", "0.10, 0.10, 0.10, 0.10", "-1.50 ± 0.71"]
    assert cells(tables.parts_table("dynamic"),
                 "**1 + z**, z: the mean token, standardised over images") == row
    put("parts-reg-gs-all-0", 50, 5, confidence=dict(ece=0.125, auroc=0.8))
    put("parts-reg-gs-alone-0", 50, 5, confidence=dict(ece=0.7, auroc=0.5))
    assert cells(tables.parts_table("terms"), "reg gs: labels and all four")[-2:] == ["0.12", "0.80"]
    assert cells(tables.parts_table("terms"), "reg gs: labels alone")[-2:] == ["–", "–"]


def test_the_decisive_rows_are_some_of_all_rows(put):
    dynamic = dict(blocks=4 * [dict(deviation=0, dead=0)], live=50, frozen=50)
    for cell in ("gd", "gd-half"):
        put(f"parts-{cell}-0", 50, 5, dynamic=dynamic)
    whole = tables.parts_table("dynamic").splitlines()
    assert len(whole) == 4 and tables.parts_table("dynamic", decisive=True).splitlines() == whole[:3]


def test_real_people_by_column_and_set(put):
    by_set = {name: {"pckh@0.5": {"mean": score}, "pckh@0.1": {"mean": 1}}
              for name, score in (("lspet_refined", 30), ("everyday", 20), ("lsp", 40))}
    put("photos-cc-gs-none-alone-0", scores=by_set)
    put("photos-cc-gs-none-alone-1", scores=by_set)
    row = cells(tables.real_people_table(), "cc", "gs", "none")
    assert row[:4] == ["30.0 ± 0.0", "", "", ""] and row[4:7] == ["30.0", "20.0", "40.0"]
    put("photos-cc-gs-none-terms-0", scores={"lsp": {"pckh@0.5": {"mean": 36.5}}})
    assert cells(tables.headline_table(), "SimCC, static filter (GS)")[2:4] == ["30.0", "36.5"]


def test_hours_are_counted_and_measured_ones_stand_beside(put):
    """Teacher, by hand: 3 x 2 x 13.65 billion multiply-adds a picture, 300 x 22,246 pictures, 100 TFLOP/s."""
    put("mpii-cc-gs-w32-alone", 80, 20, images_per_second=1000)
    table = tables.hours_table()
    assert cells(table, "teacher") == ["82", "1.5", ""]
    pictures, hours, measured = cells(table, "cc gs w32")
    assert pictures == "43 / 70" and hours == "0.8 / 1.3" and measured == "1000 (1.9)"


def test_the_footnote_names_the_scored_epochs_of_each_seed(put):
    for seed, epochs in enumerate(([2, 4], [4], [4])):
        put(f"drawn-cc-gd-distilled-{seed}", 50, 5, log={"epoch": epochs})
    footnote = "Scored at epochs 4, of which the best counts; but 1 of 1 runs of seed 0 at 2, 4."
    assert footnote in tables.drawn_table()
    put("drawn-cc-gd-distilled-0", 50, 5, log={"epoch": [4]})
    assert "Scored at" not in tables.drawn_table()


def test_tables_are_written_within_their_marks(put, tmp_path):
    put("drawn-reg-gs-alone-0", 55.55, 7)
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "".join(f"<!-- table {name} -->\nold\n<!-- end -->\nafter {name}\n"
                                           for name in tables.TABLES))
    tables.write_tables(readme, tables.TABLES)
    once = readme.read_text()
    assert "old" not in once and "| reg | gs | 55.5" in once and once.startswith("before\n")
    assert all(f"after {name}" in once for name in tables.TABLES)
    tables.write_tables(readme, tables.TABLES)
    assert readme.read_text() == once
    readme.write_text("no marks")
    with pytest.raises(BadInput, match="has no place for the table 'headline'"):
        tables.write_tables(readme, tables.TABLES)


def test_the_pages_hold_what_the_results_say():
    assert sorted(sum(tables.PAGES.values(), ())) == sorted(tables.TABLES)
    for page, names in tables.PAGES.items():
        text = (sweep.ROOT / page).read_text()
        for name in names:
            assert tables.TABLES[name]() in text, f"{name} in {page}: run python studies/tables.py"
