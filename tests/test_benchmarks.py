"""The benchmarks: their arithmetic on fake clocks, and every script from end to end on tiny models.

No timing is asserted anywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("transformers", "matplotlib"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the benchmarks need {package}", allow_module_level=True)

FOLDER = Path(__file__).parents[1] / "benchmarks"
OWN = ("common", "models", "merge_speed", "train_speed", "overhead")
OPTIONAL = {"PEFT": "peft", "loralib": "loralib", "adapters": "adapters"}


@pytest.fixture(scope="module")
def scripts():
    """Import the scripts as `python benchmarks/...` would, and leave no trace: `common` is a common name."""
    before = {name: sys.modules.pop(name) for name in OWN if name in sys.modules}
    environment, threads = os.environ.copy(), torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in OWN})
    finally:
        sys.path.remove(str(FOLDER))
        for name in OWN:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def common(scripts):
    return scripts.common


def run(script, path, *options):
    """Run a script and return the tables of its JSON; all three files have to be there."""
    script.main(["--quick", "--rounds", "2", "--output", str(path), *options])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = path.with_suffix(".json").read_text(encoding="utf-8")
    assert str(path.parent) not in text, "a path of this machine is in the report"
    report = json.loads(text)
    assert report["options"]["quick"]
    assert report["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert "quick run" in path.with_suffix(".md").read_text(encoding="utf-8")
    return report["tables"]


def rows_of(table):
    """Return the rows by point and name, each of them measured or saying why not."""
    rows = {(row["point"], row["name"]): row for row in table["rows"]}
    for row in rows.values():
        assert (row["not_measured"] is None) == (len(row["samples_seconds"]) > 0)
        assert (row["not_measured"] is None) == (row["seconds"] is not None)
    return rows


def installed(name):
    return name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[name]) is not None


# The arithmetic


class FakeClock:
    """Calls what it is given, and then says what it was told to: so many seconds per call."""

    def __init__(self):
        self.calls = []
        self.seconds = {}

    def contestant(self, common, name, seconds):
        self.seconds[name] = itertools.cycle(seconds)
        return common.Contestant(name=name, run=lambda: self.calls.append(name))

    def __call__(self, run):
        before = len(self.calls)
        run()
        made = self.calls[before:]
        return next(self.seconds[made[0]]) * len(made)


def test_every_round_has_every_contestant_once_and_begins_with_another(common):
    clock = FakeClock()
    contestants = [clock.contestant(common, name, [1.0]) for name in "abc"]
    common.race(contestants, clock=clock, rounds=6, warmup=2)
    assert "".join(clock.calls[:6]) == "aabbcc"
    rounds = ["".join(clock.calls[6 + 3 * i : 9 + 3 * i]) for i in range(6)]
    assert rounds == ["abc", "acb", "cab", "cba", "bca", "bac"]


def test_what_slows_a_whole_round_drops_out_of_the_ratios(common):
    clock = FakeClock()
    slowdown = [1.0, 7.0, 3.0, 100.0, 1.5]
    contestants = [
        clock.contestant(common, "base", slowdown),
        clock.contestant(common, "twice", [2 * s for s in slowdown]),
    ]
    samples = common.race(contestants, clock=clock, rounds=5, warmup=0)
    rows = [common.Row(name=name, samples=seconds) for name, seconds in samples.items()]
    table = common.Table(title="", reference="base", rows=rows)
    assert table.ratio(rows[0]) == common.Spread(1.0, 1.0, 1.0)
    assert table.ratio(rows[1]) == common.Spread(2.0, 2.0, 2.0)


def test_short_calls_are_repeated_equally_often_and_counted_once(common):
    clock = FakeClock()
    contestants = [clock.contestant(common, "a", [0.25]), clock.contestant(common, "b", [1.0])]
    samples = common.race(contestants, clock=clock, rounds=2, warmup=1, shortest=1.0)
    assert samples == {"a": [0.25, 0.25], "b": [1.0, 1.0]}
    assert (clock.calls.count("a"), clock.calls.count("b")) == (1 + 2 * 4, 1 + 2 * 4)


def test_prepare_runs_before_every_call_and_off_the_clock(common):
    events = []
    contestant = common.Contestant(
        name="a", run=lambda: events.append("run"), prepare=lambda: events.append("prepare")
    )

    def clock(run):
        events.append("start")
        run()
        return 0.001

    common.race([contestant], clock=clock, rounds=2, warmup=1, shortest=1.0)
    assert events == ["prepare", "start", "run"] * 3


def test_median_and_quartiles(common):
    assert common.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == common.Spread(3.0, 2.0, 4.0)
    assert common.Spread.of([7.0]) == common.Spread(7.0, 7.0, 7.0)
    # Pair by pair: the ratio of the medians, 10 / 2, is another number.
    ratios = common.pairwise_ratios([10.0, 1.0, 30.0], [1.0, 2.0, 10.0])
    assert common.Spread.of(ratios).median == 3.0


def test_a_row_that_was_not_measured_says_so(common):
    rows = [
        common.Row(name="base", samples=[1.0, 1.0], memory=2**20),
        common.Row(name="fast", samples=[0.5, 0.5], memory=2**21),
        common.Row(name="absent", reason="it is not installed"),
    ]
    table = common.Table(title="a title", reference="base", rows=rows)
    text = table.markdown()
    assert "| fast   |       500 ms | 0.500 [0.500–0.500] |     2.0 MiB |  2.000 |" in text
    assert "- absent: not measured, it is not installed" in text
    assert table.to_dict()["rows"][2]["seconds"] is None
    assert table.ratio(rows[2]) is None


def test_a_table_with_an_axis_has_a_line_for_each_point(common):
    rows = [
        common.Row(name=name, point=point, samples=[point * factor])
        for point in (1, 2)
        for name, factor in (("base", 1.0), ("other", 1.5))
    ]
    table = common.Table(title="a title", axis="tokens", reference="base", rows=rows)
    assert table.ratio(rows[3]).median == 1.5
    assert [line.split()[1] for line in table.markdown().splitlines()[-2:]] == ["1", "2"]
    report = common.Report(benchmark="a", options={}, environment={}, tables=[table])
    assert len(report.figure().axes[0].lines) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (0.001234, "1.23 ms"), (0.1234, "123 ms"), (2e-7, "0.20 µs")]
)
def test_times_read_well(common, seconds, text):
    assert common.time_text(seconds) == text


def test_peak_memory_is_exact_on_a_cpu(common):
    size = 2**18  # floats: 1 MiB

    def three_at_once_then_one():
        a, b = torch.ones(size), torch.ones(size)
        c = a + b
        del a, b
        return c + 1

    assert common.peak_memory(three_at_once_then_one, torch.device("cpu")) == 3 * 4 * size


def test_shared_memory_is_counted_once(common):
    tensor = torch.ones(4, 8)
    assert common.resident_memory([tensor, tensor.T, tensor[1:], torch.ones(2)]) == 4 * 8 * 4 + 2 * 4


# The scripts


def test_merge_speed(scripts, tmp_path):
    (table,) = run(scripts.merge_speed, tmp_path / "result.json")
    rows = rows_of(table)
    names = [name for _, name in rows]
    assert names[:3] == ["base", "minilora unmerged", "minilora merged"]
    assert names[3:5] == ["minilora fused", "minilora fused to bf16"]
    assert names[-2:] == ["PEFT unmerged", "PEFT merged"]
    for (_, name), row in rows.items():
        expected = "torch.compile" not in name and (installed("PEFT") or "PEFT" not in name)
        assert (row["not_measured"] is None) == expected, row
        if expected and name not in ("base", "minilora fused to bf16"):
            assert row["difference_to_unmerged"] < 1e-5


def test_merge_speed_decodes(scripts, tmp_path):
    (table,) = run(scripts.merge_speed, tmp_path / "result.json", "--model", "llama-1b", "--decode")
    assert table["title"].startswith("llama-tiny")
    assert rows_of(table)[None, "minilora merged"]["not_measured"] is None


def test_merge_speed_refuses_a_wrong_answer(scripts):
    setup = scripts.models.Setup(model="bert-tiny", device=torch.device("cpu"))
    right = torch.tensor([1.0, 2.0])
    outputs = {scripts.merge_speed.BASE: right + 1, scripts.merge_speed.UNMERGED: right}
    with pytest.raises(SystemExit, match="minilora merged: differs"):
        scripts.merge_speed.compare(outputs | {"minilora merged": right + 0.1}, setup)
    with pytest.raises(SystemExit, match="does not change"):
        scripts.merge_speed.compare(outputs | {scripts.merge_speed.BASE: right}, setup)


def test_train_speed(scripts, tmp_path):
    tables = run(scripts.train_speed, tmp_path / "result.json", "--targets", "all-linear")
    assert [table["title"].rsplit(", ", 1)[1] for table in tables] == ["fp32", "bf16-autocast"]
    for table in tables:
        rows = rows_of(table)
        assert list(rows) == [(None, name) for name in scripts.models.TRAINING_METHODS]
        for (_, name), row in rows.items():
            assert (row["not_measured"] is None) == installed(name), row
        full, bound = rows[None, "full fine-tuning"], rows[None, "frozen-bound"]
        assert full["memory_bytes"] > rows[None, "minilora"]["memory_bytes"] > bound["memory_bytes"]


def test_train_speed_sweeps(scripts, tmp_path):
    (table,) = run(scripts.train_speed, tmp_path / "result.json", "--targets", "qv", "--sweep", "tokens")
    assert table["axis"] == "tokens per step"
    assert list(rows_of(table)) == [(p, name) for p in (1, 32) for name in scripts.train_speed.SWEPT]


def test_sweeps_change_what_they_say(scripts):
    setup = scripts.models.Setup(model="bert-tiny", device=torch.device("cpu"))
    load = scripts.train_speed.Load(setup=setup, batch=16, length=128)
    swept = {value: load.swept("tokens", value) for value in (1, 64, 16384)}
    assert {value: (it.batch, it.length) for value, it in swept.items()} == {
        1: (1, 1),
        64: (1, 64),
        16384: (128, 128),
    }
    assert (load.swept("length", 512).batch, load.swept("length", 512).length) == (4, 512)
    assert load.swept("rank", 64).setup.rank == 64
    assert load.swept("layers", 24).setup.layers == 24


def test_overhead(scripts, tmp_path, monkeypatch):
    monkeypatch.setitem(scripts.overhead.IMPORTS, "+ PEFT", "raise ImportError('spared in this test')")
    imports, qv = run(scripts.overhead, tmp_path / "result.json", "--targets", "qv")
    rows = rows_of(imports)
    assert rows[None, "+ minilora"]["memory_bytes"] > 2**20
    assert "spared in this test" in rows[None, "+ PEFT"]["not_measured"]
    rows = rows_of(qv)
    assert {point for point, _ in rows} == set(scripts.overhead.OPERATIONS)
    for (_, name), row in rows.items():
        assert (row["not_measured"] is None) == installed(name), row


def test_the_methods_leave_trainable_what_they_say(scripts):
    models = scripts.models
    setup = models.Setup(model="bert-tiny", device=torch.device("cpu"), targets="qv", rank=2)
    added = 2 * 2 * 2 * (64 + 64)  # layers, targets, rank, in + out
    head = 2 * 64 + 2
    expected = {"frozen-bound": head + 64, "plain form": head + added, "minilora": head + added}
    expected |= {name: head + added for name in ("PEFT", "loralib") if installed(name)}
    for name, count in expected.items():
        model = models.TRAINING_METHODS[name](setup.build(), setup)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count, name


def test_a_missing_library_is_a_row_that_says_so(scripts, monkeypatch):
    monkeypatch.setitem(sys.modules, "loralib", None)
    setup = scripts.models.Setup(model="bert-tiny", device=torch.device("cpu"))
    with pytest.raises(scripts.common.NotMeasured, match="loralib cannot be imported"):
        scripts.models.with_loralib(setup.build(), setup)
