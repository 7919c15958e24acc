"""From an adapter to a PEFT folder, which is read back, by PEFT's own rules, before anything is written."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ....config import Config, LoRAConfig, RowsConfig
from ....distributed.gathering import whole
from ....errors import CheckpointError, several
from ....manifest import Manifest
from ....names import above, described, natural
from ....sites import Sites
from ....variants.initial import change_since
from ...atomic import new_folder, write_together, write_whole
from ...contents import Contents
from ...tensors import chunks_of, entries_of
from .. import native
from .card import CARD_FILE, Figures, may_be_replaced, model_card
from .config import CONFIG_FILE, PeftLoraConfig
from .matching import Expressions, LooseEnds, around_left_out, expression_problem, inner_parts
from .places import WITHOUT_DROPOUT, Place
from .placing import Configs, as_read, placed
from .portable import made_portable, not_portable
from .reader import MEANING_KEY, TENSOR_FILE, announced, peft_tensors, trained_biases
from .task import task_of
from .wording import worded


def write(
    path: Path,
    contents: Contents,
    sites: Sites | None = None,
    *,
    portable: bool = False,
    figures: Figures | None = None,
) -> None:
    """Write a folder that PEFT and vLLM load. Inverse: `reading`.

    Args:
        path: of the folder. A new one appears whole or not at all; in one that exists, the files of the
            adapter are replaced and others stay.
        contents: LoRA sites and modules trained in full; PEFT has no bottleneck adapters.
        sites: of the model that carries them. They are needed for target names shorter than full ones, and to
            know that PEFT's patterns will match nothing else; None goes by the names alone.
        portable: write what every server reads alike, as `portable` has it.
        figures: of the run, for the card.

    Raises:
        CheckpointError: listing what PEFT's format cannot express, or no server takes, or saying that the
            card is somebody's own and takes no figures; nothing is written.
        OSError: when the folder cannot be written.
    """
    made, figures = composed(contents, sites, path, portable=portable), figures or {}
    if not path.is_dir():
        try:
            with new_folder(path) as folder:
                for name, chunks in made.files(path, figures).items():
                    write_whole(folder / name, chunks)
            return
        except (CheckpointError, OSError):
            if not path.is_dir():
                raise  # else another process, which saves the same, was the first to make the folder
    write_together(path, made.files(path, figures))


@dataclass(frozen=True)
class Composed:
    """What stands in the files of a PEFT folder."""

    tensors: dict[str, Tensor]
    """By PEFT's names."""
    metadata: dict[str, str]
    """Of the tensors' header."""
    config: dict[str, Any]
    """The JSON of `adapter_config.json`."""
    manifest: Manifest
    """What was asked for, as PEFT knows it."""

    def files(self, folder: Path, figures: Figures) -> dict[str, Iterable[bytes | bytearray]]:
        """Return what each file of a folder shall hold; without the last, no reader takes it for anything.

        Raises:
            CheckpointError: when there are figures, and a card of the user's own is where they would stand.
        """
        files: dict[str, Iterable[bytes | bytearray]] = {
            TENSOR_FILE: chunks_of(entries_of(self.tensors), self.metadata)
        }
        if may_be_replaced(folder / CARD_FILE):
            card = model_card(self.config, self.manifest, self.tensors, figures)
            files[CARD_FILE] = [card.encode()]
        elif figures:
            raise CheckpointError(
                f"{str(folder / CARD_FILE)!r} is your own and stays as it is, so the figures have no place: "
                "write them into it and leave figures out, or move it away; nothing has been written"
            )
        files[CONFIG_FILE] = [json.dumps(self.config, indent=2, sort_keys=True).encode() + b"\n"]
        return files


