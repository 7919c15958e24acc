"""From the tensors of a PEFT folder to what each is of: LoRA, a head, a bias, or the base itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ....names import above, natural
from ....problems import Problems
from ...tensors import Entry
from .config import PeftLoraConfig
from .places import without_wrappers
from .tokens import ROWS_KEY, WHOLE_KEY

PREFIX = "base_model.model."

LORA_KEY = re.compile(r"(?P<path>.+)\.lora_((?P<side>[AB])\.weight|embedding_(?P<row>[AB]))", re.DOTALL)

MAGNITUDE_KEY = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(\.weight)?", re.DOTALL)

BIAS_KEY = re.compile(r"(?P<path>.+)\.lora_B\.bias", re.DOTALL)

# What other endings of a key give away, the first that fits.
FOREIGN_KEYS = (
    (MAGNITUDE_KEY, "a magnitude of DoRA, and the config says use_dora=false"),
    (BIAS_KEY, "a bias of B, and the config says lora_bias=false"),
    (r"\.lora_[AB]\..+\.weight$", "the key carries an adapter's name, which PEFT leaves out when it saves"),
)

COPIES_OF_A_HEAD = re.compile(r"(original_module|modules_to_save)\.(.*\.)?bias", re.DOTALL)
"""Under bias="all", PEFT writes a head's biases three times; its own names for them are left out here."""


@dataclass
class Found:
    """The tensors of a PEFT folder, by what they are of."""

    pairs: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """A and B, by the path of the wrapper that has them."""
    embeddings: set[str] = field(default_factory=set)
    """The paths whose A and B have an embedding's keys."""
    magnitudes: dict[str, Entry] = field(default_factory=dict)
    """DoRA's magnitudes, by the path of the wrapper that has them."""
    biases_of_B: dict[str, Entry] = field(default_factory=dict)
    """The biases of B, likewise."""
    rows: dict[str, Entry] = field(default_factory=dict)
    """Trained rows of embeddings, by the path of the wrapper that has them."""
    heads: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """The state of modules trained in full, by module."""
    biases: dict[str, Entry] = field(default_factory=dict)
    """Trained biases of the base, by their names in the bare model."""
    base: dict[str, Entry] = field(default_factory=dict)
    """Other tensors, by the names in the bare model that they would have: PEFT adds embeddings by itself."""

    def ours(self) -> dict[str, Entry]:
        """Return what is trained beside A and B, by minilora's names."""
        heads = {
            f"{module}.{name}": entry for module, state in self.heads.items() for name, entry in state.items()
        }
        return heads | self.biases


def _beside(name: str, found: Found, config: PeftLoraConfig) -> tuple[dict[str, Entry], str] | None:
    """Return where a tensor belongs that stands beside A and B, as the config says, and their path."""
    for said, pattern, paths in (
        (config.use_dora, MAGNITUDE_KEY, found.magnitudes),
        (config.lora_bias, BIAS_KEY, found.biases_of_B),
    ):
        if said and (match := pattern.fullmatch(name)):
            return paths, match["path"]
    return None


def _alone(found: Found) -> Iterator[tuple[str, str]]:
    """Yield the paths that have something beside A and B, and neither of these, with what it is."""
    for what, paths in (("magnitude of DoRA", found.magnitudes), ("bias of B", found.biases_of_B)):
        yield from ((path, what) for path in paths.keys() - found.pairs.keys())


def sorted_out(entries: Mapping[str, Entry], config: PeftLoraConfig) -> tuple[Found, list[str]]:
    """Return the tensors by what they are of, and problems with their names."""
    found, others = Found(), Problems()
    for key, entry in sorted(entries.items(), key=lambda item: natural(item[0])):
        name = key.removeprefix(PREFIX)
        if name == key:
            others.add(key, f"the key does not begin with {PREFIX!r}")
        elif module := next((m for m in above(name) if config.saves(m)), None):
            below = name.removeprefix(f"{module}.")
            if not (config.bias == "all" and COPIES_OF_A_HEAD.fullmatch(below)):
                found.heads.setdefault(module, {})[below] = entry
        elif lora := LORA_KEY.fullmatch(name):
            found.pairs.setdefault(lora["path"], {})[lora["side"] or lora["row"]] = entry
            if lora["row"]:
                found.embeddings.add(lora["path"])
        elif beside := _beside(name, found, config):
            paths, path = beside
            paths[path] = entry
        elif rows := ROWS_KEY.fullmatch(name):
            found.rows[rows["path"]] = entry
        elif whole := WHOLE_KEY.fullmatch(name):
            found.base[f"{without_wrappers(whole['path'])[0]}.{whole['leaf']}"] = entry
        elif reason := next((why for pattern, why in FOREIGN_KEYS if re.search(pattern, name)), None):
            others.add(key, reason)
        else:
            owner, _, leaf = name.rpartition(".")
            bare = f"{without_wrappers(owner)[0]}.{leaf}".lstrip(".")
            trained = leaf == "bias" and config.bias != "none"
            (found.biases if trained else found.base)[bare] = entry
    for path, what in _alone(found):
        others.add(path, f"it has a {what}, and neither A nor B")
    return found, others.lines() + ([] if found.pairs else ["there is no LoRA tensor in it"])
