"""Figures of benchmarks: files, comparison, and the documents that quote them."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.processes import ROOT

# Settings, not measurements: defaults and limits that a page states.
SETTINGS = {"95%", "64 MiB", "256 MiB", "15 seconds"}
# The dated records of decisions, and pages that are generated.
EXEMPT = {"design.md", "benchmarks.md", "errors.md", "gallery.md"}

TIMING = {"median": 2e-3, "min": 1e-3, "lower": 1.5e-3, "upper": 3e-3, "max": 4e-3, "rounds": 5}
RATIO = {"of_medians": 0.5, "minimum": 0.4, "median": 0.6, "maximum": 0.7}
RESULTS = {
    "direction.1000": {"ours": TIMING, "ratio": RATIO, "floor": None, "ours / floor": math.nan},
    "problems": {
        "wood": {"LBFGS (ours)": {"evaluations": 100, "solved": True, "value": 1e-9}},
        "beale": {"LBFGS (ours)": {"evaluations": 20, "solved": False, "time": 0.25}},
    },
    "runs": {"ours": [{"seconds": {"1e-5": float(n)}, "ended": "done"} for n in (1, 2, 4)]},
    "failures": {"ours": {"unsolved": ["wood", "beale"]}, "torch": {"unsolved": []}},
    "course": {"history": [1.0, 0.5], "peak": 2048, "text": "no number"},
}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package `benchmarks.data` with its modules."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    package = importlib.import_module("benchmarks.data")
    for name in ("figures", "documents", "compare", "release", "profiles", "svg", "publish"):
        importlib.import_module(f"benchmarks.data.{name}")
    return package


def record(data: Any, figures: dict[str, Any], version: str = "0.2.0", **more: Any) -> Any:
    environment = {"version": version, "processor": "AMD EPYC", "threads": 1} | more
    made = {
        name: data.figures.Figure(value, unit="ratio") if isinstance(value, float) else value
        for name, value in figures.items()
    }
    return data.figures.Record("lbfgs", "python scripts/bench.py lbfgs", environment, made)


def test_results_become_figures_with_units_and_spreads(data: Any) -> None:
    found = data.figures.flatten(RESULTS)
    assert {name: (f.value, f.unit, f.rounds) for name, f in found.items()} == {
        "course.peak": (2048, "B", 1),
        "direction.1000.ours": (2e-3, "s", 5),
        "direction.1000.ratio": (0.5, "ratio", 1),
        "failures.ours.unsolved": (2, "count", 1),
        "failures.torch.unsolved": (0, "count", 1),
        "problems.beale.LBFGS_ours.evaluations": (20, "count", 1),
        "problems.beale.LBFGS_ours.solved": (0, "bool", 1),
        "problems.beale.LBFGS_ours.time": (0.25, "s", 1),
        "problems.wood.LBFGS_ours.evaluations": (100, "count", 1),
        "problems.wood.LBFGS_ours.solved": (1, "bool", 1),
        "runs.ours.seconds.1e-5": (2.0, "s", 3),
    }
    ours, runs = found["direction.1000.ours"], found["runs.ours.seconds.1e-5"]
    assert ours.spread == {"min": 1e-3, "lower": 1.5e-3, "upper": 3e-3, "max": 4e-3}
    assert runs.spread == {"min": 1.0, "lower": 1.5, "upper": 3.0, "max": 4.0}
    assert (found["direction.1000.ratio"].low, found["direction.1000.ratio"].high) == (0.4, 0.7)


def test_a_file_has_a_line_for_each_figure_and_is_read_as_it_was_written(
    data: Any, tmp_path: Path
) -> None:
    found = data.figures.flatten(RESULTS)
    only_a_range = data.figures.Figure(math.nan, "ratio", {"min": 0.3, "max": 0.4})
    made = record(data, {**found, "n.20": 1.0 / 3.0, "n.100": 2.0, "range": only_a_range})
    file = tmp_path / "lbfgs.json"
    made.write(file)
    text = file.read_text(encoding="utf-8")
    assert '\n  "n.20": {"value": 0.33333, "unit": "ratio"},\n' in text
    assert text.index('"n.20"') < text.index('"n.100"')
    again = data.figures.Record.read(file)
    assert str(again) == text
    assert dict(again.figures)["direction.1000.ours"] == found["direction.1000.ours"]
    assert math.isnan(again.figures["range"].value)
    assert (again.version, again.machine, again.device) == ("0.2.0", "AMD EPYC", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["lbfgs.json"]


def test_nested_results_are_read_too(data: Any, tmp_path: Path) -> None:
    file = tmp_path / "raw.json"
    environment = {"device": "NVIDIA H100 80GB HBM3"}
    results = {"direction.1000": {"ours": TIMING}}
    file.write_text(json.dumps({"environment": environment, "results": results}), "utf-8")
    found = data.figures.Record.read(file)
    assert list(found.figures) == ["direction.1000.ours"]
    assert (found.version, found.machine) == ("0.1.0", "H100")


@pytest.mark.parametrize(
    ("value", "unit", "spec", "shown"),
    [
        (5.21e-5, "s", "", "52.1 us"),
        (0.9, "s", "time2", "900 ms"),
        (123.0, "s", "time2", "120 s"),
        (3e-10, "s", "time2", "0.30 ns"),
        (1856, "count", "", "1,856"),
        (2.6e-6, "1", ".1e", "2.6e-6"),
        (0.4, "ratio", "inverse .1f", "2.5"),
        (0.123, "ratio", ".0%", "12%"),
        (552, "B", "", "552 bytes"),
        (20480, "B", "", "20 KiB"),
        (1_040_000, "B", "", "1,016 KiB"),
        (9_900_000, "B", "", "9.44 MiB"),
        (1e-7, "1", "", "1e-7"),
        (53.0, "count", "d", "53"),
    ],
)
def test_numbers_as_text(data: Any, value: float, unit: str, spec: str, shown: str) -> None:
    assert data.documents.form(value, unit, spec) == shown


def test_markers_are_filled_and_stay(data: Any) -> None:
    spread = data.figures.Figure(0.5, "ratio", {"min": 0.25, "max": 1.0})
    here = record(data, {"a.b": 0.47, "c": 0.94, "wide": spread})
    gpu = record(data, {"a.b": 0.26}, device="NVIDIA H100")
    figures = data.figures.Figures([here, gpu])
    text = (
        "at <!-- figure: a.b -->old<!-- /figure --> and <!-- figure: a.b / c; .1f --><!-- /figure "
        "-->,\n| <!-- figure: wide:max; .0f -->9<!-- /figure --> | "
        "<!-- figure: a.b@h100 -->8<!-- /figure --> |\n"
    )
    filled = data.documents.fill(text, figures)
    assert filled == (
        "at <!-- figure: a.b -->0.47<!-- /figure --> and <!-- figure: a.b / c; .1f -->0.5<!-- "
        "/figure -->,\n| <!-- figure: wide:max; .0f -->1<!-- /figure --> | "
        "<!-- figure: a.b@h100 -->0.26<!-- /figure --> |\n"
    )
    assert data.documents.fill(filled, figures) == filled
    assert data.documents.without_figures(filled) == "at  and ,\n|  |  |\n"


def test_a_row_of_a_table_is_of_one_version(data: Any, tmp_path: Path) -> None:
    old = record(data, {"a": 0.1, "b": 0.2}, version="0.9.0")
    new = record(data, {"a": 0.3}, version="0.10.0")
    figures = data.figures.Figures([old, new])
    (tmp_path / "t.md").write_text(
        "| | measured |\n|---|---|\n| {{a}} | {{measured}} |\n| {{a}} {{b}} | {{measured}} |\n"
        "- first {{b}}\n  second {{ a ; .1f }} ({{measured}})\n",
        encoding="utf-8",
    )
    text = "x\n\n<!-- generated: t -->\nold\n<!-- /generated -->\n"
    filled = data.documents.fill(text, figures, tmp_path)
    assert filled == (
        "x\n\n<!-- generated: t -->\n\n| | measured |\n|---|---|\n"
        "| 0.30 | 0.10.0, AMD EPYC, 1 thread |\n"
        "| 0.10 0.20 | *0.9.0, AMD EPYC, 1 thread* |\n"
        "- first 0.20\n  second 0.1 (*0.9.0, AMD EPYC, 1 thread*)\n\n<!-- /generated -->\n"
    )
    assert data.documents.fill(filled, figures, tmp_path) == filled


def test_rows_say_that_other_work_was_done(data: Any) -> None:
    label = data.documents.label
    quiet, busy = (record(data, {}, load=load, cores=2) for load in (2.9, 3.1))
    assert label([quiet], "0.2.0") == "0.2.0, AMD EPYC, 1 thread"
    stopped = replace(quiet, note="Incomplete: stopped after 1 s.")
    assert label([stopped], "0.2.0") == "0.2.0, AMD EPYC, 1 thread, not all of it"
    counted = replace(busy, note=data.figures.COUNTS)
    assert label([quiet, counted], "0.2.0") == "0.2.0, AMD EPYC, 1 thread"
    assert label([quiet, busy], "0.2.0") == "0.2.0, AMD EPYC, 1 thread, beside other work"


def test_errors_of_markers_say_what_is_wrong(data: Any, tmp_path: Path) -> None:
    only = data.figures.Figure(math.nan, "ratio", {"min": 0.1, "max": 0.2})
    new = record(data, {"a.first": 0.3, "a.second": 0.4, "range": only})
    figures = data.figures.Figures([new, record(data, {"b": 0.1}, version="0.1.0")])

    def fill(text: str) -> None:
        data.documents.fill(text, figures, tmp_path)

    with pytest.raises(KeyError, match=r"no figure a\.third; there are a\.first, a\.second"):
        fill("<!-- figure: a.third -->1<!-- /figure -->")
    with pytest.raises(KeyError, match=r"no version has all of a\.first, b"):
        fill("<!-- figure: a.first / b -->1<!-- /figure -->")
    with pytest.raises(ValueError, match="1 markers are opened, and 0 of them closed"):
        fill("<!-- figure: a.first -->1")
    with pytest.raises(ValueError, match=r"the block gone has no template gone\.md"):
        fill("<!-- generated: gone -->\n<!-- /generated -->")
    with pytest.raises(ValueError, match="only the range of a figure is known"):
        fill("<!-- figure: range -->1<!-- /figure -->")


def test_documents_and_plots_show_the_figures_of_today(
    data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = data.publish.publish(check=True)
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    assert not stale, f"run `python scripts/bench.py tables`: out of date are {names}"
    assert bench(monkeypatch, "tables", "--check") == 0


def test_files_of_figures_are_as_they_would_be_written(data: Any) -> None:
    files = [p for p in data.publish.FIGURES.glob("[0-9]*/*.json") if "results" not in load(p)]
    assert files
    for file in files:
        assert str(data.figures.Record.read(file)) == file.read_text(encoding="utf-8"), file


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def test_no_figure_of_a_document_escapes(data: Any) -> None:
    loose = {}
    for path in data.documents.documents(ROOT):
        if path.name in EXEMPT:
            continue
        found = data.documents.loose_figures(
            path.read_text(encoding="utf-8"), decimals=path.name == "README.md"
        )
        if left := [figure for figure in found if figure not in SETTINGS]:
            loose[str(path.relative_to(ROOT))] = left
    assert not loose, f"figures without a marker, see benchmarks/data/documents.py: {loose}"


def test_loose_figures_are_found(data: Any) -> None:
    text = (
        "It takes 52 us, 0.9 of it, 1.5 times as long, 10% more; see <!-- figure: a -->3 s<!-- "
        "/figure --> and `4 s`.\n```text\n5 s\n```\nPython 3.10, torch 2.11, version 0.2.0, 28 "
        "problems to 1e-6, 20,000 steps, [5 s](6s.md)\n"
    )
    assert data.documents.loose_figures(text) == ["52 us", "1.5 times", "10%", "5 s"]
    assert data.documents.loose_figures("0.9 of it; Python 3.10", decimals=True) == ["0.9"]


def test_publish_writes_what_is_out_of_date(data: Any, tmp_path: Path) -> None:
    folder = tmp_path / "scripts" / "benchmarks" / "figures"
    (folder / "0.2.0").mkdir(parents=True)
    record(data, {"a": 0.5}).write(folder / "0.2.0" / "a.json")
    (folder / "other.json").write_text("[]")  # what is not in a folder of a version is others'
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("<!-- figure: a -->0.4<!-- /figure -->", encoding="utf-8")
    publish = data.publish.publish
    assert publish(check=True, root=tmp_path, tables=tmp_path) == [readme]
    assert "0.4" in readme.read_text(encoding="utf-8")
    assert publish(root=tmp_path, tables=tmp_path) == [readme]
    assert "0.50" in readme.read_text(encoding="utf-8")
    assert publish(root=tmp_path, tables=tmp_path) == []
    readme.write_text("<!-- figure: b -->0.4<!-- /figure -->", encoding="utf-8")
    with pytest.raises(KeyError, match=r"README\.md: there is no figure b"):
        publish(root=tmp_path, tables=tmp_path)


def sets(data: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of figures: one got worse, one better, one stayed within its spread."""
    Figure = data.figures.Figure
    wide = {"min": 1.0, "lower": 1.5, "upper": 2.5, "max": 3.0}
    before = {
        "slow.time": Figure(1.0, "s", {"min": 0.9, "max": 1.05}, 5),
        "noisy.time": Figure(2.0, "s", wide, 5),
        "ours.solved": Figure(26, "count"),
        "sizes.n": Figure(10, "count"),
        "lost": Figure(1.0),
    }
    after = {
        "slow.time": Figure(1.2, "s", {"min": 1.1, "max": 1.3}, 5),
        "noisy.time": Figure(2.4, "s", wide, 5),
        "ours.solved": Figure(28, "count"),
        "sizes.n": Figure(20, "count"),
        "more": Figure(1.0),
    }
    folders = (tmp_path / "old", tmp_path / "new")
    for folder, figures in zip(folders, (before, after), strict=True):
        folder.mkdir()
        record(data, figures).write(folder / "a.json")
    return folders


