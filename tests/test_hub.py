"""What the page on the hub shows, against the client's own signatures; no network is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from test_docs import PAGES, blocks_of

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")

PAGE = next(path for path in PAGES if path.name == "hub.md")


def test_the_lines_that_push_and_pull_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    repositories = tmp_path / "hub"

    def create_repo(repo_id: str, **_: Any) -> None:
        (repositories / repo_id).mkdir(parents=True)

    def upload_folder(*, repo_id: str, folder_path: str, **_: Any) -> None:
        shutil.copytree(folder_path, repositories / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id: str, **_: Any) -> str:
        return str(repositories / repo_id)

    for stand_in in (create_repo, upload_folder, snapshot_download):  # called as the client can be called
        real = getattr(hub, stand_in.__name__)
        monkeypatch.setattr(hub, stand_in.__name__, create_autospec(real, side_effect=stand_in))
    namespace: dict[str, Any] = {}
    for block in blocks_of(PAGE.read_text(encoding="utf-8")):
        if block.info == "python notest" or (block.info == "python" and not namespace):
            exec(block.code, namespace)
    pushed = repositories / "someone" / "sst2-lora"
    assert sorted(path.name for path in pushed.iterdir()) == sorted(
        path.name for path in (tmp_path / "sst2-lora").iterdir()
    )
    assert (
        hub.ModelCard.load(namespace["snapshot_download"]("someone/sst2-lora") + "/README.md").data.base_model
        == "someone/tiny-bert"
    )
