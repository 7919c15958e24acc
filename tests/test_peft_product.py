"""The page of PEFT's settings says what holds, kind by kind."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft_product import KINDS, VARIANTS, Kind

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "peft-settings.md"

pytestmark = pytest.mark.peft


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_page_says_what_holds(kind: Kind, load_script: Callable[[str], ModuleType]) -> None:
    product = load_script("peft_product")
    found = product.outcomes([kind])
    assert len(found) == len(VARIANTS)
    assert {outcome.setting.name: outcome.failed for outcome in found if outcome.failed} == {}
    assert product.row(kind.name, found) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_is_of_these_kinds_and_variants() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| {kind.name} |" in text for kind in KINDS)
    assert "; ".join(VARIANTS) in text