def test_changes_are_judged_by_their_spread(data: Any, tmp_path: Path) -> None:
    old, new = (data.figures.Figures.read(path) for path in sets(data, tmp_path))
    found = {change.name: change for change in data.compare.changes(old, new)}
    assert {name: change.verdict for name, change in found.items()} == {
        "noisy.time": "within the spread",
        "ours.solved": "better",
        "sizes.n": "changed",
        "slow.time": "worse",
    }
    assert found["slow.time"].relative == pytest.approx(0.2)
    assert data.compare.missing(old, new) == ["lost"]
    assert [c.name for c in data.compare.regressions(list(found.values()), 0.1)] == ["slow.time"]
    assert data.compare.regressions(list(found.values()), 0.25) == []
    assert (data.compare.share("10%"), data.compare.share("0.1")) == (0.1, 0.1)
    with pytest.raises(ValueError, match="a share must not be negative, got -1%"):
        data.compare.share("-1%")


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs bench.py in this process."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    status: int = importlib.import_module("bench").main(list(arguments))
    return status


def test_compare_prints_a_table_and_fails_above_a_share(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = map(str, sets(data, tmp_path))
    assert bench(monkeypatch, "compare", old, new) == 0
    shown = capsys.readouterr().out
    assert "slow.time" in shown and "+20.0%" in shown and "noisy" not in shown
    assert "not in the new figures: 1, such as lost" in shown
    assert bench(monkeypatch, "compare", old, new, "--all", "--fail-above", "10%") == 1
    shown = capsys.readouterr().out
    assert "noisy.time" in shown and "worse by more than 10%: slow.time, +20.0%" in shown
    assert bench(monkeypatch, "compare", old, new, "--fail-above", "25%") == 0
    assert bench(monkeypatch, "compare", old, new, "--only", "noisy", "--fail-above", "0") == 0
    assert "nothing changed" in capsys.readouterr().out
    assert bench(monkeypatch, "compare", old, str(tmp_path / "gone")) == 2
    assert bench(monkeypatch, "compare", old, new, "--fail-above", "much") == 2


def test_profiles_are_shares_within_a_factor_of_the_best(data: Any) -> None:
    Figure, profiles = data.figures.Figure, data.profiles
    counts = {
        "one": {"A": 10, "B (ours)": 20},
        "two": {"A": 30, "B (ours)": 10},
        "three": {"A": 5, "B (ours)": None},
        "four": {"A": None, "B (ours)": None},
    }
    figures = {}
    for problem, row in counts.items():
        for solver, count in row.items():
            stem = f"set.{problem}.{data.figures.slug(solver)}"
            figures[f"{stem}.evaluations"] = Figure(count or 99, "count")
            figures[f"{stem}.solved"] = Figure(int(count is not None), "bool")
    figures["set.ratios.A.evaluations"] = Figure(1.0, "ratio")
    group = profiles.Set(
        "s",
        "Title",
        "{count} problems.",
        "set",
        "cmd",
        {"B (ours)": "B", "A": "A"},
        1,
        {"evaluations": "n"},
    )
    stored = data.figures.Figures([record(data, figures)])
    table = profiles.tables(stored, group)["n"]
    assert table == {
        "one": {"A": 10, "B": 20},
        "two": {"A": 30, "B": 10},
        "three": {"A": 5},
        "four": {},
    }
    assert profiles.profile(table, "A") == [(1.0, 0.5), (3.0, 0.75)]
    assert profiles.profile(table, "B") == [(1.0, 0.25), (2.0, 0.5)]
    assert profiles.share(table, "A", 2.9) == 0.5
    drawn = profiles.draw(stored, [group])
    assert list(drawn) == ["profile_s.svg"]
    assert drawn["profile_s.svg"].count("<path d=") >= 4
    page = profiles.sections(stored, "0.2.0", [group])
    assert "### Title\n\n4 problems.\n" in page
    assert "| B | 25% | 50% | 50% | 50% |" in page and "| A | 50% | 50% | 75% | 75% |" in page
    assert profiles.draw(data.figures.Figures([record(data, {"other": 1.0})]), [group]) == {}


def test_a_plot_ends_at_its_right_edge(data: Any) -> None:
    svg = data.svg
    line = svg.Line("a & b", [(1.0, 0.5), (4.0, 0.75), (1e9, 1.0)])
    text = svg.plot([svg.Panel("title", "x", [line], powers=4)], "share")
    right = svg.LEFT + svg.PANEL
    half, quarter = svg.TOP + svg.HEIGHT / 2, svg.TOP + svg.HEIGHT / 4
    middle = svg.LEFT + svg.PANEL / 2
    assert f'd="M{svg.LEFT:.1f} {half:.1f}H{middle:.1f}V{quarter:.1f}H{right}"' in text
    assert "a &amp; b" in text
    assert text == svg.plot([svg.Panel("title", "x", [line], powers=4)], "share")


def plan(data: Any, monkeypatch: pytest.MonkeyPatch, script: Path) -> list[Any]:
    """Parts of a script that stands in for bench.py."""
    script.parent.mkdir()
    script.write_text(
        "import json, sys, time\n"
        "name = sys.argv[1]\n"
        "figures = {'evaluations': 7, 'seconds': 0.5}\n"
        "environment = {'version': '0.2.0', 'peers': {'scipy': '1', 'jax': None}, 'cuda': None}\n"
        "document = {'environment': environment, 'results': {name: figures}}\n"
        "open(sys.argv[sys.argv.index('--json') + 1], 'w').write(json.dumps(document))\n"
        "time.sleep(60 if name == 'slow' else 0)\n"
        "sys.exit(name == 'bad')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(data.release, "ROOT", script.parents[1])
    monkeypatch.setattr(data.release, "GRACE", 0.5)
    Part = data.release.Part
    return [Part("good", "part", 60, counts=True), Part("slow", None, 0.7), Part("bad", None, 60)]


def test_a_part_may_be_an_example(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "examples" / "fit.py"
    script.parent.mkdir()
    script.write_text(
        "import json, sys\n"
        "assert sys.argv[1:3] == ['--seconds', '1'] and '--out' in sys.argv\n"
        "results = {'examples.fit.SOAP (ours)': {'error': 0.5}}\n"
        "file = sys.argv[sys.argv.index('--json') + 1]\n"
        "open(file, 'w').write(json.dumps({'results': results}))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(data.release, "ROOT", tmp_path)
    part = data.release.example("fit", 60, "--seconds", "1")
    assert data.release.release(tmp_path / "r", 1, plan=[part]) == {"fit": 0}
    found = data.figures.Record.read(tmp_path / "r" / "fit.json")
    assert found.command == "python examples/fit.py --seconds 1"
    assert found.figures["examples.fit.SOAP_ours.error"].value == 0.5
    assert found.environment["torch"]


def test_a_release_goes_on_where_it_ended(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, folder = plan(data, monkeypatch, tmp_path / "scripts" / "bench.py"), tmp_path / "0.2.0"

    def release(**options: Any) -> dict[str, int | str]:
        made: dict[str, int | str] = data.release.release(folder, plan=parts, **options)
        return made

    assert release(minutes=1, counts=True) == {"good part": 0}
    good = data.figures.Record.read(folder / "good.part.json")
    assert list(good.figures) == ["good.evaluations"]
    assert good.note == data.release.COUNTS
    assert good.environment == {"version": "0.2.0", "peers": {"scipy": "1"}}
    assert release(minutes=0) == dict.fromkeys(("good part", "slow", "bad"), "no time left")

    stopped = replace(good, note=f"Incomplete: stopped after 1 s. {data.figures.COUNTS}")
    stopped.write(folder / "good.part.json")
    assert release(minutes=1, counts=True) == {"good part": 0}
    assert release(minutes=1, counts=True) == {"good part": "there"}

    statuses = release(minutes=1)
    assert statuses == {"good part": 0, "slow": "stopped after 1 s", "bad": 1}
    good = data.figures.Record.read(folder / "good.part.json")
    assert list(good.figures) == ["good.evaluations", "good.seconds"]
    assert good.command == "python scripts/bench.py good --part part"
    assert data.figures.Record.read(folder / "slow.json").note == "Incomplete: stopped after 1 s."
    assert release(minutes=1, only="slow") == {"slow": "stopped after 1 s"}

    assert release(minutes=1, only="good") == {"good part": "there"}
    busy = {**good.environment, "load": 9.0, "cores": 2}
    replace(good, environment=busy).write(folder / "good.part.json")
    assert release(minutes=1, only="good") == {"good part": 0}
    assert release(minutes=1, only="good", again=True) == {"good part": 0}


def test_every_part_of_the_plan_exists(data: Any) -> None:
    registry = importlib.import_module("benchmarks").COMMANDS
    for part in data.release.PLAN:
        if part.script.startswith("examples/"):
            assert (ROOT / part.script).exists()
            continue
        if part.name == "iteration_costs" and part.name not in registry:
            continue
        command = registry[part.name]
        assert part.part in (command.parts or (None,)) or part.part is None, part.title
    titles = [part.title for part in data.release.PLAN]
    assert len(titles) == len(set(titles))
