"""From file to model: `load`.

What the formats look like is told in `formats`; here is what they have in common: everything is checked
before anything changes, and every problem is in one error.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..errors import CheckpointError, MiniLoRAError, quoted, several
from ..module import InjectedModule, device_of
from ..names import described
from ..plan import Manifest, build
from ..sites import Site, Sites, require_unwrapped
from ..training import freeze
from ..words import explains_foreign_words
from .contents import Contents
from .fingerprint import Fingerprint, compare
from .formats import adapters, loralib, native, peft
from .saving import saved_tensors
from .tensors import FLOAT_DTYPES, is_finite

ReadFormat = Literal["auto", "minilora", "peft", "loralib", "adapters"]

logger = logging.getLogger("minilora")


@explains_foreign_words
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: ReadFormat = "auto",
    config: LoRAConfig | None = None,
    check_base: bool = True,
) -> nn.Module:
    """Inject what a file describes and give it the file's values. Inverse: `save`.

    On a bare model, the sites are injected and the base is frozen. On a model that already carries the
    same injections, the values alone are replaced.

    Args:
        model: the same architecture as the one that was saved; changed in place.
        path: of a file written by `save`, a PEFT folder, or what `format` says.
        format: "auto" takes a folder for PEFT's and a file for minilora's own. "loralib" is a
            `.safetensors` file of `loralib.lora_state_dict(model)`; "adapters" a folder that the adapters
            library saved for a BERT, with `use_safetensors=True`.
        config: for "loralib" alone, whose files hold neither r nor alpha.
        check_base: refuse a base other than the one that the file was trained on, where the file tells.

    Returns:
        The model itself.

    Raises:
        CheckpointError: listing everything that is wrong with the file, or in which it does not fit the
            model or its base; the model is as it was.
        MiniLoRAError: when the model is wrapped in DDP, FSDP or `torch.compile`, or an argument is wrong.
        OSError: when there is no such file, or it cannot be read.

    Warns:
        UserWarning: when a PEFT file trains modules that its config names in part only.
    """
    require_unwrapped(model)
    contents = read(Path(path), format=format, config=config)
    outcome = f"{os.fspath(path)!r} was not loaded and the model has not been changed"
    sites, plan = Sites(model), None
    problems = contents.disagreements(sites)
    injected = {name: site for name, site in sites.injected().items() if any(w.trains for w in site.wrappers)}
    if injected:
        problems += _differences(contents.manifest, injected)
    else:
        plan, misfits = build(contents.manifest, sites, without_values=True)
        injected = plan.sites()
        problems += misfits.lines()
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            problems.append("the model is on the meta device: give it its weights first, then load")
    if problems:
        raise CheckpointError(several(problems, outcome=outcome))
    if problems := list(_misfits(saved_tensors(injected), contents.tensors)):
        raise CheckpointError(several(problems, outcome=outcome))
    if contents.damage:
        raise CheckpointError(several([contents.damage], outcome=outcome))
    if check_base and contents.base is not None:
        _require_same_base(contents.base, injected, outcome)
    values = _values(contents.tensors, injected, device_of(model))
    for note in contents.notes:  # before anything changes: a warning may be turned into an error
        warnings.warn(note, UserWarning, stacklevel=3)
    for wrapper, state in values.items():
        wrapper.load_saved_state(state)
    if plan is not None:
        plan.put_in_place()
        freeze(model)
    return model


def _values(
    tensors: Mapping[str, Tensor], injected: Mapping[str, Site], default: torch.device
) -> dict[InjectedModule, dict[str, Tensor]]:
    """Return what each wrapper shall hold, all of it on its device before the first takes its share."""
    values: dict[InjectedModule, dict[str, Tensor]] = {}
    for name, site in injected.items():
        device = device_of(site.bare, default)
        for wrapper in site.wrappers:
            values[wrapper] = {
                key: tensors[f"{name}.{key}"].to(device, live.dtype)
                for key, live in wrapper.saved_state().items()
            }
    return values


def read(path: Path, *, format: ReadFormat = "auto", config: LoRAConfig | None = None) -> Contents:
    """Return what an adapter file holds, in whatever format, without a model.

    Raises:
        CheckpointError: when the file is not sound, or holds what minilora does not do.
        MiniLoRAError: when `format` is none that is read, or `config` is given or left out wrongly.
        OSError: when there is no such file, or it cannot be read.
    """
    if format not in get_args(ReadFormat):
        raise MiniLoRAError(f"format must be one of {quoted(get_args(ReadFormat))}, not {format!r}")
    if (config is not None) != (format == "loralib"):
        raise MiniLoRAError(
            'config goes with format="loralib", whose files hold neither r nor alpha, and with no other: '
            'minilora.load(model, path, format="loralib", config=LoRAConfig(r=8, alpha=16))'
        )
    if config is not None:
        return loralib.read(path, config)
    if format == "adapters":
        return adapters.read(path)
    if format == "peft" or (format == "auto" and path.is_dir()):
        return peft.read(path)
    return native.read(path)


def _require_same_base(recorded: Fingerprint, injected: Mapping[str, Site], outcome: str) -> None:
    concerned = {name: site for name, site in injected.items() if name in recorded.signatures}
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


def _differences(manifest: Manifest, injected: Mapping[str, Site]) -> Iterator[str]:
    """Yield how a file's injections differ from those that a model carries already."""
    merged = [name for name, site in injected.items() if any(wrapper.merged for wrapper in site.wrappers)]
    if merged:
        yield f"{described(merged)}: merged; call minilora.unmerge(model), then load"
    wanted, present = manifest.placed(), Manifest.of(injected).placed()
    advice = "call minilora.eject(model) first to load this file into the base"
    for what, names in (
        (
            "in the file, but not injected in the model",
            sorted(site for site, _ in wanted.keys() - present.keys()),
        ),
        (
            "injected in the model, but not in the file",
            sorted(site for site, _ in present.keys() - wanted.keys()),
        ),
        (
            "injected with another configuration than the file's",
            sorted(key[0] for key in wanted.keys() & present.keys() if wanted[key] != present[key]),
        ),
    ):
        if names:
            yield f"{described(names)}: {what}; {advice}"


def _misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield everything in which a file's tensors are not the ones that its own manifest calls for."""
    if missing := [key for key in expected if key not in given]:
        yield f"missing from the file: {quoted(missing)}"
    if extra := [key for key in given if key not in expected]:
        yield f"in the file, but called for by nothing: {quoted(extra)}"
    for key, target in expected.items():
        if (value := given.get(key)) is None:
            continue
        if value.shape != target.shape:
            yield f"{key!r} has shape {tuple(value.shape)}, the model needs {tuple(target.shape)}"
        elif not _holds(target.dtype, value.dtype):
            yield (
                f"{key!r} is {value.dtype}, which {target.dtype} cannot hold without loss; load into a model "
                f"of {value.dtype} and cast it afterwards"
            )
        elif not is_finite(value):
            yield f"{key!r} is not finite"


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Return whether every value of one dtype has its place in another."""
    if {wide, narrow} <= set(FLOAT_DTYPES.values()):
        return torch.promote_types(wide, narrow) == wide
    return wide == narrow
