"""The benchmarks: their arithmetic on fake clocks, and every script from end to end on tiny models.

No timing is asserted anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import transformers_major

for package in ("transformers", "matplotlib"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the benchmarks need {package}", allow_module_level=True)

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
PACKAGE = sorted(path.stem for path in (FOLDER / "bench").glob("*.py") if path.stem != "__init__")
OPTIONAL = {"PEFT": "peft", "loralib": "loralib", "adapters": "adapters"}


@pytest.fixture(scope="module")
def script():
    """Imports a script as `python benchmarks/...` would; no trace is left afterwards."""
    environment, threads = os.environ.copy(), torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(FOLDER))
        for name in list(sys.modules):
            if name.partition(".")[0] in ("bench", "finetune", "sst2", *SCRIPTS):
                del sys.modules[name]
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench(script):
    """The package beside the scripts, with all of its modules."""
    return SimpleNamespace(**{name: script(f"bench.{name}") for name in PACKAGE})


@pytest.fixture(scope="module")
def setup(bench):
    return bench.setups.Setup(model="bert-tiny", device=torch.device("cpu"), targets="qv", rank=2)


@pytest.fixture
def nothing_optional(monkeypatch):
    """PEFT, loralib and adapters are not installed."""
    for package in OPTIONAL.values():
        monkeypatch.setitem(sys.modules, package, None)


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


def optional(name):
    return any(name.removeprefix("+ ").startswith(library) for library in OPTIONAL)


# The arithmetic


class FakeClock:
    """Calls what it is given, and then says what it was told to: so many seconds per call."""

    def __init__(self):
        self.calls = []
        self.seconds = {}

    def contestant(self, bench, name, seconds):
        self.seconds[name] = itertools.cycle(seconds)
        return bench.timing.Contestant(name=name, run=lambda: self.calls.append(name))

    def __call__(self, run):
        before = len(self.calls)
        run()
        made = self.calls[before:]
        return next(self.seconds[made[0]]) * len(made)


def test_every_round_has_every_contestant_once_and_begins_with_another(bench):
    clock = FakeClock()
    contestants = [clock.contestant(bench, name, [1.0]) for name in "abc"]
    bench.timing.race(contestants, clock=clock, rounds=6, warmup=2)
    assert "".join(clock.calls[:6]) == "aabbcc"
    rounds = ["".join(clock.calls[6 + 3 * i : 9 + 3 * i]) for i in range(6)]
    assert rounds == ["abc", "acb", "cab", "cba", "bca", "bac"]


def test_what_slows_a_whole_round_drops_out_of_the_ratios(bench):
    clock = FakeClock()
    slowdown = [1.0, 7.0, 3.0, 100.0, 1.5]
    contestants = [
        clock.contestant(bench, "base", slowdown),
        clock.contestant(bench, "twice", [2 * s for s in slowdown]),
    ]
    samples = bench.timing.race(contestants, clock=clock, rounds=5, warmup=0)
    rows = [bench.tables.Row(name=name, samples=seconds) for name, seconds in samples.items()]
    table = bench.tables.Table(title="", reference="base", rows=rows)
    assert table.ratio(rows[0]) == bench.ratios.Spread(1.0, 1.0, 1.0)
    assert table.ratio(rows[1]) == bench.ratios.Spread(2.0, 2.0, 2.0)


def test_short_calls_are_repeated_equally_often_and_counted_once(bench):
    clock = FakeClock()
    contestants = [clock.contestant(bench, "a", [0.25]), clock.contestant(bench, "b", [1.0])]
    samples = bench.timing.race(contestants, clock=clock, rounds=2, warmup=1, shortest=1.0)
    assert samples == {"a": [0.25, 0.25], "b": [1.0, 1.0]}
    assert (clock.calls.count("a"), clock.calls.count("b")) == (1 + 2 * 4, 1 + 2 * 4)


def test_a_race_of_nobody_has_no_samples(bench):
    assert bench.timing.race([], clock=FakeClock(), rounds=3) == {}


def test_prepare_runs_before_every_call_and_off_the_clock(bench):
    events = []
    contestant = bench.timing.Contestant(
        name="a", run=lambda: events.append("run"), prepare=lambda: events.append("prepare")
    )

    def clock(run):
        events.append("start")
        run()
        return 0.001

    bench.timing.race([contestant], clock=clock, rounds=2, warmup=1, shortest=1.0)
    assert events == ["prepare", "start", "run"] * 3


def test_median_and_quartiles(bench):
    assert bench.ratios.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == bench.ratios.Spread(3.0, 2.0, 4.0)
    assert bench.ratios.Spread.of([7.0]) == bench.ratios.Spread(7.0, 7.0, 7.0)
    # Pair by pair: the ratio of the medians, 10 / 2, is another number.
    ratios = bench.ratios.pairwise_ratios([10.0, 1.0, 30.0], [1.0, 2.0, 10.0])
    assert bench.ratios.Spread.of(ratios).median == 3.0


def test_a_row_that_was_not_measured_says_so(bench):
    rows = [
        bench.tables.Row(name="base", samples=[1.0, 1.0], memory=2**20),
        bench.tables.Row(name="fast", samples=[0.5, 0.5], memory=2**21),
        bench.tables.Row(name="absent", reason="it is not installed"),
    ]
    table = bench.tables.Table(title="a title", reference="base", rows=rows)
    text = bench.markdown.table_text(table)
    assert "| fast   |       500 ms | 0.500 [0.500–0.500] |     2.0 MiB |  2.000 |" in text
    assert "- absent: not measured, it is not installed" in text
    assert table.to_dict()["rows"][2]["seconds"] is None
    assert table.ratio(rows[2]) is None


def test_a_table_with_an_axis_has_a_line_for_each_point(bench):
    rows = [
        bench.tables.Row(name=name, point=point, samples=[point * factor])
        for point in (1, 2)
        for name, factor in (("base", 1.0), ("other", 1.5))
    ]
    absent = bench.tables.Row(name="absent", point=1, reason="it is not installed")
    table = bench.tables.Table(title="a title", axis="tokens", reference="base", rows=[*rows, absent])
    assert table.ratio(rows[3]).median == 1.5
    *_, first, second, _, reason = bench.markdown.table_text(table).splitlines()
    assert [line.split()[1] for line in (first, second)] == ["1", "2"]
    assert reason == "- absent: not measured, it is not installed"
    assert len(bench.plots.draw([table]).axes[0].lines) == 2


def test_a_library_has_one_colour_and_others_have_others(bench):
    colour = bench.plots.colour
    assert len({colour(name) for name in ("minilora", "minilora fused", "+ minilora", "minilora bank")}) == 1
    names = ("minilora", "PEFT merged", "loralib", "adapters", "plain form", "full fine-tuning", "base")
    assert len({colour(name) for name in names}) == len(names)
    assert colour("frozen-bound") == colour("base")


@pytest.mark.parametrize(
    ("axis", "title", "heading"),
    [
        (None, "bert, 4 layers, qv, fp32", "bert, 4 layers, query + value, fp32"),
        ("layers", "bert, 4 layers, qv, r = 8; swept: layers", "bert, query + value, r = 8"),
        ("rank", "bert, 4 layers, qv, r = 8, fp32; swept: rank", "bert, 4 layers, query + value, fp32"),
        ("tokens per step", "bert, batch 16 x 128, r = 8; swept: tokens per step", "bert, r = 8"),
        ("tokens per sequence", "b, batch 16 x 128, r = 8; swept: l", "b, 2048 tokens a step, r = 8"),
    ],
)
def test_a_title_names_no_value_of_what_is_swept(bench, axis, title, heading):
    assert bench.plots.heading(bench.tables.Table(title=title, reference="", rows=[], axis=axis)) == heading


def test_an_outlier_squashes_no_plot(bench):
    """All medians are seen; a quartile far away is cut off, and told."""
    samples = {"base": [1.0, 1.0, 1.0], "a": [1.1, 1.2, 9.0], "b": [1.3, 1.4, 1.5]}
    rows = [bench.tables.Row(name=n, point=p, samples=s) for p in (1, 2) for n, s in samples.items()]
    (ax,) = bench.plots.draw([bench.tables.Table(title="", axis="x", reference="base", rows=rows)]).axes
    bottom, top = ax.get_ylim()
    assert bottom < 1
    assert 1.4 < top < 2
    assert ax.get_xlabel() == "x; bands: quartiles, cut off at the edge (as far as 5.10)"


@pytest.mark.parametrize("point", [None, "load", 1])
def test_a_table_in_which_nothing_was_measured_is_drawn(bench, point):
    rows = [bench.tables.Row(name="base", point=point, reason="it is not installed")]
    table = bench.tables.Table(title="", axis=point and "x", reference="base", rows=rows)
    assert len(bench.plots.draw([table]).axes) == 1


def test_ratios_of_another_order_are_drawn_by_their_logarithm(bench):
    for ratio, scale in ((2.0, "linear"), (200.0, "log"), (0.01, "log")):
        rows = [bench.tables.Row(name=n, samples=[s]) for n, s in (("base", 1.0), ("other", ratio))]
        (ax,) = bench.plots.draw([bench.tables.Table(title="", reference="base", rows=rows)]).axes
        assert ax.get_xscale() == scale


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_of_results_are_what_their_samples_say(bench, path):
    """So a plot can be drawn anew from them."""
    for table in json.loads(path.read_text(encoding="utf-8")).get("tables", []):
        made = bench.tables.Table.from_dict(table)
        ratios = [spread and spread.to_dict() for spread in map(made.ratio, made.rows)]
        assert ratios == [row["ratio"] for row in table["rows"]]


def test_a_result_replaces_the_older_one_and_stays_in_the_history(bench, tmp_path):
    def measured(day, seconds, name="speed-cpu"):
        times = {"base": 1.0, "minilora": seconds, "PEFT": 3.0}
        rows = [bench.tables.Row(name=name, samples=[time]) for name, time in times.items()]
        report = {
            "date": day,
            "environment": {"device": "a processor, 2 cores"},
            "tables": [bench.tables.Table(title="a step", reference="base", rows=rows).to_dict()],
        }
        for ending in ("json", "md", "png"):
            (tmp_path / f"{day}-{name}.{ending}").write_text(json.dumps(report))
        bench.history.keep(tmp_path / f"{day}-{name}.json")

    for day, seconds in (("2026-01-01", 1.5), ("2026-01-02", 1.25), ("2026-01-02", 1.125)):
        measured(day, seconds)
    measured("2026-01-01", 2.0, name="another-speed-cpu")
    found = [(each.date, each.benchmark, each.row, each.ratio) for each in bench.history.read(tmp_path)]
    assert found == [
        ("2026-01-01", "speed-cpu", "minilora", "1.500"),
        ("2026-01-02", "speed-cpu", "minilora", "1.125"),
        ("2026-01-01", "another-speed-cpu", "minilora", "2.000"),
    ]
    assert {file.name for file in tmp_path.iterdir()} == {
        "history.csv",
        *(f"2026-01-02-speed-cpu.{ending}" for ending in ("json", "md", "png")),
        *(f"2026-01-01-another-speed-cpu.{ending}" for ending in ("json", "md", "png")),
    }


def test_the_history_has_the_results(bench):
    """And no benchmark has two results."""
    history, names = bench.history.read(FOLDER / "results"), []
    for path in (FOLDER / "results").glob("*.json"):
        report = json.loads(path.read_text(encoding="utf-8"))
        names.append(path.stem.removeprefix(f"{report['date']}-"))
        for entry in bench.history.entries(report, benchmark=names[-1], commit=""):
            assert entry in [dataclasses.replace(each, commit="") for each in history]
    assert len(names) == len(set(names)) > 10


def test_the_page_says_what_the_results_say(bench):
    """Every ratio with quartiles of docs/performance.md stands in a result."""
    page = (FOLDER.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    told = re.findall(r"\d+\.\d{3} \[\d+\.\d{3}–\d+\.\d{3}\]", page)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in (FOLDER / "results").glob("*.json")]
    rows = [row for report in reports for table in report.get("tables", []) for row in table["rows"]]
    spreads = [bench.ratios.Spread(*row["ratio"].values()) for row in rows if row["ratio"]]
    assert len(told) > 100
    assert set(told) <= {bench.markdown.ratio_text(spread) for spread in spreads}


def test_results_are_redrawn(script, tmp_path):
    results = sorted((FOLDER / "results").glob("*.json"))
    chosen = [next(path for path in results if kind in path.name) for kind in ("merge", "rank", "curves")]
    copies = [tmp_path / path.name for path in chosen]
    for path, copy in zip(chosen, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    script("redraw").main(list(map(str, copies)))
    for copy in copies:
        assert copy.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (0.001234, "1.23 ms"), (0.1234, "123 ms"), (2e-7, "0.20 µs")]
)
def test_times_read_well(bench, seconds, text):
    assert bench.markdown.time_text(seconds) == text


def test_peak_memory_is_exact_on_a_cpu(bench):
    size = 2**18  # floats: 1 MiB

    def three_at_once_then_one():
        a, b = torch.ones(size), torch.ones(size)
        c = a + b
        del a, b
        return c + 1

    assert bench.memory.peak_memory(three_at_once_then_one, torch.device("cpu")) == 3 * 4 * size


def test_older_memory_that_is_freed_does_not_lower_the_peak(bench):
    older, cpu = [], torch.device("cpu")
    bench.memory.peak_memory(lambda: older.append(torch.ones(2**19)), cpu)

    def free_and_allocate():
        older.clear()
        return torch.ones(2**18)

    assert bench.memory.peak_memory(free_and_allocate, cpu) == 4 * 2**18


def test_shared_memory_is_counted_once(bench):
    tensor = torch.ones(4, 8)
    assert bench.memory.resident_memory([tensor, tensor.T, tensor[1:], torch.ones(2)]) == 4 * 8 * 4 + 2 * 4


def test_random_tokens_need_nothing_that_real_sentences_need(script, monkeypatch):
    for package in ("datasets", "accelerate"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("train_speed", "bench.sentences"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert script("train_speed").main


def test_every_contestant_is_compiled_however_many_there_are(setup, monkeypatch):
    """They share code, and torch.compile gives up on code after 8 recompilations: in silence, for some."""
    from torch._dynamo.testing import CompileCounter

    class Shared(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    backend, config = CompileCounter(), torch._dynamo.config
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with config.patch(cache_size_limit=config.cache_size_limit):  # to be put back
        for width in range(1, 13):
            setup.compile(Shared(width, width))(torch.ones(3, width))
    assert backend.frame_count == 12


def test_the_cache_takes_keys_and_values_of_two_dtypes(bench):
    config = bench.models.SHAPES["llama-tiny"].config
    cache = bench.decoding.Cache(config=config, max_cache_len=4)
    keys, values = cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16).bfloat16(), 0)
    assert (keys.dtype, values.dtype) == (torch.bfloat16, torch.bfloat16)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 0]


def test_a_wrong_answer_ends_the_run(bench):
    agreement = bench.agreement
    right = torch.tensor([1.0, 2.0])
    outputs = {agreement.BASE: right + 1, agreement.UNMERGED: right}
    assert agreement.compare_outputs(outputs, "fp32")[agreement.BASE] == 0.5
    with pytest.raises(SystemExit, match="minilora merged: differs"):
        agreement.compare_outputs(outputs | {"minilora merged": right + 0.1}, "fp32")
    with pytest.raises(SystemExit, match="does not change"):
        agreement.compare_outputs(outputs | {agreement.BASE: right}, "fp32")
    with pytest.raises(SystemExit, match="not even minilora unmerged"):
        agreement.compare_outputs({agreement.BASE: right}, "fp32")
    agreement.compare_losses({}, "fp32")
    agreement.compare_losses({"a": 0.7, "b": 0.701}, "bf16")
    with pytest.raises(SystemExit, match=r"differ from a's 0.700000: \{'b': 0.701\}"):
        agreement.compare_losses({"a": 0.7, "b": 0.701}, "fp32")


def test_sweeps_change_what_they_say(bench, setup):
    load = bench.loads.Load(setup=setup, batch=16, length=128)
    swept = {value: load.swept("tokens", value) for value in (1, 64, 16384)}
    assert {value: (it.batch, it.length) for value, it in swept.items()} == {
        1: (1, 1),
        64: (1, 64),
        16384: (128, 128),
    }
    assert (load.swept("length", 512).batch, load.swept("length", 512).length) == (4, 512)
    assert load.swept("rank", 64).setup.rank == 64
    assert load.swept("layers", 24).setup.layers == 24


def test_the_methods_leave_trainable_what_they_say(bench, setup):
    added = 2 * 2 * 2 * (64 + 64)  # layers, targets, rank, in + out
    head = 2 * 64 + 2
    expected = {"frozen-bound": head + 64, "plain form": head + added, "minilora": head + added}
    expected |= {name: head + added for name in ("PEFT", "loralib") if installed(name)}
    for name, count in expected.items():
        model = bench.methods.TRAINING_METHODS[name](setup.build(), setup)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count, name


def test_forms_are_in_evaluation_mode(bench, setup):
    """A merged model is not one to train."""
    for form in bench.forms.forms(setup):
        if "PEFT" not in form.name or installed("PEFT"):
            assert not any(module.training for module in form.build().modules()), form.name


@pytest.mark.parametrize("in_float32", [False, True])
def test_the_plain_form_is_the_formula(bench, in_float32):
    base, A, B = torch.nn.Linear(3, 5), torch.randn(2, 3), torch.randn(5, 2)
    plain = bench.plain.PlainLoRA(base, A, B, scaling=0.5, in_float32=in_float32)
    x = torch.randn(4, 3)
    torch.testing.assert_close(plain(x), x @ (base.weight + 0.5 * B @ A).T + base.bias)
    with torch.autocast("cpu", torch.bfloat16):  # the update itself is computed in float32, or is not
        assert plain(x).dtype == torch.bfloat16
        low = torch.float32 if in_float32 else torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=not in_float32):
            assert plain.update(x).dtype == low


# The scripts


def test_merge_speed(script, tmp_path):
    (table,) = run(script("merge_speed"), tmp_path / "result.json")
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


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
def test_merge_speed_decodes(script, tmp_path, precision):
    options = ["--model", "llama-1b", "--decode", "--precision", precision]
    (table,) = run(script("merge_speed"), tmp_path / "result.json", *options)
    assert table["title"].startswith("llama-tiny")
    assert rows_of(table)[None, "minilora merged"]["not_measured"] is None


def test_train_speed(script, tmp_path):
    tables = run(script("train_speed"), tmp_path / "result.json", "--targets", "all-linear")
    assert [table["title"].rsplit(", ", 1)[1] for table in tables] == ["fp32", "bf16-autocast"]
    for table in tables:
        rows = rows_of(table)
        assert list(rows) == [(None, name) for name in script("bench.methods").TRAINING_METHODS]
        for (_, name), row in rows.items():
            assert (row["not_measured"] is None) == installed(name), row
        rising = ("frozen-bound", "frozen-bound, inputs kept", "minilora", "full fine-tuning")
        memory = [rows[None, name]["memory_bytes"] for name in rising]
        assert memory == sorted(set(memory))


def test_train_speed_of_other_kinds(script, tmp_path):
    train_speed = script("train_speed")
    (table,) = run(train_speed, tmp_path / "result.json", "--precision", "fp32", "--kinds")
    rows = rows_of(table)
    assert {name for _, name in rows} == set(train_speed.OF_ANY_KIND)
    assert [point.split()[0] for point in dict.fromkeys(point for point, _ in rows)] == [*train_speed.KINDS]
    for (_, name), row in rows.items():
        assert (row["not_measured"] is None) == installed(name), row


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16-autocast", 2)])
def test_inputs_that_layers_share_are_kept_once(script, precision, size):
    methods, setups = script("bench.methods"), script("bench.setups")
    setup = setups.Setup(model="bert-tiny", device=torch.device("cpu"), targets="qv", precision=precision)
    layer = methods.keeping_inputs(setup.build(), setup).bert.encoder.layer[0].attention.self
    x, kept = torch.randn(4, 64, requires_grad=True), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), setup.autocast(training=True):
        layer.query(x), layer.value(x)
    assert [tensor.element_size() for tensor in kept.values() if tensor.shape == x.shape] == [size]


def test_train_speed_of_dora(script, tmp_path):
    options = ["--targets", "qv", "--precision", "fp32", "--dora"]
    (table,) = run(script("train_speed"), tmp_path / "result.json", *options)
    assert table["reference"] == "minilora"
    for (_, name), row in rows_of(table).items():
        assert (row["not_measured"] is None) == installed(name.removesuffix(" DoRA")), row


def test_train_speed_sweeps(script, tmp_path):
    train_speed = script("train_speed")
    (table,) = run(train_speed, tmp_path / "result.json", "--targets", "qv", "--sweep", "tokens")
    assert table["axis"] == "tokens per step"
    assert list(rows_of(table)) == [(p, name) for p in (1, 32) for name in train_speed.SWEPT]


def test_skinny_products(script, tmp_path):
    products = script("skinny_products")
    fp32, bf16 = map(rows_of, run(products, tmp_path / "result.json"))
    assert {name for _, name in fp32} == {products.SEPARATE, products.CHUNKS, products.STACKED, products.OWN}
    assert {point for point, _ in bf16} - {point for point, _ in fp32} == {"rounding x"}


def test_skinny_products_are_the_same_however_they_are_formed(script):
    import argparse

    options = {"batch": 2, "length": 7, "width": 8, "rank": 3, "chunk": 4, "device": torch.device("cpu")}
    products = script("skinny_products")
    layers = products.Layers(argparse.Namespace(**options), torch.float32)
    x, g = next(layers.inputs())
    ways = dict(layers.operations())
    h, four = ways["h"], ways["all four"]
    together = torch.cat(h[products.SEPARATE](x, g))
    assert torch.allclose(h[products.STACKED](x, g), together, atol=1e-5)
    for one, other in zip(four[products.SEPARATE](x, g), four[products.CHUNKS](x, g), strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_overhead(script, tmp_path, monkeypatch):
    overhead = script("overhead")
    monkeypatch.setitem(overhead.IMPORTS, "+ PEFT", "math; raise ImportError('spared in this test')")
    monkeypatch.setattr(script("bench.imports"), "is_installed", lambda package: True)
    import resource  # not on Windows

    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # with transformers, and much else
    imports, qv = run(overhead, tmp_path / "result.json", "--targets", "qv")
    rows = rows_of(imports)
    assert rows[None, "+ minilora"]["memory_bytes"] > 2**20
    if Path("/proc/self/status").exists():
        assert rows[None, "torch + safetensors"]["memory_bytes"] < own
    assert "spared in this test" in rows[None, "+ PEFT"]["not_measured"]
    rows = rows_of(qv)
    assert {point for point, _ in rows} == set(script("bench.operations").OPERATIONS)
    for (_, name), row in rows.items():
        assert (row["not_measured"] is None) == installed(name), row


def test_many_adapters(script, tmp_path):
    many = script("many_adapters")
    prefill, decode, operations = run(many, tmp_path / "result.json", "--adapters", "2")
    for table in (prefill, decode):
        rows = rows_of(table)
        assert list(rows) == [(point, name) for point in (1, 2) for name in many.SERVERS]
        for (_, name), row in rows.items():
            assert (row["not_measured"] is None) == installed(name), row
    expected = [(o, n) for o in ("load", "remove", "switch") for n in ("minilora bank", "PEFT")]
    rows = rows_of(operations)
    assert set(rows) - {(o, "PEFT") for o, _ in expected} >= {(o, n) for o, n in expected if n != "PEFT"}
    assert ("switch", "minilora merged") in rows
    assert list(many.points(256)) == [1, 4, 16, 64, 256]


def test_profile_step(script, tmp_path, capsys):
    output = tmp_path / "result.json"
    options = ["--layers", "1", "--rows", "3", "--precision", "fp32", "--targets", "qv"]
    script("profile_step").main(["--quick", *options, "--output", str(output)])
    title, _, header, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("bert-tiny, 1 layers, batch 2 x 16")
    assert [cell.strip() for cell in header.split("|")[1:6:2]] == ["operation", "frozen-bound", "difference"]
    assert len(lines) == 4
    assert lines[-1].startswith("| all ")
    (values,) = json.loads(output.read_text())["profiles"]
    read = script("bench.profiles").Profile.from_dict(values).text()
    assert read.splitlines() == [header, *read.splitlines()[1:2], *lines]
    assert read in output.with_suffix(".md").read_text()


def test_loss_curves(script, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("tqdm")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model, data = tiny_bert(tmp_path / "model", ["good", "bad"]), tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("sentence,label\n" + "good good,1\nbad,0\n" * 4, encoding="utf-8")
    options = ["--steps", "3", "--batch", "2", "--output", str(tmp_path / "curves.json")]
    script("loss_curves").main(["--model", str(model), "--data", str(data), *options])
    report = json.loads((tmp_path / "curves.json").read_text(encoding="utf-8"))
    assert list(report["curves"]) == ["fp32", "bf16-autocast", "bf16"]
    plain, fast = report["curves"]["fp32"].values()
    assert len(plain) == 3
    assert plain == pytest.approx(fast, rel=1e-4)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.md").read_text(encoding="utf-8").count("minilora") == 3


@pytest.mark.skipif(not installed("PEFT"), reason="PEFT is not installed")
def test_parity(script, tmp_path, monkeypatch, capsys, accelerate_anew):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which it adds the examples
    model, data = tiny_bert(tmp_path / "model", ["good", "bad", "very", "so"]), tmp_path / "data"
    data.mkdir()
    rows = [
        f"{word} {mood},{label}" for word in ("very", "so", "") for mood, label in (("good", 1), ("bad", 0))
    ]
    for split in ("train", "validation"):
        (data / f"{split}.csv").write_text("sentence,label\n" + "\n".join(rows * 8), encoding="utf-8")
    options = ["--model", str(model), "--data", str(data), "--batch-size", "4", "--epochs", "1"]
    output = ["--output", str(tmp_path / "parity")]
    parity = script("parity")
    parity.main([*options, *output, "--seeds", "1"])
    parity.main([*options, *output, "--seeds", "1", "2"])  # the first is there already
    report = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))
    assert [seed["seed"] for seed in report["seeds"]] == [1, 2]
    for seed in report["seeds"]:
        assert seed["largest_gap"] < 1e-5
        ours, theirs = (seed["final"][name]["held_out"] for name in ("minilora", "PEFT"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert set(seed["curves"]) == {"minilora", "PEFT"}
    assert str(tmp_path) not in (tmp_path / "parity.json").read_text(encoding="utf-8")
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert "| mean " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another recipe"):
        parity.main([*options, *output, "--lr", "0.5"])


def tiny_bert(folder, words):
    """Write a BERT of one layer, and a tokeniser that knows some words."""
    import transformers

    if transformers_major() < 5:
        pytest.skip("the examples, whose batches these are, ask for transformers 5")
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_contrasts(script, capsys):
    script("contrasts").main()
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    ours = [line.removeprefix("minilora").strip() for line in said if line.startswith("minilora")]
    assert ours[0] == "0.0% of the base's weights changed"
    assert float(ours[1].removeprefix("output moved by ")) > 0
    assert "'qery'" in ours[2]
    assert "'value.lora_A'" in ours[3]
    for line in said:
        assert ("not measured" not in line) or not installed(line.split()[0])


# Without the libraries that need not be there


def test_a_missing_library_is_not_measured_and_says_so(bench, setup, nothing_optional):
    for name, package in OPTIONAL.items():
        with pytest.raises(bench.unmeasured.NotMeasured, match=f"^{package} is not installed$"):
            bench.methods.TRAINING_METHODS[name](setup.build(), setup)


def test_a_library_that_does_not_work_is_not_measured_and_says_so(bench, tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import a_part_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(bench.unmeasured.NotMeasured, match=r"cannot be imported .*a_part_that_is_missing"):
        bench.unmeasured.import_optional("broken_library")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("merge_speed", []),
        ("train_speed", ["--precision", "fp32", "--targets", "qv"]),
        ("overhead", ["--targets", "qv"]),
    ],
)
def test_every_script_goes_on_without(script, nothing_optional, tmp_path, monkeypatch, name, options):
    if name == "overhead":
        imports = {"torch + safetensors": None, "+ PEFT": "peft"}  # each takes a process
        monkeypatch.setattr(script(name), "IMPORTS", imports)
    for table in run(script(name), tmp_path / "result.json", *options):
        absent = {row["not_measured"] for (_, name), row in rows_of(table).items() if optional(name)}
        assert absent
        assert all(reason.endswith(" is not installed") for reason in absent)
        assert any(row["seconds"] for row in table["rows"])


def test_contrasts_go_on_without(script, nothing_optional, capsys):
    script("contrasts").main()
    said = capsys.readouterr().out
    assert said.count("  PEFT      not measured, peft is not installed") == 4
    assert said.count("  loralib   not measured, loralib is not installed") == 1


# The house


def test_scripts_are_short_and_what_surrounds_them_is_in_small_files():
    for limit, files in ((250, FOLDER.glob("*.py")), (300, FOLDER.glob("*/*.py"))):
        for path in files:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= limit, f"{path.name} has {lines} lines"


def test_the_readme_names_every_script_and_file():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        assert f"python benchmarks/{name}.py" in readme
    for name in PACKAGE:
        assert f"`{name}`" in readme, name
