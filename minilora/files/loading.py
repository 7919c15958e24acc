"""From file to model: `load`.

What the formats look like is told in `formats`; here is what they have in common: everything is checked
before anything changes, and every problem is in one error. Values are read last, and only those of tensors
that the model has a place for.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..errors import CheckpointError, MiniLoRAError, quoted, several
from ..followers import tell_followers
from ..manifest import Manifest
from ..module import InjectedModule, device_of
from ..names import described, nearest, outermost_of
from ..plan import Plan, build
from ..problems import Problems
from ..sites import Site, Sites, require_whole
from ..words import explains_foreign_words
from .agreement import ConfigFrom, differences, require_side, take_configs
from .base_values import other_base_values
from .contents import Announced, Contents
from .fingerprint import Fingerprint, compare
from .formats import adapters, loralib, native, peft, trainer
from .paths import path_for
from .renaming import proposal, renaming_for
from .saving import saved_tensors
from .tensors import FLOAT_DTYPES, is_finite

ReadFormat = Literal["auto", "minilora", "peft", "trainer", "loralib", "adapters"]

logger = logging.getLogger("minilora")


@dataclass(frozen=True)
class Reading:
    """How a file is to be read; what each means is told by `load`."""

    format: ReadFormat = "auto"
    config: LoRAConfig | None = None
    config_from: ConfigFrom | None = None
    rename: Mapping[str, str] | None = None
    check_base: bool = True
    allow_pickle: bool = False


@explains_foreign_words
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: ReadFormat = "auto",
    config: LoRAConfig | None = None,
    config_from: ConfigFrom | None = None,
    rename: Mapping[str, str] | None = None,
    check_base: bool = True,
    allow_pickle: bool = False,
) -> nn.Module:
    """Inject what a file describes and give it the file's values. Inverse: `save`.

    On a bare model, the sites are injected and the base is frozen. On a model that already carries the
    same injections, the values alone are replaced.

    Args:
        model: the same architecture as the one that was saved; changed in place.
        path: of a file written by `save`, a PEFT folder, or what `format` says.
        format: "auto" takes a folder for PEFT's and a file for minilora's own. "trainer", told by itself
            too, is a checkpoint that transformers' Trainer wrote after `slim_checkpoints`. "loralib" is a
            `.safetensors` file of `loralib.lora_state_dict(model)`, with or without a task head; "adapters"
            a folder that the adapters library saved for a BERT, with `use_safetensors=True`.
        config: for "loralib" alone, whose files hold neither r nor alpha.
        config_from: for a model that carries the same injections with another alpha, dropout, `rslora` or
            `init` than the file says: "file" gives it the file's, "model" keeps the model's. None lets
            nothing differ. Other ranks need another injection: `eject` first.
        rename: from names in the file to the model's, where modules were renamed since: {"query": "q_proj"}
            for each run of whole segments. An error proposes one where it fits all sites. None takes what
            a model of transformers says of itself (`_checkpoint_conversion_mapping`).
        check_base: refuse a base other than the one that the file was trained on, where the file tells.
        allow_pickle: read a PEFT folder's `adapter_model.bin` with torch's restricted unpickler, where there
            is no `.safetensors` file. Only for files from people whom you trust.

    Returns:
        The model itself.

    Raises:
        CheckpointError: listing everything that is wrong with the file, or in which it does not fit the
            model or its base; the model is as it was.
        MiniLoRAError: when the model is wrapped in DDP, FSDP or `torch.compile`, or an argument is wrong.
        OSError: when there is no such file, or it cannot be read.

    Warns:
        UserWarning: when a PEFT file trains modules that its config names in part only, or holds a head in
            a wider dtype than the model's, to which it is rounded, as PEFT does.

    Example:
        >>> import copy
        >>> base = nn.Sequential(nn.Linear(4, 2))
        >>> model = minilora.inject(copy.deepcopy(base), "0", minilora.LoRAConfig(r=1))
        >>> minilora.save(model, "adapter.safetensors")
        >>> model = minilora.load(base, "adapter.safetensors")
        >>> list(minilora.adapter_state_dict(model))
        ['0.lora_A', '0.lora_B']
    """
    file = path_for(path, model, call="load(model, path)")
    require_whole(model)
    _require_no_hub_id(file)
    sites = Sites(model)
    injected = {name: site for name, site in sites.injected().items() if site.trains}
    outcome = f"{str(file)!r} was not loaded and the model has not been changed"
    how = Reading(format, config, config_from, rename, check_base, allow_pickle)
    fitted = fit(file, sites, injected, how, outcome=outcome)
    values = _on_their_devices(fitted.tensors, fitted.injected, device_of(model))
    for note in fitted.notes:  # before anything changes: a warning may be turned into an error
        warnings.warn(note, UserWarning, stacklevel=3)
    for wrapper, state in values.items():
        wrapper.load_saved_state(state)
    if config_from == "file":
        take_configs(fitted.manifest, fitted.injected)
    if fitted.plan is not None:
        fitted.plan.put_in_place()
    tell_followers(model)
    return model


def _require_no_hub_id(file: Path) -> None:
    """Raise where a path leads nowhere and reads like the name of a repository on the hub.

    Raises:
        FileNotFoundError: with the call that downloads it.
    """
    name = str(file)
    if (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
        and file.suffix != ".safetensors"
        and not file.parent.exists()
    ):
        text = (
            "nothing is there, and nothing is downloaded; if it is on the hub: "
            f"minilora.load(model, huggingface_hub.snapshot_download({name!r}))"
        )
        raise FileNotFoundError(errno.ENOENT, text, name)


@dataclass(frozen=True)
class Fitted:
    """What a file holds, read and found to fit a model, which has not been changed yet."""

    manifest: Manifest
    """What stands where, by the model's names."""
    tensors: Mapping[str, Tensor]
    """By the names that a file uses; on the CPU."""
    injected: Mapping[str, Site]
    """The sites that they belong to, with wrappers that are there already, or that the plan brings."""
    plan: Plan | None
    """New wrappers, without values; None where the model has them already."""
    notes: tuple[str, ...] = ()
    """What a user should hear."""