def composed(
    contents: Contents, sites: Sites | None, path: Path = Path("adapter"), *, portable: bool = False
) -> Composed:
    """Return what `write` writes; the arguments are its own, the path for messages.

    Raises:
        CheckpointError: listing what PEFT's format cannot express.
    """
    contents = _without_starts(contents)
    if portable:
        contents = made_portable(contents)
    configs: Configs = {
        site: config
        for config, names in contents.manifest.injections
        for site in names
        if isinstance(config, LoRAConfig)
    }
    layers = contents.base.layers if contents.base else {}
    places, problems = placed(configs, layers, sites)
    parameters = _trained_parameters(contents.manifest.trainable, sites)
    heads = tuple(name for name in contents.manifest.trainable if name not in parameters)
    rows = _rows(contents.manifest)
    bias, more = _bias(parameters, places, sites, heads)
    problems = [*_inexpressible(contents.manifest, heads, places), *problems, *more]
    if rows and sites is None:
        problems.append(
            f"{described(rows)}: which modules share trained rows depends on the model: load it into the "
            'model, then minilora.save(model, folder, format="peft")'
        )
    if sites is not None and not problems:
        problems += _caught_otherwise(
            {p.module for p in places if p.kind != "attention output"}, rows, heads, sites
        )
    if problems:
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    tensors = peft_tensors({**contents.tensors, **_frozen_but_caught(heads, sites)}, places)
    config = worded(contents, places, configs, sites, bias=bias, heads=heads, rows=rows)
    if portable and (problems := list(not_portable(places, config["target_modules"]))):
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    expected: dict[str, Config] = {**as_read(places, configs), **rows}
    if problems := _said_otherwise(path, config, tensors, expected, sites):
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    if sites is not None and (task := task_of(sites.model)) is not None:
        with_task = {**config, "task_type": task, "auto_mapping": None}
        if not _said_otherwise(path, with_task, tensors, expected, sites):
            config = with_task  # else PEFT would take a frozen head for a trained one
    meaning = PeftLoraConfig.from_dict(config).meaning(
        place.target for place in places if place.kind != "attention output"
    )
    metadata = native.header(tensors, {MEANING_KEY: meaning}, contents.base)
    return Composed(tensors, metadata, config, contents.manifest)


def _without_starts(contents: Contents) -> Contents:
    """Return contents in which an update that begins at the weight is plain LoRA, of twice the rank.

    PEFT knows PiSSA and OLoRA as a change of the base; s (B A - B0 A0) = s [B, -B0] [A; A0] needs none.
    """
    tensors = dict(contents.tensors)
    injections = []
    for config, names in contents.manifest.injections:
        plain = config
        if isinstance(config, LoRAConfig) and config.begins_at_weight:
            alpha = config.alpha * (math.sqrt(2) if config.rslora else 2)
            plain = dataclasses.replace(config, r=2 * config.r, alpha=alpha, init="kaiming")
            for site in names:
                A, B, *start = (tensors.pop(f"{site}.{name}") for name in config.tensor_names[:4])
                A, B = change_since(A, B, *start)
                tensors |= {f"{site}.lora_A": A, f"{site}.lora_B": B}
        injections.append((plain, names))
    manifest = dataclasses.replace(contents.manifest, injections=tuple(injections))
    return dataclasses.replace(contents, manifest=manifest, tensors=tensors)


def _said_otherwise(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Config],
    sites: Sites | None,
) -> list[str]:
    """Return where the files, read by PEFT's rules, would say something else than what is written."""
    try:
        read = announced(path, PeftLoraConfig.from_dict(config), entries_of(tensors), {}, sites)
    except CheckpointError as error:
        return [f"PEFT's format cannot express this adapter: {error}"]
    found = {site: lora for lora, names in read.manifest.injections for site in names}
    wrong = [
        site
        for site in found.keys() | expected.keys()
        if site not in found
        or site not in expected
        or found[site] != _as_in_files(expected[site], found[site])
    ]
    problems = read.disagreements(sites) if sites is not None else []
    if wrong:
        problems.append(
            f"{described(sorted(wrong, key=natural))}: PEFT's patterns would say something else of it"
        )
    return problems


def _as_in_files(written: Config, read: Config) -> Config:
    """Return a config as the files give it back: what A and B are, and not how they began."""
    began = {"init": read.init} if isinstance(read, LoRAConfig) and isinstance(written, LoRAConfig) else {}
    return dataclasses.replace(written, dtype=read.dtype, **began)


