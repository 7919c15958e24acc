"""The figures of README and docs are those of the files that the runs wrote."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def make_results(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The script; of what it imports from benchmarks and examples no trace is left."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield load_script("make_results")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("bench", "figures", "finetune", "matrix", "sweep"):
            del sys.modules[name]


def test_no_figure_was_typed_by_hand(make_results: ModuleType) -> None:
    for page in make_results.PAGES:
        text = page.read_text(encoding="utf-8")
        assert make_results.filled(text) == text, f"{page.name}: run `make results`"
    assert make_results.main(["--check"]) == 0


def test_another_figure_is_seen_and_written_over(
    make_results: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "page.md"
    right = make_results.filled("before\n\n<!-- figures: speeds -->\n0.5 times\n<!-- end -->\n\nafter\n")
    assert "0.5 times" not in right
    assert right.startswith("before\n")
    assert right.endswith("\nafter\n")
    page.write_text(right.replace(" 1.", " 0."), encoding="utf-8")
    monkeypatch.setattr(make_results, "PAGES", [page])
    monkeypatch.setattr(make_results, "ROOT", tmp_path)
    assert make_results.main(["--check"]) == 1
    assert "make results" in capsys.readouterr().out
    assert make_results.main([]) == 0
    assert page.read_text(encoding="utf-8") == right
    assert make_results.main(["--check"]) == 0
    with pytest.raises(SystemExit, match=r"no block 'speed'; there are: .*speeds"):
        make_results.filled("<!-- figures: speed -->\n<!-- end -->")


def test_a_target_is_met_or_says_why(make_results: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, targets = make_results.speed, make_results.targets
    ratio = {"median": 1.0249, "q1": 1.0, "q3": 1.25}
    row = {"name": "minilora", "point": None, "ratio": ratio, "memory_ratio": 0.958}
    content = {"tables": [{"title": "bert, qv, fp32", "rows": [{**row, "name": "PEFT"}, row]}]}
    monkeypatch.setattr(speed, "benchmark", lambda name: content)
    where = speed.Row("any", ("qv", "fp32"), "minilora")
    met = targets.Target("a step", 1.02, where, "why not")
    assert met.line() == ["a step", "<= 1.02", "1.02 [1.00–1.25]", "met"]
    assert targets.Target("a step", 1.01, where, "why not").line()[-1] == "why not"
    memory = targets.Target("memory", 0.95, where, bound=where)
    assert memory.line()[1:] == ["<= 0.95", "0.96", "missed: what must be kept takes 0.96"]
    with pytest.raises(SystemExit, match=r"any: no row 'minilora', None, in a table of \('all-linear',\)"):
        speed.Row("any", ("all-linear",), "minilora").ratio()