def fit(file: Path, sites: Sites, injected: Mapping[str, Site], how: Reading, *, outcome: str) -> Fitted:
    """Read a file and check it against a model, all that `load` does before it changes anything.

    Args:
        file: as `load` takes it.
        sites: of the model.
        injected: the sites whose wrappers shall take the values; empty for new wrappers.
        how: to read the file.
        outcome: what became of the work, for the errors.

    Raises:
        CheckpointError: listing everything that is wrong.
        MiniLoRAError: when an argument is wrong.
        OSError: when there is no such file, or it cannot be read.
    """
    require_side(how.config_from)
    renaming = renaming_for(how.rename, sites.model, file)
    named = sites if renaming is None else renaming.file_sites(sites)
    with _reading(file, how, named) as announced:
        plan: Plan | None = None
        problems = announced.disagreements(named)
        if renaming is not None:
            problems += renaming.problems(announced.entries)
            announced = announced.renamed(renaming.to_model)  # noqa: PLW2901  the same file
        if injected:
            problems += differences(announced.manifest, injected, how.config_from)
        else:
            plan, misfits = build(announced.manifest, sites, without_values=True)
            injected = plan.sites()
            problems += misfits.lines(lambda names: meant_instead(names, sites))
            model = sites.model
            if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
                problems.append("the model is on the meta device: give it its weights first, then load")
        if problems:
            footer = proposal([name for name, _ in announced.manifest.placed()], sites)
            raise CheckpointError(several(problems, outcome=outcome, footer=footer))
        tensors, problems, notes = _read_values(announced, saved_tensors(injected))
        problems += other_base_values(announced.base_values, sites)
        if problems := problems or [damage for damage in [announced.damage(tensors)] if damage]:
            raise CheckpointError(several(problems, outcome=outcome))
    if how.check_base and announced.base is not None:
        _require_same_base(announced.base, injected, outcome)
    return Fitted(announced.manifest, tensors, injected, plan, (*announced.notes, *notes))


def read(path: Path) -> Contents:
    """Return what a file of minilora's, a PEFT folder or a Trainer's checkpoint holds, without a model.

    Raises:
        CheckpointError: when the file is not sound, or holds what minilora does not do.
        OSError: when there is no such file, or it cannot be read.
    """
    with _reading(path, Reading()) as announced:
        return announced.contents()


