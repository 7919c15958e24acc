"""Write the measured figures of README.md and of the pages of results: make results.

    python scripts/make_results.py --check

A page says where a block of figures stands, between `<!-- figures: NAME -->` and `<!-- end -->`; what stands
there comes from the files under docs/results/ and benchmarks/results/ that the examples and the benchmarks
wrote. With `--check` nothing is written, and the exit code says whether anything would be.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # whose tables some of these are,
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # and whose others,
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # and whose the rest

import matrix
import sweep
from bench import history
from bench.markdown import compared, curve, grid, memory_cell, ratio_cell
from bench.parity import SPLITS, Parity, accuracies, accuracy, gaps
from bench.tables import Table
from bench.unmeasured import NOT_MEASURED

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "many-adapters.md",
    ROOT / "docs" / "compatibility.md",
)
RUNS = ROOT / "docs" / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"
AXES = ("tokens", "rank", "length", "layers")
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def run(name: str) -> dict[str, Any]:
    """The record of one run, as an example script wrote it: `docs/results/<name>.json`."""
    return _read(RUNS / f"{name}.json")


def benchmark(name: str) -> dict[str, Any]:
    """The newest result of one benchmark."""
    return _read(newest(name))


def newest(name: str) -> Path:
    """Where it stands: `benchmarks/results/<date>-<name>.json`."""
    found = sorted(BENCHMARKS.glob(f"????-??-??-{name}.json"))
    if not found:
        raise SystemExit(f"no {name} in {BENCHMARKS}")
    return found[-1]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# The fine-tunes


def parity() -> Parity:
    """The newest run of both libraries side by side."""
    return Parity.read(newest("parity-cpu"))


def imdb() -> str:
    """IMDB with each method."""
    lines = []
    for method in ("lora", "adapter", "both"):
        content = run(f"imdb-minilm-{method}")
        final = content["final"]
        lines.append(
            [
                method,
                f"{content['parameters']['trainable']:,}",
                f"{content['arguments']['lr']:g}",
                f"{content['epochs'][-1]['train_loss']:.4f}",
                ", ".join(f"{epoch['held_out']['accuracy']:.4f}" for epoch in content["epochs"]),
                f"{final['reported']['accuracy']:.4f}",
            ]
        )
    counts = content["data"]["examples"]
    columns = (f"held out ({counts['held_out']:,}), by epoch", f"test ({counts['reported']:,})")
    header = ["method", "trainable", "lr", "training loss, last epoch", *columns]
    return f"{grid(header, lines)}\n\n{facts(content)}"


def encoders() -> str:
    """SST-2 on a share of its sentences, with the usual encoder and with a larger one."""
    runs = [run(name) for name in ("sst2-minilm-2000", "sst2-mpnet-2000")]
    lines = [
        [
            content["model"].removesuffix(" (local folder)"),
            f"{content['parameters']['base']:,}",
            f"{content['parameters']['trainable']:,}",
            f"{content['epochs'][-1]['train_loss']:.4f}",
            *(f"{content['final'][split]['accuracy']:.4f}" for split in SPLITS),
            f"{sum(epoch['train_seconds'] for epoch in content['epochs']):,.0f}",
        ]
        for content in runs
    ]
    header = ["encoder", "parameters", "trained", "training loss, last epoch", *splits(runs[0])]
    return f"{grid([*header, 'seconds of training'], lines)}\n\n{facts(runs[1])}"


def full_sst2() -> str:
    """SST-2 in full: one run, epoch by epoch."""
    content = run("sst2-minilm-lora")
    lines = [
        [
            str(epoch["epoch"]),
            f"{epoch['train_loss']:.4f}",
            f"{epoch['held_out']['accuracy']:.4f}",
            f"{epoch['reported']['accuracy']:.4f}",
        ]
        for epoch in content["epochs"]
    ]
    return f"{grid(['after epoch', 'training loss', *splits(content)], lines)}\n\n{facts(content)}"


def sample() -> str:
    """The sentences that come with the project: one run for each seed."""
    runs = [run(f"sample-minilm-lora-{seed}") for seed in range(3)]
    lines = [
        [
            str(content["seed"]),
            f"{content['epochs'][-1]['train_loss']:.4f}",
            *(
                f"{content['before'][split]['accuracy']:.4f} -> {content['final'][split]['accuracy']:.4f}"
                for split in SPLITS
            ),
            f"{content['seconds']:.0f}",
        ]
        for content in runs
    ]
    header = ["seed", "training loss, last epoch", *splits(runs[0]), "seconds, start to end"]
    table = grid(header, lines)
    return f"{table}\n\n{facts(runs[0])}"


def decoder() -> str:
    """The decoder that learns to answer: one run for each seed."""
    runs = [run(f"questions-decoder-{seed}") for seed in range(3)]
    lines = [
        [
            str(content["arguments"]["seed"]),
            f"{content['train_loss']['questions'][-1]:.4f}",
            *(
                f"{content['perplexity'][text]['before']:.1f} -> {content['perplexity'][text]['after']:.1f}"
                for text in ("questions", "sentences")
            ),
            f"{sum(not entry['before'] for entry in content['written'])} of {len(content['written'])}",
            f"{sum(not entry['after'] for entry in content['written'])} of {len(content['written'])}",
        ]
        for content in runs
    ]
    header = ["seed", "training loss, last epoch", "perplexity, questions", "perplexity, sentences"]
    table = grid([*header, "no answer before", "no answer after"], lines)
    checks = {name: [content["checks"][name] for content in runs] for name in runs[0]["checks"]}
    held = ", ".join(f"{name} in {sum(each)} of {len(each)} runs" for name, each in checks.items())
    parameters, versions = runs[0]["parameters"], runs[0]["versions"]
    told = [
        f"trained: {parameters['trainable']:,} of {parameters['base']:,} parameters",
        f"the same tokens again: {held}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "\n".join([table, "", *(f"- {line}" for line in told)])


def answers() -> str:
    """What the decoder of the first seed writes."""
    written = run("questions-decoder-0")["written"]
    lines = [f"| {entry['question']} | {entry['after'].strip()} |" for entry in written]
    return "\n".join(["| question, held out | answer, drawn |", "|---|---|", *lines])


def splits(content: dict[str, Any]) -> list[str]:
    """The splits that a run was measured on, with their sizes, as headers."""
    counts = content["data"]["examples"]
    return [f"{words} ({counts[split]:,})" for split, words in SPLITS.items()]


def facts(content: dict[str, Any]) -> str:
    """What else the record of a run says: parameters, the checks, the software."""
    parameters, checks = content["parameters"], content["checks"]
    share = 100 * parameters["trainable"] / parameters["base"]
    told = [
        f"trained: {parameters['trainable']:,} of {parameters['base']:,} parameters, {share:.2g} %",
        *(
            f"{name}: {check['differ']} of {checks['examples']} predictions differ, largest difference "
            f"between logits {check['largest_difference']:.1e}"
            for name, check in checks.items()
            if isinstance(check, dict)
        ),
        f"gradients clipped to norm {norm:g}"
        if (norm := content["arguments"].get("max_grad_norm"))
        else "gradients not clipped",
        ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
    ]
    return "\n".join(f"- {line}" for line in told)


def fine_tunes() -> str:
    """README: what the two fine-tunes gave."""
    both = parity()
    seeds = f"{len(both.seeds)} seeds" if len(both.seeds) > 1 else "one seed"
    lines = [
        [
            f"SST-2, {both.facts['examples']['train']:,} sentences, LoRA, {seeds}",
            f"{both.facts['trainable']:,}",
            *(
                ", ".join(f"{accuracy(both, name, split)} {words}" for split, words in SPLITS.items())
                for name in ("minilora", "PEFT")
            ),
        ]
    ]
    for method, title in {"lora": "LoRA", "adapter": "bottleneck adapters", "both": "both"}.items():
        content = run(f"imdb-minilm-{method}")
        examples = content["data"]["examples"]
        lines.append(
            [
                f"IMDB, {examples['train']:,} reviews, {title}, one seed",
                f"{content['parameters']['trainable']:,}",
                f"{content['final']['reported']['accuracy']:.4f} test ({examples['reported']:,})",
                NOT_MEASURED,
            ]
        )
    lines.append(["bert-base-uncased", "148,994", NOT_MEASURED, NOT_MEASURED])
    return grid(["fine-tune of all-MiniLM-L6-v2", "trainable", "accuracy", "PEFT, same batches"], lines)


# The benchmarks


def ratio(content: dict[str, Any], name: str, *, title: Sequence[str], point: str | None = None) -> str:
    """The median ratio of one row, in the table whose title has all these parts."""
    for table in content["tables"]:
        if all(part in table["title"] for part in title):
            for row in table["rows"]:
                if row["name"] == name and row["point"] == point:
                    return f"{row['ratio']['median']:.2f}"
    raise SystemExit(f"{content['benchmark']}: no row {name!r}, {point!r}, in a table of {title}")


def speeds() -> str:
    """README: time against the bound, beside PEFT."""
    lines = []
    training, inference = benchmark("train_speed-cpu"), benchmark("merge_speed-cpu")
    overhead = benchmark("overhead-cpu")
    for precision, words in (("fp32", "fp32"), ("bf16-autocast", "bf16 autocast")):
        for targets, sites in (("all-linear", "every linear layer"), ("qv", "query + value")):
            title = (f", {targets},", precision)
            pair = (ratio(training, name, title=title) for name in ("minilora", "PEFT"))
            lines.append([f"training step, {sites}, {words}; x frozen base", *pair])
    for form, words in (("unmerged", "unmerged"), ("merged", "merged")):
        pair = (ratio(inference, f"{name} {form}", title=("forward",)) for name in ("minilora", "PEFT"))
        lines.append([f"inference, {words}; x bare model", *pair])
    fused = ratio(inference, "minilora fused to bf16", title=("forward",))
    lines.append(["inference, fused to bf16; x bare float32 model", fused, "-"])
    imports = {row["name"]: row.get("added") for row in overhead["tables"][0]["rows"]}
    lines.append(
        [
            "import, on top of torch, seconds",
            *(f"{imports[f'+ {name}']:+.2f}" for name in ("minilora", "PEFT")),
        ]
    )
    operations = ("inject", "load", "merge")
    ours = (ratio(overhead, "minilora", title=("all-linear",), point=operation) for operation in operations)
    lines.append([f"{' / '.join(operations)}, every linear layer; x PEFT", " / ".join(ours), "1"])
    lines.append(["GPU", NOT_MEASURED, NOT_MEASURED])
    threads = training["environment"]["threads"]
    peft = training["environment"]["versions"]["peft"]
    return grid([f"speed, {threads} CPU cores", "minilora", f"PEFT {peft}"], lines)


def tables(name: str, *columns: str) -> dict[str, Table]:
    """The tables of the newest result of a benchmark, by the given names, in their order."""
    found = [Table.from_dict(values) for values in benchmark(name)["tables"]]
    for table in found:
        table.memory_reference = "PEFT"
    return dict(zip(columns or map(str, range(len(found))), found, strict=True))


def steps() -> dict[str, Table]:
    """A training step in four set-ups."""
    setups = [f"{sites}, {words}" for words in ("fp32", "bf16 autocast") for sites in ("q+v", "all linear")]
    return tables("train_speed-cpu", *setups)


def recipe() -> dict[str, Table]:
    """A training step on the sentences of SST-2, with dropout and without."""
    with_dropout = tables("train_speed-minilm-dropout-cpu", "q+v, dropout 0.1", "all linear, dropout 0.1")
    return with_dropout | tables("train_speed-minilm-cpu", "q+v, no dropout", "all linear, no dropout")


def sixteen_bits() -> dict[str, Table]:
    """A training step on a base stored in 16 bits, and under autocast."""
    return tables("train_speed-llama-135m-bf16-cpu", "stored in bfloat16", "bf16 autocast")


def dora() -> dict[str, Table]:
    """A training step with DoRA, in units of one without."""
    return tables("train_speed-dora-cpu", "q+v", "every linear layer")


def around() -> str:
    """What surrounds a step, in units of PEFT's time."""
    columns = list(tables("overhead-cpu").values())[1:]
    lines = [
        [str(point), *(ratio_cell(table, table.at(point, "minilora")) for table in columns)]
        for point in columns[0].points()
    ]
    return grid(["operation", "q+v", "every linear layer"], lines)


