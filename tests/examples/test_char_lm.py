"""The language model of the examples: its text, training, searches and reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import _char_lm as language
import _scheduled as scheduled
import train_char_lm as example
from _training import Contender, Task
from tests.support.examples import run_example


@pytest.fixture(scope="module")
def text() -> language.Text:
    return language.load_text(torch.device("cpu"))


def tiny(text: language.Text, seed: int = 0) -> Task:
    """A tiny network on the beginnings of both texts."""
    short = language.Text(text.characters, text.training[:4000], text.validation[:1000])
    torch.manual_seed(seed)
    return language.make_task(short, language.Transformer(len(text.characters), 8), seed)


@pytest.fixture
def task(text: language.Text) -> Task:
    return tiny(text)


def train(task: Task, name: str, rate: float | None, steps: int) -> scheduled.Scheduled:
    return scheduled.train(task, example.CONTENDERS[name], rate, steps=steps)


@pytest.mark.slow
def test_the_main_job_prints_table_winners_and_samples_and_draws_a_plot(tmp_path: Path) -> None:
    done = run_example(
        *("--seconds", "0.3", "--width", "8", "--characters", "20000", "--threads", "1"),
        *("--optimizers", "adamw,soap,sophia-gnb", "--seeds", "2", "--layers", "1"),
        *("--json", "results.json"),
        cwd=tmp_path,
        script="train_char_lm.py",
    )
    assert done.returncode == 0, done.stderr
    assert "18,000 characters for training, 2,000 held out" in done.stdout
    assert "transformer of width 8, layers: 1," in done.stdout
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("optimizer"))
    header = ["lr", "steps", "ms", "per", "step", "training", "validation", "validation,"]
    assert lines[start].split()[1:9] == header
    adamw, soap, sophia = lines[start + 2 : start + 5]
    assert adamw.startswith("AdamW") and adamw.split()[-1] == "-" and "±" in adamw
    assert soap.startswith("SOAP (ours)")
    assert sophia.startswith("Sophia gnb (ours)") and sophia.split()[-1].endswith("%")
    assert lines[start + 5].startswith("In 0.3 s each: ")
    assert " steps each: " in lines[start + 6]
    assert done.stdout.count("\n--- ") == 3
    assert (tmp_path / "train_char_lm.png").read_bytes().startswith(b"\x89PNG")
    assert "100%" in done.stderr  # a progress bar
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    found = results["examples.train_char_lm.SOAP (ours)"]
    assert f"{found['validation loss']:.3f} ±" in soap


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["train_char_lm.py", *map(str, arguments)])
    example.main()


TINY = ("--width", "4", "--layers", "1", "--characters", "8000")


def test_the_steps_that_others_need_are_printed_and_plotted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(example, "SHARES", (0.5, 1.0, 3.0))
    plot, file = tmp_path / "reach.png", tmp_path / "reach.json"
    arguments = ("--reach", "4", "--optimizers", "soap", "--seeds", "2", *TINY)
    main(monkeypatch, *arguments, "--out", plot, "--json", file)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("AdamW, 4 steps: validation ")
    assert lines[2].endswith(", the target")
    assert any(line.startswith("SOAP (ours), 1 of the steps: validation ") for line in lines)
    assert lines[-4].startswith("-----")
    assert lines[-3].split()[0] == "AdamW" and lines[-3].split()[3:5] == ["4", "1.00"]
    assert lines[-2].startswith("SOAP (ours)")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    adamw = results["examples.train_char_lm.reach.width 4.AdamW"]
    assert adamw["steps"] == 4
    assert f"{adamw['validation loss']:.3f}" in lines[-3]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_search_prints_losses_and_rates_for_every_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "GRID", example.GRID[5:8])
    monkeypatch.setattr(example, "tuned_rate", lambda *_: example.GRID[1])
    widths = ("--width", "4,8", *TINY[2:])
    main(monkeypatch, "--tune", "2", "--optimizers", "adamw", *widths)
    lines = capsys.readouterr().out.splitlines()
    tried = [line for line in lines if line.startswith("AdamW  lr ")]
    assert len(tried) == 6
    assert all("validation" in line and "(2 steps, " in line for line in tried)
    assert lines[-3] == "for RATES:"
    for width, line in zip((4, 8), lines[-2:], strict=True):
        assert line.startswith(f'    ({width}, 1): {{"adamw": ') and line.endswith("},")


def test_the_text_is_english_and_the_validation_part_is_separate(text: language.Text) -> None:
    def words(numbers: torch.Tensor) -> str:
        return "".join(text.characters[number] for number in numbers)

    training, validation = words(text.training), words(text.validation)
    assert len(training) > 200_000
    assert len(validation) == pytest.approx((len(training) + len(validation)) / 10, abs=1)
    assert " the " in training and " the " in validation
    paragraphs = [p for p in validation.split("\n\n")[1:] if len(p) > 80]
    assert len(paragraphs) > 20
    assert not any(f"\n\n{p}\n\n" in training for p in paragraphs)


def test_predictions_do_not_depend_on_later_characters(text: language.Text) -> None:
    model = language.Transformer(len(text.characters), 8)
    one = text.training[None, : language.CONTEXT]
    other = one.clone()
    other[:, 40:] = (other[:, 40:] + 1) % len(text.characters)
    before, after = model(one), model(other)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_the_rate_rises_to_its_peak_and_falls_to_its_floor() -> None:
    rates = [scheduled.schedule(i / 1000) for i in range(1100)]
    peak = rates.index(1.0)
    assert peak == 1000 * scheduled.RISE
    assert rates[0] == 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[1000] == rates[-1] == pytest.approx(scheduled.FLOOR)


@pytest.mark.parametrize("name", example.CONTENDERS)
def test_an_optimizer_follows_the_schedule(name: str, task: Task) -> None:
    run = train(task, name, example.tuned_rate(name, 64, 2), steps=40)
    assert run.steps == run.curve.steps[-1] == 40
    assert run.evaluations > 40 if name == "adasecant" else run.evaluations == 40
    assert run.curve.steps[0] == 0
    assert len(run.curve.score) == len(run.curve.steps) == scheduled.MEASUREMENTS + 1
    assert run.curve.score[-1] < run.curve.score[0] - 0.3
    clips = name == "kfac" or "sophia" in name
    assert len(run.unclipped) == (scheduled.MEASUREMENTS if clips else 0)
    assert all(0 < share <= 1 for share in run.unclipped[1:])


def test_a_run_ends_when_its_loss_is_not_finite(task: Task) -> None:
    chosen = Contender("SGD", lambda p: torch.optim.SGD(p), 4)
    run = scheduled.train(task, chosen, 1e30, steps=30)
    assert run.steps < 30
    assert run.final == math.inf


def test_weight_decay_applies_to_matrices_only(task: Task) -> None:
    for name, contender in example.CONTENDERS.items():
        matrices, vectors = contender.make(task.model.parameters()).param_groups
        decay = 0.0 if name == "adasecant" else example.WEIGHT_DECAY
        assert matrices["weight_decay"] == decay and vectors["weight_decay"] == 0
        assert {p.dim() for p in matrices["params"]} == {2}
        assert {p.dim() for p in vectors["params"]} == {1}


def test_optimizers_get_equal_time_and_then_equal_steps(text: language.Text) -> None:
    rates = {"adamw": 4e-3, "soap": 4e-3}
    by_time, by_steps = example.compare([tiny(text, 1), tiny(text, 2)], rates, seconds=0.1)
    assert all(run.seconds >= 0.1 for runs in by_time.values() for run in runs)
    fewest = min(run.steps for runs in by_time.values() for run in runs)
    for runs in by_steps.values():
        assert [run.steps for run in runs] == [fewest, fewest]
        assert runs[0].curve.score[0] != runs[1].curve.score[0]  # another network
    assert by_steps["adamw"][0].curve.score[0] == by_steps["soap"][0].curve.score[0]


def test_learning_rates_belong_to_the_grid() -> None:
    tuned = {name for rates in example.RATES.values() for name in rates}
    assert tuned == example.CONTENDERS.keys() - example.UNTUNED
    for rates in example.RATES.values():
        # A rate at the end of the grid would say that the grid is too short.
        assert set(rates.values()) <= set(example.GRID[1:-1])


def test_the_rate_of_the_nearest_size_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {(64, 2): {"adamw": 1e-3, "soap": 2e-3}, (128, 4): {"adamw": 4e-3}}
    monkeypatch.setattr(example, "RATES", rates)
    assert example.tuned_rate("adamw", 64, 2) == example.tuned_rate("adamw", 32, 1) == 1e-3
    assert example.tuned_rate("adamw", 256, 4) == 4e-3
    assert example.tuned_rate("soap", 256, 4) == 2e-3
    assert example.tuned_rate("kfac", 64, 2) in example.GRID
    assert example.tuned_rate("adasecant", 64, 2) is None


@pytest.mark.parametrize("best", range(len(example.GRID)))
def test_the_search_ends_at_the_best_rate_and_its_neighbors(best: int) -> None:
    asked = []

    def loss_at(rate: float) -> float:
        asked.append(rate)
        return abs(example.GRID.index(rate) - best)

    losses = example.search(loss_at, example.GRID[5])
    assert min(losses, key=lambda rate: losses[rate]) == example.GRID[best]
    assert set(example.GRID[max(0, best - 1) : best + 2]) <= losses.keys()
    assert len(asked) == len(losses) == len(set(asked))
    assert len(asked) <= abs(best - 5) + 4


def test_the_search_leaves_rates_that_diverge() -> None:
    def loss_at(rate: float) -> float:
        return rate if rate < 1e-3 else math.inf

    losses = example.search(loss_at, example.GRID[-1])
    assert min(losses, key=lambda rate: losses[rate]) == example.GRID[0]


def test_the_shortest_sufficient_share_is_found() -> None:
    for share in example.SHARES:
        asked = []

        def sufficient(tried: float, share: float = share, asked: list[float] = asked) -> bool:
            asked.append(tried)
            return tried >= share

        assert example.shortest(sufficient) == share
        assert share in asked  # its runs exist
        assert len(asked) <= 4
    assert example.shortest(lambda _: False) is None


def test_the_shortest_run_that_reaches_the_baseline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(task: float, chosen: Contender, rate: float, *, steps: int, note: str) -> object:
        loss = {"AdamW": 1.5, "SOAP (ours)": 2.1 - steps / 100, "KFAC (ours)": 9.0}[chosen.label]
        curve = SimpleNamespace(score=[4.0, loss + task])
        seconds = steps * (1.0 if chosen.label == "AdamW" else 1.2)
        return SimpleNamespace(
            steps=steps, seconds=seconds, final=loss + task, rate=rate, curve=curve
        )

    monkeypatch.setattr(example, "train", run)
    rates = {"adamw": 1e-3, "soap": 2e-3, "kfac": 4e-3}
    reached = example.reach([-0.01, 0.01], rates, 100)  # type: ignore[list-item]
    assert [found.share for found in reached.values()] == [1.0, 0.6, None]
    assert [found.runs[0].steps for found in reached.values()][:2] == [100, 60]
    capsys.readouterr()
    example.print_reached(reached)
    _, _, adamw, soap, kfac = capsys.readouterr().out.splitlines()
    assert " ".join(adamw.split()) == "AdamW 0.001 1000.0 100 1.00 100.0 1.00 1.500 ± 0.014"
    assert " ".join(soap.split()[2:]) == "0.002 1200.0 60 0.60 72.0 0.72 1.500 ± 0.014"
    assert kfac.split()[2:9] == ["0.004", "1200.0", "more", "than", "150", "-", "-"]


def ended(*losses: float) -> list[scheduled.Scheduled]:
    return [SimpleNamespace(final=loss) for loss in losses]  # type: ignore[misc]


def test_the_verdict_names_the_lowest_loss() -> None:
    results = {"adamw": ended(1.5), "soap": ended(1.2), "kfac": ended(1.3)}
    said = example.verdict(results, "In 3 s each")
    assert said == "In 3 s each: SOAP (ours) wins, 0.100 nats per character below KFAC (ours)\n"
    assert example.verdict({"adamw": ended(1.5)}, "In 3 s each") == ""
    assert example.verdict(results | {"adamw": ended(math.inf)}, "In 3 s each") == said


def test_differences_within_the_spread_of_seeds_are_no_win() -> None:
    one = {"adamw": ended(1.2), "soap": ended(1.2 - example.GAP / 2)}
    said = example.verdict(one, "In 9 steps each")
    assert said.startswith("In 9 steps each: SOAP (ours) and AdamW are equal")
    wide = {"adamw": ended(1.2, 1.4), "soap": ended(1.19, 1.3)}
    assert " are equal, 0.055 nats" in example.verdict(wide, "In 9 steps each")
    narrow = {"adamw": ended(1.2, 1.2), "soap": ended(1.19, 1.19)}
    assert "SOAP (ours) wins, 0.010 nats" in example.verdict(narrow, "In 9 steps each")


def test_a_sample_continues_the_training_text(text: language.Text) -> None:
    model = language.Transformer(len(text.characters), 8)
    sample = language.write(model, text, seed=3)
    assert len(sample) == language.SAMPLE
    assert sample == language.write(model, text, seed=3) != language.write(model, text, seed=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adamw,sofia"], "unknown optimizer 'sofia'; known: adamw, soap"),
        (["--width", "30"], "30 is not a positive multiple of 4"),
        (["--width", "wide"], "wide is not a list of integers"),
        (["--width", "64,128"], "several widths need --tune"),
        (["--reach", "--optimizers", "adamw"], "--reach needs another optimizer than adamw"),
    ],
)
def test_mistakes_are_reported_before_any_work(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_a_text_without_a_held_out_part_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="600 characters are too few"):
        main(monkeypatch, "--characters", "600")
