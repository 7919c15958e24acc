"""The recipe for Lightning, as the page has it; the plain loop is run with the other pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import PAGES, blocks_of

import minilora

lightning = pytest.importorskip("lightning")

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own: few workers, no logger, few batches

PAGE = next(path for path in PAGES if path.name == "recipes.md")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page defines, and the folder in which its last block has trained."""
    first, *_ = [b.code for b in blocks_of(PAGE.read_text(encoding="utf-8")) if b.info == "python"]
    blocks = [b.code for b in blocks_of(PAGE.read_text(encoding="utf-8")) if b.info == "python notest"]
    names: dict[str, Any] = {"folder": tmp_path_factory.mktemp("lightning")}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(names["folder"])
        patch.setattr(lightning, "Trainer", quiet)
        for code in (first, *blocks):
            exec(code, names)
    return names


def quiet(**arguments: Any) -> Any:
    """The Trainer, on the CPU, and writing nothing but checkpoints."""
    from lightning.pytorch import Trainer

    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_checkpoints_are_slim_and_the_best_becomes_an_adapter(page: dict[str, Any]) -> None:
    stored = torch.load(page["checkpoints"].last_model_path, weights_only=False)["state_dict"]
    assert sorted(stored) == [
        "model.0.lora_A",
        "model.0.lora_B",
        "model.2.trained.bias",
        "model.2.trained.weight",
    ]
    best = minilora.load(minilora.eject(page["make"]()), page["folder"] / "best.safetensors").state_dict()
    of_best = torch.load(page["checkpoints"].best_model_path, weights_only=False)["state_dict"]
    fresh = page["make"]().state_dict()
    assert all(torch.equal(best[name.removeprefix("model.")], of_best[name]) for name in stored)
    assert not any(torch.equal(fresh[name.removeprefix("model.")], of_best[name]) for name in stored)


def test_a_resumed_run_ends_with_the_same_bits(page: dict[str, Any], tmp_path: Path) -> None:
    class Seeded(page["Classifier"]):  # type: ignore[misc]
        """With the same dropout, resumed or not."""

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            torch.manual_seed(self.global_step)

    loader = torch.utils.data.DataLoader(page["train_set"], 32)
    callback = lightning.pytorch.callbacks.ModelCheckpoint
    whole, again = Seeded(page["make"]()), Seeded(page["make"]())
    each = callback(tmp_path, filename="{epoch}", save_top_k=-1)
    quiet(max_epochs=2, callbacks=[each]).fit(whole, loader)
    into = callback(tmp_path / "again")
    quiet(max_epochs=2, callbacks=[into]).fit(again, loader, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert again.global_step == 2 * len(loader)


def test_a_checkpoint_that_lacks_what_was_trained_is_refused(page: dict[str, Any], tmp_path: Path) -> None:
    content = torch.load(page["checkpoints"].best_model_path, weights_only=False)
    del content["state_dict"]["model.0.lora_A"]
    torch.save(content, tmp_path / "less.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*model\.0\.lora_A"):
        page["Classifier"].load_from_checkpoint(tmp_path / "less.ckpt", model=page["make"]())