def _inexpressible(manifest: Manifest, heads: Iterable[str], places: Iterable[Place]) -> Iterator[str]:
    """Yield what PEFT's format has no words for."""
    configs = {
        site: config
        for config, names in manifest.injections
        for site in names
        if isinstance(config, LoRAConfig)
    }
    for config, sites in manifest.injections:
        if not isinstance(config, (LoRAConfig, RowsConfig)):
            yield (
                f"{described(sites)}: PEFT has no bottleneck adapters; save this model in minilora's "
                "own format"
            )
    if not configs:
        yield "PEFT needs at least one LoRA site"
    for name in heads:
        if problem := expression_problem(name, around_left_out):
            yield f"{name!r}: PEFT takes it for an expression among modules_to_save, and as such it {problem}"
    dropping = [configs[place.site] for place in places if place.kind not in WITHOUT_DROPOUT]
    for field in ("dropout", "rslora", "dora", "lora_bias"):
        concerned = dropping if field == "dropout" else configs.values()
        if len(values := {getattr(config, field) for config in concerned}) > 1:
            shown = ", ".join(sorted(map(repr, values)))
            yield f"{field}: PEFT has one value for all sites, and here are {shown}"


def _rows(manifest: Manifest) -> dict[str, RowsConfig]:
    """Return the configs of trained rows, by site."""
    return {
        s: config for config, sites in manifest.injections for s in sites if isinstance(config, RowsConfig)
    }


def _trained_parameters(names: Iterable[str], sites: Sites | None) -> list[str]:
    """Return which names of what is trained in full are parameters', not modules'."""
    return [name for name in names if sites is not None and sites[name].parameter is not None]


def _bias(
    parameters: Collection[str], places: list[Place], sites: Sites | None, heads: Collection[str]
) -> tuple[str, list[str]]:
    """Return PEFT's word for the biases that are trained, and why it has none for what is trained."""
    if not parameters or sites is None:
        return "none", []
    for word in ("lora_only", "all"):
        if trained_biases(word, places, sites, heads) == set(parameters):
            return word, []
    return "none", [
        f"{described(sorted(parameters, key=natural))}: PEFT trains single parameters only as "
        "bias='lora_only', the bias of every module that LoRA is on, or bias='all', every bias of the model; "
        "save this model in minilora's own format"
    ]


def _caught_otherwise(
    injected: set[str], rows: Collection[str], heads: Sequence[str], sites: Sites
) -> Iterator[str]:
    """Yield where PEFT, by its own rules of matching, would adapt other modules than these."""
    if shared := sites.shared() & {*injected, *rows, *heads}:
        yield f"{described(sorted(shared))}: shared by several parents; PEFT would adapt the first alone"
    expressions = Expressions(heads, around_left_out, inner_parts)
    left_out: dict[str, list[str]] = {}
    for site in injected:
        if (index := expressions.first(site)) is not None:
            left_out.setdefault(heads[index], []).append(site)
    for head, names in left_out.items():
        yield f"{described(names)}: PEFT leaves it out, because {head!r} is trained in full"
    loose = LooseEnds(heads)
    caught = {name: [head for head in loose.of(name) if head != name] for name in sites}
    caught = {name: by for name, by in caught.items() if by}
    outer = {name for inner in (*injected, *rows, *heads, *caught) for name in above(inner)}
    found: dict[str, list[str]] = {}
    for name, by in caught.items():
        for head in by:
            if name in injected or name in rows or name in outer or head in above(name):
                found.setdefault(head, []).append(name)
    for head, names in found.items():
        yield (f"{described(names)}: PEFT would train it in full along with {head!r}, whose end its name has")


def _frozen_but_caught(trainable: Sequence[str], sites: Sites | None) -> dict[str, Tensor]:
    """Return the state of modules that PEFT will take for trained ones, because of how their names end.

    "classifier" catches DistilBERT's "pre_classifier". PEFT finds the base's own values for it in the
    file, and computes the same.
    """
    heads, loose = set(trainable), LooseEnds(trainable)
    return {
        f"{name}.{key}": whole(tensor)
        for name, site in (sites or {}).items()
        if name not in heads and loose.of(name)
        for key, tensor in site.bare.state_dict().items()
    }
