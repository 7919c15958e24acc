"""From model to file: `save` and `adapter_state_dict`."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor, nn

from ..distributed.gathering import stand_in
from ..distributed.writing import by_one
from ..errors import CheckpointError, MiniLoRAError, quoted, several
from ..manifest import Manifest
from ..names import described
from ..problems import Problems
from ..sites import Site, Sites, require_injected, require_unwrapped
from ..targets import matching
from ..torch_internals import own_parameters
from ..training import added_tensors, thawed_parameters
from .contents import Contents
from .fingerprint import Fingerprint
from .formats import native, peft
from .formats.peft import Figures
from .paths import path_for
from .tensors import is_finite

WriteFormat = Literal["minilora", "peft"]


def adapter_state_dict(model: nn.Module, *, format: WriteFormat = "minilora") -> dict[str, Tensor]:
    """Return what was trained, by the names that `save` writes.

    Args:
        model: an injected model; of a sharded one (FSDP2), every process calls.
        format: "minilora", or "peft" for the tensors of a PEFT folder, to send to a server that has the rest.

    Returns:
        The tensors, detached. They share memory with the model, but those that PEFT lays out otherwise, and
        those that were gathered.

    Raises:
        CheckpointError: when PEFT's format cannot express what the model carries, or a tensor that it would
            hold is not finite, or has no values (meta).
        MiniLoRAError: when the model carries no injection, or the format is none.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(4, 2)), "0", minilora.LoRAConfig(r=1))
        >>> list(minilora.adapter_state_dict(model))
        ['0.lora_A', '0.lora_B']
    """
    require_format(format)
    saveable(require_injected(model))
    sites = Sites(stand_in(model))
    injected = sites.injected()
    if format == "peft":
        return peft.composed(contents_of(injected), sites).tensors
    return {key: tensor.detach() for key, tensor in saved_tensors(injected).items()}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: WriteFormat = "minilora",
    portable: bool = False,
    figures: Figures | None = None,
) -> None:
    """Write what was trained, with its configuration and a fingerprint of its base. Inverse: `load`.

    "minilora" is one `.safetensors` file. It is written beside its final place, flushed to disk, and then
    renamed: a good file that stood there is replaced whole or not at all. Merged or not, the same bytes
    are written.

    "peft" is a folder that PEFT and vLLM read: `adapter_config.json`, `adapter_model.safetensors` and, for
    the hub, `README.md`. A new folder appears whole or not at all. In one that exists these files are
    replaced, a `README.md` of your own and other files stay; if the process dies meanwhile, the old
    adapter, the new one, or no `adapter_config.json` is found, never the config of one with the tensors of
    the other.

    Of a model that FSDP2 has sharded, the values are gathered: every process calls, the first one writes the
    bytes that one process with the whole model would, and the others return when they are there. What that
    one raises, all raise. Of a model that is whole, as in DDP, who calls writes.

    Args:
        model: an injected model.
        path: of the file or the folder; the folder it goes in exists. The mode of a file that is there
            already is kept, and a symbolic link is followed.
        format: "minilora" or "peft".
        portable: with "peft", write what every server reads alike: the scaling in B, in float32, alpha = r,
            and one rank for all sites, filled up with zeros to one that vLLM takes. LoRA on linear layers and
            embeddings alone.
        figures: with "peft", what the run gave, for the card: {"validation accuracy": 0.8796, "seeds": 1}.

    Raises:
        CheckpointError: when a tensor is not finite, or has no values (meta), or the format, or being
            portable, cannot express what the model carries, or figures have no place because `README.md`
            is your own; nothing is written.
        MiniLoRAError: when the model carries no injection, or is wrapped in DDP, FSDP1 or `torch.compile`, or
            an argument is wrong.
        OSError: when the file cannot be written; what was there before still is.

    Warns:
        UserWarning: when parameters train that no injection brought, and that are not saved therefore.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(4, 2)), "0", minilora.LoRAConfig(r=1))
        >>> minilora.save(model, "adapter.safetensors")
        >>> minilora.save(model, "adapter", format="peft")
        >>> sorted(os.listdir("adapter"))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    target = path_for(path, model, call="save(model, path)")
    require_format(format, portable=portable, figures=figures)
    require_unwrapped(model)
    sites = Sites(stand_in(model))
    injected = saveable(sites.injected() or require_injected(model))
    contents = contents_of(injected)
    if thawed := thawed_parameters(sites.model, added_tensors(injected)):
        warnings.warn(
            f"{described(thawed)}: trained, but not saved, since no injection brought it. "
            f"{_to_save_it(sites, thawed)}or freeze it: minilora.freeze(model)",
            UserWarning,
            stacklevel=2,
        )
    by_one(model, lambda: write(target, contents, sites, format, portable=portable, figures=figures))


