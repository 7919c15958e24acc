"""The documentation's code runs, prints what the pages say it prints, and the reference has every name.

A block marked ```python is run, in order, in one namespace per page; ```python notest is not. A block marked
```output is what the Python block before it prints.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from models import transformers_major
from test_api import imported, modules

import minilora

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "reference.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    info: str
    code: str
    line: int  # of its first line of code, counted from 1


def blocks_of(text: str) -> list[Block]:
    return [
        Block(match["info"].strip(), match["code"], text.count("\n", 0, match.start("code")) + 1)
        for match in FENCE.finditer(text)
    ]


def run_page(path: Path, namespace: dict[str, Any]) -> int:
    """Runs the Python blocks of a page, compares what they print, and returns how many ran."""
    printed: str | None = None
    ran = 0
    for block in blocks_of(path.read_text(encoding="utf-8")):
        if block.info == "python":
            # Empty lines in front, so that a traceback names the line in the page.
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(code, namespace)
            printed = stdout.getvalue()
            ran += 1
        elif block.info == "output":
            assert printed is not None, f"{path}:{block.line}: an output with no Python block before it"
            assert printed.rstrip() == block.code.rstrip(), f"{path}:{block.line}: prints something else"
            printed = None
        else:
            printed = None
    return ran


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty folder to write into, and a random state of its own."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield
    if torch.distributed.is_initialized():  # a page that failed half-way
        torch.distributed.destroy_process_group()


def tiny_bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page(path, sandbox):
    pytest.importorskip("transformers")
    if path.name in ("gallery.md", "kinds.md") and transformers_major() < 5:
        pytest.skip("these transformers do not fuse experts")
    if path.name == "distributed.md" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of this torch does not compute on a CPU")
    if path.name == "kinds.md" and not hasattr(torch, "_grouped_mm"):
        pytest.skip("without a grouped product, transformers' stand-in gives every expert a gradient")
    try:
        run_page(path, {"__name__": "page"})
    except ModuleNotFoundError as error:
        if error.name not in ("peft", "bitsandbytes"):
            raise
        pytest.skip(f"this page is about {error.name}, too, which is not installed")


def test_readme(sandbox, monkeypatch):
    """The README may download a model; here a tiny one stands in for it, and for a few usual names."""
    transformers = pytest.importorskip("transformers")
    if not README.exists():
        pytest.skip("there is no README.md")
    for name in ("AutoModelForSequenceClassification", "BertForSequenceClassification"):
        owner = getattr(transformers, name)
        monkeypatch.setattr(owner, "from_pretrained", lambda *args, **kwargs: tiny_bert())
    batch = {"input_ids": torch.randint(100, (4, 16)), "labels": torch.tensor([0, 1, 0, 1])}
    names = {"model": tiny_bert(), "fresh_model": tiny_bert(), "batch": batch, "loader": [batch] * 2}
    assert run_page(README, {"__name__": "readme", "torch": torch, "minilora": minilora, **names})


# The reference


def test_the_reference_has_every_public_name_and_no_other():
    """Each is listed as what it is; the text comes from the docstring when the site is built."""
    listed = re.findall(r"^\.\. auto(\w+):: minilora\.(\w+)$", REFERENCE.read_text(encoding="utf-8"), re.M)
    assert sorted(listed, key=lambda kind_and_name: kind_and_name[1]) == [
        (kind_of(getattr(minilora, name)), name) for name in minilora.__all__
    ]


def kind_of(value: object) -> str:
    if not isinstance(value, type):
        return "function"
    return "exception" if issubclass(value, Exception) else "class"


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {minilora.__version__}\n" in citation


def test_how_it_works_names_every_file_of_the_core_and_no_other():
    table = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").split("| file | has |")[1]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    row = {name: i for i, names in enumerate(rows) for name in re.findall(r"`([\w./]+)`", names)}
    core = {f"{name}.py": path for name, path in modules().items() if "." not in name and path.stem == name}
    del core["__init__.py"], core["__main__.py"]
    assert sorted(row) == sorted(
        [
            *core,
            *(
                "files/",
                "bank/",
                "cli/",
                "diagnosis/",
                "distributed/",
                "quantized/",
                "trainers/",
                "variants/",
            ),
        ]
    )
    for file, path in core.items():
        names = {
            f"{name.split('.')[0]}/" if "." in name else f"{name}.py" for name in imported(path.stem, path)
        }
        assert all(row[name] >= row[file] for name in names), file


# Links and drawings


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found = re.findall(r"^#+ (.*)$", FENCE.sub("", text), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line)) for line in found)
    return {line.lower().replace(" ", "-") for line in plain}


def broken_links(page: Path) -> list[str]:
    """Return the links and pictures of a page that lead nowhere; other hosts are not asked."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [t for t in targets if "://" not in t and not t.startswith("mailto:") and not leads(page, t)]


