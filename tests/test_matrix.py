"""`make matrix`: what is run, what is skipped and why, and how it is told."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def matrix(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> ModuleType:
    module = load_script("matrix")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "environments")
    monkeypatch.setattr(module, "_make", lambda *_: None)  # nothing is installed here
    monkeypatch.setattr(module, "_pip", lambda *_: False)
    return module


def test_what_the_machine_lacks_is_told(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        matrix,
        "COMBINATIONS",
        (
            matrix.Combination("absent", "9.9"),
            matrix.Combination("here", "{}.{}".format(*sys.version_info), torch="2.6.*"),
        ),
    )
    monkeypatch.setattr(matrix, "_interpreters", lambda version: [sys.executable])
    assert matrix.main([]) == 0
    table = capsys.readouterr().out
    assert "| not run: no Python 9.9 on this machine | - |" in table
    assert "| 2.6.* | 5." in table
    assert "not run: no torch 2.6.* for Python 3." in table
    assert "on this disk; --torch-index says where else | - |" in table


@pytest.mark.parametrize(("code", "result"), [("pass", "passed"), ("assert False", "failed")])
def test_tests_are_run_counted_and_recorded(
    matrix: ModuleType,
    code: str,
    result: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(matrix, "environment", lambda combination, index: sys.executable)
    tests, record = tmp_path / "test_it.py", tmp_path / "record.json"
    tests.write_text(f"import pytest\ndef test_a():\n    {code}\ndef test_b():\n    pytest.skip('so')\n")
    earlier = [matrix.Outcome("3.13", "not run", "why"), matrix.Outcome("4.57", "failed", "before")]
    record.write_text(matrix.json.dumps([dataclasses.asdict(outcome) for outcome in earlier]))
    options = ["--only", "4.57", "--record", str(record), "--", str(tests), "-p", "no:cacheprovider"]
    assert matrix.main(options) == (result == "failed")
    kept, new = matrix.recorded(record)
    assert kept == earlier[0]
    assert (new.name, new.result) == ("4.57", result)
    assert new.counts == {"passed": int(result == "passed"), "failed": int(result == "failed"), "skipped": 1}
    assert new.versions["python"] == sys.version.split()[0]
    assert new.tests.startswith("-m 'not slow' ")
    told = capfd.readouterr().out
    assert "1 skipped |" in told
    assert f"- 4.57: `pytest -m 'not slow' {tests} -p no:cacheprovider`" in told


def test_no_test_is_no_pass(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "environment", lambda combination, index: sys.executable)
    (tmp_path / "test_it.py").write_text("")
    assert matrix.main(["--only", "4.57", "--", str(tmp_path), "-p", "no:cacheprovider"]) == 1
    assert "failed: pytest ended with 5" in capfd.readouterr().out


def test_the_pins_are_those_of_the_file(matrix: ModuleType) -> None:
    pins = matrix.PINS.read_text(encoding="utf-8")
    assert f"\ntorch=={matrix._pinned('torch')}\n" in pins
    assert f"\ntransformers=={matrix._pinned('transformers')} ;" in pins
