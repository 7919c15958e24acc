"""What a release says of itself agrees: version, changelog, and the workflow that a tag starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).parent.parent
CHANGELOG = ROOT / "CHANGELOG.md"

if not CHANGELOG.exists():
    pytest.skip("this is not a checkout", allow_module_level=True)


def test_the_newest_heading_of_the_changelog_is_the_version() -> None:
    headings = re.findall(r"^## \[(.+?)\] - (.+)$", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
    version, when = headings[0]
    assert version == minilora.__version__
    assert when == "unreleased" or re.fullmatch(r"\d{4}-\d{2}-\d{2}", when)
    assert len({version for version, _ in headings}) == len(headings)


def test_a_tag_publishes_what_was_checked() -> None:
    """The steps that a person cannot try: the names which one job leaves and the next one takes."""
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert workflow.index("make wheel-check") < workflow.index("pypi-publish")
    assert re.findall(r"needs: (\w+)", workflow) == ["build"]
    assert re.findall(r"name: (dist)", workflow) == ["dist", "dist"]
    assert "id-token: write" in workflow
    assert "password" not in workflow
    assert 'cp -r dist "$root/dist"' in (ROOT / "scripts" / "wheel_check.sh").read_text(encoding="utf-8")