def leads(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    if not anchor or not file.exists():
        return file.exists()
    if file == REFERENCE and anchor.startswith("minilora."):
        return anchor.split(".")[1] in minilora.__all__
    return anchor in headings(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path",
    [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("[be]*/**/*.md")],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_links_lead_somewhere(path):
    """As GitHub shows the pages; the build of the site checks them there."""
    assert broken_links(path) == []


def test_the_drawings_are_what_the_script_draws():
    drawn = runpy.run_path(str(ROOT / "scripts" / "drawings.py"))
    files = {path.stem: path.read_text(encoding="utf-8") for path in drawn["FOLDER"].glob("*.svg")}
    assert files == {name: draw().svg() for name, draw in drawn["DRAWINGS"].items()}
    for text in files.values():
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


# Tests of the tests


def test_the_pages_have_code():
    counts = {
        path.name: sum(b.info == "python" for b in blocks_of(path.read_text(encoding="utf-8")))
        for path in PAGES
    }
    pages = ("adapters", "faq", "how-it-works", "merging", "quickstart", "saving", "targets", "training")
    assert all(counts[f"{page}.md"] >= 2 for page in pages), counts


def test_every_fence_is_understood():
    """A misspelt mark, as in ```Python, would leave a block unrun and nobody the wiser."""
    known = {"python", "python notest", "output", "text", "bash", "pycon", "json", "{eval-rst}", ""}
    for path in [*PAGES, *([README] if README.exists() else [])]:
        text = path.read_text(encoding="utf-8")
        blocks = blocks_of(text)
        assert {block.info for block in blocks} <= known, path
        assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks), path


COLUMNS = re.compile(r"\S {2,}\S|[─│├└┬┴]")
"""Printed text in columns, which the site scrolls (docs/conf.py has the same); all else wraps there."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_fits_the_page(path):
    """80 columns of code and 98 of what stands in columns, as many as the site shows at 1300 pixels."""
    for block in blocks_of(path.read_text(encoding="utf-8")):
        widest = max(map(len, block.code.splitlines()), default=0)
        if block.info.startswith("python"):
            assert widest <= 80, f"{path}:{block.line}"
        elif COLUMNS.search(block.code):
            assert widest <= 98, f"{path}:{block.line}"


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, [c](page.md) & d\n\n[1](page.md#a-b-c--d) [2](#a) ![3](no.png)\n```\n[4](no)\n```\n"
    )
    assert broken_links(page) == ["#a", "no.png"]


def test_a_failing_block_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_page(page, {})
    assert caught.traceback[-1].lineno + 1 == 8


def test_a_wrong_output_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```output\n2\n```\n")
    with pytest.raises(AssertionError, match="prints something else"):
        run_page(page, {})
    page.write_text("```python\nprint(1)\n```\n\n```output\n1\n```\n\n```python notest\nraise\n```\n")
    assert run_page(page, {}) == 1