def _to_save_it(sites: Sites, thawed: Mapping[str, nn.Parameter], limit: int = 8) -> str:
    """Return the call after which what trains beside the injections is saved too, or nothing without one."""
    ids = {id(parameter) for parameter in thawed.values()}
    names: dict[str, None] = {}
    for site in sites.parameters():
        owned = own_parameters(site.bare)
        if id(owned[site.parameter or ""]) not in ids or not site.owner or len(sites.owners(site)) > 1:
            continue
        if not site.trains and all(p is None or id(p) in ids for p in owned.values()):
            names[site.owner] = None
        elif not any(getattr(wrapper, "parameter", None) == site.parameter for wrapper in site.wrappers):
            names[site.name] = None
    if not names or len(names) > limit:
        return "Name it in trainable=[...] when injecting, " if names else "Leave it to LoRA alone, "
    # A name is taken for the end of one, too; where that would be more, the whole name is asked for.
    shown = [repr(n) if matching(n, sites) == [n] else f"re.compile({re.escape(n)!r})" for n in names]
    return (
        f"To go on with a copy of it as it is now, which is saved: minilora.inject(model, [], "
        f"trainable=[{', '.join(shown)}]), and a new optimizer; "
    )


def require_format(format: str, *, portable: bool = False, figures: Figures | None = None) -> None:
    """Raise for a format that is not written, or that cannot be portable or tell figures.

    Raises:
        MiniLoRAError: naming those that are; also for figures that are none.
    """
    if portable and format != "peft":
        raise MiniLoRAError('portable goes with format="peft", which servers read')
    if figures is not None and format != "peft":
        raise MiniLoRAError('figures go with format="peft", whose model card shows them')
    peft.require_figures(figures or {})
    if format not in get_args(WriteFormat):
        raise MiniLoRAError(f"format must be one of {quoted(get_args(WriteFormat))}, not {format!r}")


def contents_of(injected: Mapping[str, Site]) -> Contents:
    """Return what some wrappers hold, for a file.

    Raises:
        CheckpointError: when a tensor is not finite, or has no values (meta).
    """
    tensors = {key: tensor.detach() for key, tensor in saved_tensors(injected).items()}
    problems = Problems()
    for key, tensor in tensors.items():
        if tensor.is_meta:
            problems.add(key, "on the meta device, without values")
        elif not is_finite(tensor):
            problems.add(key, "not finite")
    if problems:
        raise CheckpointError(several(problems.lines(), outcome="nothing has been written"))
    return Contents(Manifest.of(injected), tensors, base=Fingerprint.of(injected))


def write(
    target: Path,
    contents: Contents,
    sites: Sites | None,
    format: WriteFormat,
    *,
    portable: bool = False,
    figures: Figures | None = None,
) -> None:
    """Write a file in one of the formats.

    Args:
        target: as `save` takes it.
        contents: of the file.
        sites: of the model, if there is one, by which PEFT's names are chosen.
        format: as `save` takes it.
        portable: as `save` takes it.
        figures: as `save` takes them.

    Raises:
        CheckpointError: when the format cannot express what there is; nothing is written.
        OSError: when the file cannot be written.
    """
    if format == "peft":
        peft.write(target, contents, sites, portable=portable, figures=figures)
    else:
        native.write(target, contents)


def saveable(injected: dict[str, Site]) -> dict[str, Site]:
    """Return some sites, or raise where what is trained at one of them has no place in a file of its own.

    Raises:
        MiniLoRAError: naming the sites, with what to write instead.
    """
    problems = Problems()
    for name, site in injected.items():
        for wrapper in site.wrappers:
            if problem := wrapper.save_problem():
                problems.add(name, problem)
    if problems:
        raise MiniLoRAError(several(problems.lines(), outcome="nothing has been written"))
    return injected


def saved_tensors(injected: Mapping[str, Site]) -> dict[str, Tensor]:
    """Return what is trained, by the names that a file uses; the tensors themselves."""
    return {
        f"{name}.{key}": tensor
        for name, site in injected.items()
        for wrapper in site.wrappers
        for key, tensor in wrapper.saved_state().items()
    }