def bank() -> str:
    """Many adapters in one batch; the larger batch from the run that was its own."""
    small = list(tables("many_adapters-llama-135m-cpu").values())
    large = list(tables("many_adapters-llama-135m-64-cpu").values())
    names = ("minilora merged", "minilora bank", "PEFT")
    lines = []
    for table in (*small[:2], *large[:2]):
        rows = re.search(r"\d+ rows", table.title)
        assert rows is not None
        work = "one pass" if "one forward pass" in table.title else "token by token"
        for point in table.points():
            cells = (table.at(point, name) for name in names)
            ratios = [table.ratio(cell) for cell in cells]
            shown = [f"{ratio.median:.2f}" if ratio else NOT_MEASURED for ratio in ratios]
            lines.append([f"{rows[0]}, {work}", str(point), *shown])
    return grid(["batch", "adapters in the bank", "one merged", "bank", "PEFT, `adapter_names`"], lines)


def coming_and_going() -> str:
    """What loading and switching an adapter takes."""
    table = list(tables("many_adapters-llama-135m-cpu").values())[-1]
    return curve(table)


def over_time() -> str:
    """What was measured more than once: its ratios, the oldest first."""
    measured: dict[tuple[str, str, str], list[history.Entry]] = {}
    for entry in history.read(BENCHMARKS):
        measured.setdefault((entry.benchmark, entry.table, entry.row), []).append(entry)
    lines = [
        [
            benchmark.removesuffix("-cpu"),
            f"{table}: {row}",
            ", ".join(
                f"{entry.ratio} ({entry.date}, {entry.commit}, {entry.machine.partition('(')[0].split()[0]})"
                for entry in entries
            ),
        ]
        for (benchmark, table, row), entries in measured.items()
        if len(entries) > 1
    ]
    return grid(["benchmark", "what", "ratio (date, commit, processor)"], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "train-steps": lambda: compared(steps(), ratio_cell),
    "train-memory": lambda: compared(steps(), memory_cell),
    "recipe-steps": lambda: compared(recipe(), ratio_cell),
    "recipe-memory": lambda: compared(recipe(), memory_cell),
    "sixteen-bit-steps": lambda: compared(sixteen_bits(), ratio_cell),
    "sixteen-bit-memory": lambda: compared(sixteen_bits(), memory_cell),
    "dora-steps": lambda: compared(dora(), ratio_cell),
    **{
        f"sweep-{axis}": lambda axis=axis: curve(*tables(f"train_speed-{axis}-cpu").values()) for axis in AXES
    },
    "around": around,
    "over-time": over_time,
    "bank": bank,
    "coming-and-going": coming_and_going,
    "fine-tunes": fine_tunes,
    "speeds": speeds,
    "sst2-in-full": full_sst2,
    "sst2-sweep": lambda: sweep.table(run("sst2-sweep")["runs"]),
    "sample": sample,
    "decoder": decoder,
    "decoder-answers": answers,
    "matrix": lambda: matrix.table(matrix.recorded(RUNS / "matrix.json")),
    "parity-accuracies": lambda: accuracies(parity()),
    "parity-gaps": lambda: gaps(parity()),
    "imdb": imdb,
    "encoders": encoders,
    "imdb-sweep": lambda: sweep.table(run("imdb-sweep")["runs"]),
}


def filled(page: str) -> str:
    """The page with every block of figures written anew.

    Raises:
        SystemExit: There is no such block.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise SystemExit(f"no block {found[2]!r}; there are: {', '.join(BLOCKS)}")
        return f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}"

    return BLOCK.sub(block, page)


def main(argv: Sequence[str]) -> int:
    """Write the pages, or say which are out of date. Returns the exit code."""
    stale = 0
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after == before:
            continue
        stale += 1
        if argv == ["--check"]:
            print(f"{path.relative_to(ROOT)} has other figures than the files it names; run make results")
        else:
            path.write_text(after, encoding="utf-8")
            print(f"Written: {path.relative_to(ROOT)}")
    return int(argv == ["--check"] and stale > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
