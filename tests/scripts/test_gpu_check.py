"""`scripts/gpu_check.sh`: which tests it runs and how, and what it makes of the figures."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import _device_tests  # noqa: E402
import _gpu_bars  # noqa: E402
import gpu_check  # noqa: E402


def asks_for_a_device(path: Path) -> bool:
    """True if a function of a file takes the fixture `device`, or its text names the mark."""
    text = path.read_text()
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))
    takes = (
        any(a.arg == "device" for a in f.args.args) for f in functions if f.name[:5] == "test_"
    )
    return "mark.cuda" in text or any(takes)


def test_all_tests_for_devices_are_run() -> None:
    found = _device_tests.files_of(ROOT / "tests")
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if asks_for_a_device(path) and path != Path(__file__)
    }
    assert expected <= set(found)
    assert found[0] == "tests/optim/test_conformance.py"


def write(path: Path, text: str) -> str:
    path.write_text(f"import os, time, pytest\n{text}")
    return str(path)


def outcomes(tests: _device_tests.Tests) -> dict[str, str]:
    """Outcomes by the names of tests, or of files that pytest cannot read."""
    return {re.split("::|/", name)[-1]: r["outcome"] for name, r in tests.results.items()}


def test_failures_crashes_and_hangs_cost_one_test_each(tmp_path: Path) -> None:
    files = [
        write(
            tmp_path / "test_fine.py",
            "def test_passes(): print('{')\n"
            "@pytest.mark.skip\ndef test_left_out(): pass\n"
            "@pytest.mark.cuda\ndef test_unmarked(): pass\n",
        ),
        write(
            tmp_path / "test_bad.py",
            "def test_fails(): assert 1 == 2, 'one is not two'\n"
            "@pytest.fixture\ndef broken(): raise ValueError\n"
            "def test_errs(broken): pass\n"
            "def test_crashes(): os._exit(3)\n"
            "def test_hangs(): time.sleep(60)\n"
            "def test_goes_on(): pass\n",
        ),
        write(tmp_path / "test_unreadable.py", "import no_such_module\n"),
    ]
    tests = _device_tests.Tests(files, "not cuda", workers=2, limit=60.0, one_test=2.0)
    tests.run()
    assert outcomes(tests) == {
        "test_passes": "passed",
        "test_left_out": "skipped",
        "test_fails": "failed",
        "test_errs": "error",
        "test_crashes": "error",
        "test_hangs": "error",
        "test_goes_on": "passed",
        "test_unreadable.py": "error",
    }
    found = tests.summary()
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    assert found["errors"] == 4
    messages = {name.split("::")[-1]: text for name, text in found["failing"].items()}
    assert "one is not two" in messages["test_fails"]
    assert messages["test_crashes"] == "the process crashed"
    assert messages["test_hangs"] == "ended by the limit of time"
    assert found["status"] == 1
    assert found["files not finished"] == []


def test_tests_end_in_time(tmp_path: Path) -> None:
    file = write(
        tmp_path / "test_slow.py", "def test_first(): pass\ndef test_long(): time.sleep(60)\n"
    )
    tests = _device_tests.Tests([file, file + "2"], "not cuda", 1, limit=6.0, one_test=60.0)
    start = time.monotonic()
    tests.run()
    assert time.monotonic() - start < 12.0
    assert outcomes(tests) == {"test_first": "passed", "test_long": "error"}
    assert tests.summary()["files not finished"] == [file, file + "2"]
    assert tests.summary()["status"] == 1


def test_bars_are_met_missed_or_not_measured() -> None:
    results: dict[str, Any] = {
        "lbfgs.direction.1000000": {"ratio": {"of_medians": 0.09}, "ours / floor": 4.0},
        "lbfgs.direction.100000000": {"ratio": {"of_medians": 0.5}, "ours / floor": None},
        "diagonal.steps.CNN 16-32": {
            "Adam": {"median": 1.0},
            "AdaHessian": {"median": 2.5},
            "AdaHessian/10": {"median": 11.0},
        },
        "newton.pinn.Adam": {"results": {"final relative L2": 1e-2}},
        "newton.pinn.torch.optim.LBFGS": {"results": {"final relative L2": 1e-3}},
        "newton.pinn.BFGS, ssbroyden (ours)": {"results": {"final relative L2": None}},
        "newton.pinn.LevenbergMarquardt (ours)": {"results": {"final relative L2": 1e-4}},
    }
    tests = {"status": 0, "failed": 0, "errors": 0}
    rows = {row["bar"]: row for row in _gpu_bars.rows(results, tests)}
    known = {bar: row["verdict"] for bar, row in rows.items() if row["verdict"] != "not measured"}
    assert known == {
        "tests for the device that fail": "met",
        "L-BFGS direction, n = 1e+06, over torch's two loops": "met",
        "AdaHessian over Adam, CNN 16-32": "missed",
        "AdaHessian, period 10, over Adam, CNN 16-32": "met",
        "Poisson PINN: our least error over that of torch.optim in the same time": "met",
    }
    assert rows["AdaHessian, period 10, over Adam, CNN 16-32"]["figure"] == pytest.approx(1.1)
    first = {
        tuple(t.items()): _gpu_bars.rows({}, dict(t))[0]["verdict"]
        for t in ({"status": 1, "failed": 1, "errors": 0}, {"status": 1, "failed": 0, "errors": 0})
    }
    assert list(first.values()) == ["missed", "not measured"]
    text = _gpu_bars.table(list(rows.values()))
    assert "AdaHessian over Adam, CNN 16-32" in text
    assert "missed" in text


def test_a_short_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "REHEARSED", ("tests/params/test_box.py",))
    chosen = [b for b in gpu_check.BENCHMARKS if b.title == "lbfgs direction"]
    monkeypatch.setattr(gpu_check, "BENCHMARKS", chosen)
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(file), "--rehearse", "--minutes", "2"])
    assert gpu_check.main() == 0
    found = json.loads(file.read_text())
    assert found["pytest"]["passed"] > 0
    assert found["benchmarks"] == {
        "lbfgs direction": {
            "status": 0,
            "seconds": found["benchmarks"]["lbfgs direction"]["seconds"],
        }
    }
    assert found["results"]["lbfgs.direction.1000"]["ratio"]["of_medians"] > 0
    assert found["environment"]["device"] == "cpu"
    assert found["bars"][0]["verdict"] == "met"


def test_figures_that_nobody_reached() -> None:
    names = "KFAC (ours)", "NewtonCG (ours)", "torch.optim.LBFGS", "Adam"
    results = {f"newton.autoencoder.{name}": {"results": {"error": None}} for name in names}
    rows = {row["bar"]: row["verdict"] for row in _gpu_bars.rows(results, None)}
    assert {verdict for bar, verdict in rows.items() if "autoencoder" in bar} == {"not measured"}


def test_a_benchmark_that_ignores_interrupts_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    file = tmp_path / "pid"
    status, seconds = gpu_check._run([sys.executable, "-c", text, str(file)], 2.0)
    assert status == "stopped after 2 s" and seconds < 30.0
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_files_that_cannot_be_written_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], limit: float) -> tuple[int, float]:
        Path(command[command.index("--json") + 1]).write_text('{"environment": {')
        return 0, 1.0

    monkeypatch.setattr(gpu_check, "_run", run)
    file = tmp_path / "no_such_folder" / "gpu.json"
    check = gpu_check.Check(*gpu_check.parse([str(file), "--rehearse"]))
    check.document["pytest"] = {"status": 0, "failed": 0, "errors": 0}
    check.run_benchmark(gpu_check.Benchmark("lbfgs", None, 30), tmp_path)
    assert "unread" in check.document["benchmarks"]["lbfgs"] and not check.document["results"]
    check.write()
    assert f"{file} could not be written" in capsys.readouterr().err
    assert not check.passed
    check.given.file = tmp_path / "gpu.json"
    check.write()
    assert check.passed


# Interpreters whose torch sees no device, or hangs when it looks for one.
@pytest.mark.parametrize("behaviour", ["exit 1", "exec sleep 30"])
def test_without_a_device_it_says_so(tmp_path: Path, behaviour: str) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{behaviour}\n")
    script.chmod(0o755)
    (tmp_path / "python3").write_text(script.read_text())
    (tmp_path / "python3").chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "gpu.json")],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(script),
            "GPU_CHECK_PATIENCE": "0.5",
        },
        capture_output=True,
        text=True,
        timeout=25,
    )
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