def _reading(path: Path, how: Reading, sites: Sites | None = None) -> AbstractContextManager[Announced]:
    """Return a context with what a file announces, in whatever format.

    Raises:
        MiniLoRAError: when `format` is none that is read, or `config` is given or left out wrongly.
    """
    format, config = how.format, how.config
    if format not in get_args(ReadFormat):
        raise MiniLoRAError(f"format must be one of {quoted(get_args(ReadFormat))}, not {format!r}")
    if (config is not None) != (format == "loralib"):
        raise MiniLoRAError(
            'config goes with format="loralib", whose files hold neither r nor alpha, and with no other: '
            'minilora.load(model, path, format="loralib", config=LoRAConfig(r=8, alpha=16))'
        )
    if config is not None and sites is not None:
        return loralib.reading(path, config, sites)
    if format == "adapters":
        return adapters.reading(path)
    if format == "trainer" or (format == "auto" and trainer.is_checkpoint(path)):
        return trainer.reading(path)
    if format == "peft" or (format == "auto" and path.is_dir()):
        return peft.reading(path, sites, allow_pickle=how.allow_pickle)
    return native.reading(path)


def meant_instead(names: list[str], sites: Sites) -> str:
    """Return the name in the model that is nearest to the first of some that it has not, as a hint."""
    near = nearest(names[0], sites, limit=1) if names[0] not in sites else []
    return f"; nearest: {near[0]!r}" if near else ""


def _read_values(
    announced: Announced, expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Read the tensors that fit, and return them with all problems, and with what a user should hear.

    Args:
        announced: what the file says that it holds.
        expected: what the file's own manifest calls for on this model, by name.
    """
    tensors: dict[str, Tensor] = {}
    problems = []
    if missing := [key for key in expected if key not in announced.entries]:
        problems.append(f"missing from the file: {described(missing)}")
    if extra := [key for key in announced.entries if key not in expected]:
        problems.append(f"in the file, but called for by nothing: {described(extra)}")
    misfits, rounded = Problems(), Problems()
    heads = set(announced.manifest.trainable)
    for key, target in expected.items():
        if (entry := announced.entries.get(key)) is None:
            continue
        if entry.shape != tuple(target.shape):
            misfits.add(key, f"shape {entry.shape}, the model needs {tuple(target.shape)}")
            continue
        if not _holds(target.dtype, entry.dtype):
            in_head = outermost_of(key, heads) is not None
            if not (announced.rounds_heads and in_head and _are_floats(target.dtype, entry.dtype)):
                misfits.add(
                    key,
                    f"{entry.dtype}, which {target.dtype} cannot hold without loss; load into a model of "
                    f"{entry.dtype} and cast it afterwards",
                )
                continue
            rounded.add(key, f"{entry.dtype}, rounded to the model's {target.dtype}, as PEFT does")
        tensors[key] = entry.read()
        if not is_finite(tensors[key]):
            misfits.add(key, "not finite")
    return tensors, problems + misfits.lines(), rounded.lines()


def _require_same_base(recorded: Fingerprint, injected: Mapping[str, Site], outcome: str) -> None:
    concerned = {
        name: site
        for name, site in injected.items()
        if any(wrapper.placed_at(name) in recorded.signatures for wrapper in site.wrappers)
    }
    comparison = compare(recorded, Fingerprint.of(concerned))
    if comparison.different:
        raise CheckpointError(
            several(
                [f"this is not the base that the adapter was trained on: {comparison}"],
                outcome=outcome,
                footer="Load it into the base that it was trained on, or pass check_base=False.",
            )
        )
    logger.info("base of the adapter: %s", comparison)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Return whether every value of one dtype has its place in another."""
    return wide == narrow or (_are_floats(wide, narrow) and torch.promote_types(wide, narrow) == wide)


def _are_floats(*dtypes: torch.dtype) -> bool:
    return set(dtypes) <= set(FLOAT_DTYPES.values())


def _on_their_devices(
    tensors: Mapping[str, Tensor], injected: Mapping[str, Site], default: torch.device
) -> dict[InjectedModule, dict[str, Tensor]]:
    """Return what each wrapper shall hold, all of it on its device before the first takes its share."""
    values: dict[InjectedModule, dict[str, Tensor]] = {}
    for name, site in injected.items():
        device = device_of(site.bare, default)
        for wrapper in site.wrappers:
            # A copy, because the file's own belongs to a buffer, and what is trained must be torch's.
            values[wrapper] = {
                key: tensors[f"{name}.{key}"].to(device, live.dtype, copy=True)
                for key, live in wrapper.saved_state().items()
            }
    return values
