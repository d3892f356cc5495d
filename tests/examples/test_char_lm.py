"""The language model of the examples: its text, training and report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_char_lm as example
from _training import Run, Task
from tests.support.examples import run_example


@pytest.fixture(scope="module")
def text() -> example.Text:
    return example.load_text(torch.device("cpu"))


@pytest.fixture
def task(text: example.Text) -> Task:
    """A tiny network on the beginnings of both texts."""
    short = example.Text(text.characters, text.training[:4000], text.validation[:1000])
    return example.make_task(short, example.Transformer(len(text.characters), 8), seed=0)


@pytest.mark.slow
def test_the_main_job_prints_table_winners_and_samples_and_draws_a_plot(tmp_path: Path) -> None:
    done = run_example(
        *("--seconds", "0.3", "--width", "2", "--characters", "20000", "--threads", "1"),
        *("--optimizers", "adamw,sophia-gnb"),
        cwd=tmp_path,
        script="train_char_lm.py",
    )
    assert done.returncode == 0, done.stderr
    assert "18,000 characters for training, 2,000 held out" in done.stdout
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("optimizer"))
    header = ["lr", "steps", "s/step", "training", "validation", "unclipped"]
    assert lines[start].split()[1:7] == header
    adamw, sophia = lines[start + 2 : start + 4]
    assert adamw.startswith("AdamW") and adamw.split()[-2] == "-"
    assert sophia.startswith("Sophia gnb (ours)") and sophia.split()[-2].endswith("%")
    assert lines[start + 4].startswith("In 0.3 s each: ")
    assert " steps each: " in lines[start + 5]
    assert done.stdout.count("\n--- ") == 2
    assert (tmp_path / "train_char_lm.png").read_bytes().startswith(b"\x89PNG")
    assert "100%" in done.stderr  # a progress bar


def test_the_text_is_english_and_the_validation_part_is_separate(text: example.Text) -> None:
    def words(numbers: torch.Tensor) -> str:
        return "".join(text.characters[number] for number in numbers)

    training, validation = words(text.training), words(text.validation)
    assert len(training) > 200_000
    assert len(validation) == pytest.approx((len(training) + len(validation)) / 10, abs=1)
    assert " the " in training and " the " in validation
    paragraphs = [p for p in validation.split("\n\n")[1:] if len(p) > 80]
    assert len(paragraphs) > 20
    assert not any(f"\n\n{p}\n\n" in training for p in paragraphs)


def test_predictions_do_not_depend_on_later_characters(text: example.Text) -> None:
    model = example.Transformer(len(text.characters), 8)
    one = text.training[None, : example.CONTEXT]
    other = one.clone()
    other[:, 40:] = (other[:, 40:] + 1) % len(text.characters)
    before, after = model(one), model(other)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_the_rate_rises_to_its_peak_and_falls_to_its_floor() -> None:
    rates = [example.schedule(i / 1000) for i in range(1100)]
    peak = rates.index(1.0)
    assert peak == 1000 * example.RISE
    assert rates[0] == 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[1000] == rates[-1] == pytest.approx(example.FLOOR)


@pytest.mark.parametrize("name", example.CONTENDERS)
def test_an_optimizer_follows_the_schedule(name: str, task: Task) -> None:
    run = example.train(task, name, 4e-3, seconds=1.0, steps=40)
    assert run.evaluations == 40
    assert run.curve.evaluations[0] == 0 and run.curve.evaluations[-1] == 40
    assert len(run.curve.score) == example.MEASUREMENTS + 1
    assert run.curve.score[-1] < run.curve.score[0] - 0.3
    assert len(run.unclipped) == (0 if name == "adamw" else example.MEASUREMENTS)
    assert all(0 < share < 1 for share in run.unclipped[1:])


def test_weight_decay_applies_to_matrices_only(task: Task) -> None:
    for contender in example.CONTENDERS.values():
        matrices, vectors = contender.make(task.model.parameters()).param_groups
        assert matrices["weight_decay"] == example.WEIGHT_DECAY and vectors["weight_decay"] == 0
        assert {p.dim() for p in matrices["params"]} == {2}
        assert {p.dim() for p in vectors["params"]} == {1}


def test_optimizers_get_equal_time_and_then_equal_steps(task: Task) -> None:
    by_time, by_steps = example.compare(task, ["adamw", "sophia-hutchinson"], seconds=0.2)
    for run in by_time:
        assert run.seconds >= 0.2
    fewest = min(run.evaluations for run in by_time)
    assert [run.evaluations for run in by_steps] == [fewest, fewest]


def test_learning_rates_belong_to_the_grid() -> None:
    assert example.RATES.keys() == example.CONTENDERS.keys()
    # A rate at the end of the grid would say that the grid is too short.
    assert set(example.RATES.values()) <= set(example.GRID[1:-1])


def test_the_search_prints_a_loss_for_each_rate(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    example.tune(task, ["adamw"], steps=3)
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.split()[-len(example.GRID) :] == [f"{rate:g}" for rate in example.GRID]
    assert len([float(loss) for loss in row.split()[1:]]) == len(example.GRID)


def ended(label: str, loss: float) -> Run:
    contender, curve = SimpleNamespace(label=label), SimpleNamespace(score=[4.0, loss])
    return SimpleNamespace(contender=contender, curve=curve)  # type: ignore[return-value]


def test_the_verdict_names_the_lowest_loss() -> None:
    runs = [ended("A", 1.5), ended("B", 1.2), ended("C", 1.3)]
    said = example.verdict(runs, "In 3 s each")
    assert said == "In 3 s each: B wins, 0.100 nats per character below C\n"
    assert example.verdict(runs[:1], "In 3 s each") == ""
    broken = example.verdict([ended("A", float("nan")), *runs[1:]], "In 3 s each")
    assert broken == said


def test_differences_within_the_spread_of_seeds_are_no_win() -> None:
    said = example.verdict([ended("A", 1.2), ended("B", 1.2 - example.GAP / 2)], "In 9 steps each")
    assert said.startswith("In 9 steps each: B and A are equal")


def test_a_sample_continues_the_training_text(text: example.Text) -> None:
    model = example.Transformer(len(text.characters), 8)
    sample = example.write(model, text, seed=3)
    assert len(sample) == example.SAMPLE
    assert sample == example.write(model, text, seed=3) != example.write(model, text, seed=4)


def test_mistakes_are_reported_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train_char_lm.py", "--optimizers", "adamw,sofia"])
    with pytest.raises(SystemExit):
        example.main()
    assert "unknown optimizer 'sofia'; known: adamw, sophia-gnb" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["train_char_lm.py", "--characters", "600"])
    with pytest.raises(SystemExit, match="600 characters are too few"):
        example.main()
