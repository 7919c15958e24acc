"""`Bank`: many adapters on one model; each row of a batch has its own.

    bank = minilora.Bank(model, {"legal": "legal.safetensors", "formal": "formal/"}, slots=16)

    row 0   "legal"    ──>  slot 1  ──┐
    row 1   None       ──>  the base ─┼──  one batch, one pass over the base's weights
    row 2   "formal"   ──>  slot 2  ──┘

Adapters come and go in place: no module is replaced, so nothing is compiled again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..errors import MiniLoRAError, quoted, several
from ..files.contents import Contents
from ..files.loading import ReadFormat, Reading
from ..files.paths import path_for
from ..files.saving import WriteFormat, contents_of, require_format, write
from ..module import device_of
from ..sites import Sites, require_whole
from ..targets import Targets
from .blueprint import Blueprint
from .filling import Held, Key, fill, from_configs, from_file, held_in, misfits, refusals
from .site import BankSite, LowRankSite

Path = str | os.PathLike[str]


class Bank:
    """Many adapters on one model, which computes each row of a batch with the adapter of that row.

    At each site A is (slots + 1, r, in) and B^T (slots + 1, r, out); smaller ranks, and sites that an adapter
    does not have, are zeros. Outside `rows` the model is the base. `minilora.eject` takes the bank out.

    Args:
        model: any bare module, rows first; changed in place. Not inside DDP, FSDP or `torch.compile`.
        adapters: files or folders that `load` reads, by the names that they shall have here.
        targets: sites for adapters that come later, in the language of `inject`, beside those of the files.
        trainable: modules that adapters which come later train in full, likewise.
        slots: how many adapters there is room for; None means as many as are given.
        r: the largest rank that there is room for; None means the largest of those given.
        dtype: of A and B. None means what each site of the adapters would have on a model of its own, the
            widest of them; any other is rounded to.
        check_base: refuse a base other than the one that a file was trained on, where the file tells.
        allow_pickle: for all files, as `minilora.load` takes it.

    Raises:
        MiniLoRAError: listing everything that is wrong with the arguments, the files, and the files on this
            model, which is as it was.
        OSError: when there is no such file, or it cannot be read.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> bank = minilora.Bank(model, targets=["0"], slots=3, r=2)
        >>> bank.add("legal", minilora.LoRAConfig(r=2))
        >>> _ = nn.init.ones_(bank.parameters("legal")[1])          # B, which begins at zero
        >>> x = torch.ones(2, 4)
        >>> with bank.rows(["legal", None]):
        ...     y = model(x)
        >>> torch.equal(y[0], model(x)[0]), torch.equal(y[1], model(x)[1])
        (False, True)
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Path] | None = None,
        *,
        targets: Targets = (),
        trainable: Targets = (),
        slots: int | None = None,
        r: int | None = None,
        dtype: torch.dtype | str | None = None,
        check_base: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        require_whole(model)
        blueprint = Blueprint.of(
            model,
            {} if adapters is None else adapters,
            targets=targets,
            trainable=trainable,
            slots=slots,
            r=r,
            dtype=dtype,
            how=Reading(check_base=check_base, allow_pickle=allow_pickle),
        )
        self.model = model
        """The model, whose rows the bank serves."""
        self._directory, self._places = blueprint.directory, blueprint.places
        for name, held in blueprint.held.items():
            fill(self._directory, self._places, name, self._directory.free(), held)
        blueprint.plan.put_in_place()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(self._directory.names)

    @property
    def slots(self) -> int:
        """How many adapters there is room for."""
        return self._directory.slots

    def __len__(self) -> int:
        return len(self._directory.names)

    def __contains__(self, name: object) -> bool:
        return name in self._directory.names

    def __repr__(self) -> str:
        return f"Bank({len(self)} of {self.slots} slots, r<={self._directory.r}: {quoted(self.names)})"

    @classmethod
    def of(cls, model: nn.Module) -> Bank:
        """Return the bank of a model, as for a copy: `Bank.of(copy.deepcopy(model))`.

        Raises:
            MiniLoRAError: when there is none in it.

        Example:
            >>> bank = minilora.Bank(nn.Sequential(nn.Linear(4, 2)), targets=["0"], slots=3, r=2)
            >>> minilora.Bank.of(bank.model)
            Bank(0 of 3 slots, r<=2: )
        """
        places: dict[Key, BankSite] = {
            (name, wrapper.kind): wrapper
            for name, site in Sites(model).injected().items()
            for wrapper in site.wrappers
            if isinstance(wrapper, BankSite)
        }
        if not places:
            raise MiniLoRAError(f"this {type(model).__name__} carries no bank: minilora.Bank(model, {{...}})")
        bank = cls.__new__(cls)
        bank.model, bank._places = model, places
        bank._directory = next(iter(places.values())).directory
        return bank

    @contextlib.contextmanager
    def rows(self, rows: str | Sequence[str | None] | Tensor | None) -> Iterator[None]:
        """Within the `with` block, the model computes each row with its own adapter, in this thread.

        A layer's first dimension is the rows, or a multiple of them in which each row stands together: rows
        × beams in `generate`, or rows × tokens flattened.

        Args:
            rows: a name, or None for the base, for each row of the batch; one name for all rows; or a tensor
                of `slot` numbers, (b,), whose values are not read here unless an adapter trains.

        Raises:
            MiniLoRAError: for a name that the bank does not hold, and what is no rows at all.

        Example:
            >>> bank = minilora.Bank(nn.Sequential(nn.Linear(4, 2)), targets=["0"], slots=3, r=8)
            >>> bank.add("legal")
            >>> with bank.rows(["legal", None, "legal"]):
            ...     bank.model(torch.zeros(3, 4)).shape
            torch.Size([3, 2])
        """
        device = device_of(next(iter(self._places.values())))
        with self._directory.choice.to(self._directory.chosen(rows, device)):
            yield

    def slot(self, name: str | None) -> int:
        """Return the number of an adapter's slot, for a tensor of rows; 0, of None, is the base.

        Raises:
            MiniLoRAError: when the bank has no adapter of that name.

        Example:
            >>> bank = minilora.Bank(nn.Sequential(nn.Linear(4, 2)), targets=["0"], slots=3, r=8)
            >>> bank.add("legal")
            >>> bank.slot("legal"), bank.slot(None)
            (1, 0)
        """
        return 0 if name is None else self._directory.slot(name)

    def load(
        self,
        name: str,
        path: Path,
        *,
        format: ReadFormat = "auto",
        config: LoRAConfig | None = None,
        rename: Mapping[str, str] | None = None,
        check_base: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        """Put what a file describes into a free slot. Inverse: `remove`.

        Args:
            name: of the adapter here.
            path: as `minilora.load` takes it, and so with all that follows.
            format: of the file.
            config: of the file, for "loralib" alone.
            rename: from names in the file to the model's.
            check_base: refuse another base than the file's.
            allow_pickle: read `adapter_model.bin`, where there is no `.safetensors` file.

        Raises:
            MiniLoRAError: when the bank is full, holds the name already, or has no room for the adapter, or
                the file is not sound or does not fit the model; the bank is as it was.
            OSError: when there is no such file, or it cannot be read.
        """
        self._directory.require_new(name)
        slot = self._directory.free()
        held = self._read(path, Reading(format, config, None, rename, check_base, allow_pickle))
        fill(self._directory, self._places, name, slot, held)

    def replace(
        self,
        name: str,
        path: Path,
        *,
        format: ReadFormat = "auto",
        config: LoRAConfig | None = None,
        rename: Mapping[str, str] | None = None,
        check_base: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        """Put what a file describes in the place of an adapter; the arguments are those of `load`.

        Raises:
            MiniLoRAError: as `load` does, and inside `rows`; the adapter is as it was.
            OSError: when there is no such file, or it cannot be read.
        """
        slot = self._directory.slot(name)
        self._directory.require_unchosen("replace")
        held = self._read(path, Reading(format, config, None, rename, check_base, allow_pickle))
        fill(self._directory, self._places, name, slot, held)

    def add(self, name: str, config: LoRAConfig = LoRAConfig()) -> None:  # noqa: B008  frozen
        """Put a new adapter into a free slot, at every site, as `inject` would begin it. Inverse: `remove`.

        Raises:
            MiniLoRAError: when the bank is full, holds the name already, or has no room for the rank.

        Example:
            >>> bank = minilora.Bank(nn.Sequential(nn.Linear(4, 2)), targets=["0"], slots=3, r=2)
            >>> bank.add("new", minilora.LoRAConfig(r=1))
            >>> [tuple(parameter.shape) for parameter in bank.parameters("new")]
            [(1, 4), (2, 1)]
        """
        self._require_usable()
        self._directory.require_new(name)
        slot = self._directory.free()
        if not isinstance(config, LoRAConfig):
            raise MiniLoRAError(f"config must be a LoRAConfig, not {config!r:.100}")
        low_rank = {key[0]: isinstance(place, LowRankSite) for key, place in self._places.items()}
        placed = [(config, site) for site, is_low_rank in low_rank.items() if is_low_rank]
        heads = [site for site, is_low_rank in low_rank.items() if not is_low_rank]
        held = from_configs(Sites(self.model).bare(), placed, heads)
        self._require_room(held)
        fill(self._directory, self._places, name, slot, held)

    def remove(self, name: str) -> None:
        """Empty the slot of an adapter. Inverse: `load`, `add`.

        Raises:
            MiniLoRAError: when the bank has no adapter of that name, inside `rows`, and on a sharded model.
        """
        slot = self._directory.slot(name)
        self._directory.require_unchosen("remove")
        self._require_usable()
        self._directory.strike(name)
        for place in self._places.values():
            place.put(slot, None)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of an adapter, for an optimizer of its own; they train from now on.

        Each gets the gradient of its own rows. One that is absent from a batch gets none, so that a step of
        its optimizer leaves it, and its moments, as they are. Inverse: `freeze`.

        Raises:
            MiniLoRAError: for a name that the bank has not, inside `rows`, and on a sharded model.

        Example:
            >>> bank = minilora.Bank(nn.Sequential(nn.Linear(4, 2)), targets=["0"], slots=3, r=2)
            >>> bank.add("new", minilora.LoRAConfig(r=2))
            >>> optimizer = torch.optim.AdamW(bank.parameters("new"))
        """
        slot = self._directory.slot(name)
        self._directory.require_unchosen("parameters")
        self._require_usable()
        parameters = [p for place in self._places.values() for p in place.train_slot(slot)]
        self._directory.trained.add(slot)
        return parameters

    def freeze(self, name: str) -> None:
        """Let an adapter train no more, and serve it as those that were loaded. Inverse: `parameters`.

        Raises:
            MiniLoRAError: when the bank has no adapter of that name, inside `rows`, and on a sharded model.
        """
        slot = self._directory.slot(name)
        self._directory.require_unchosen("freeze")
        self._require_usable()
        self._directory.trained.discard(slot)
        for place in self._places.values():
            place.settle(slot)

    def save(self, name: str, path: Path, *, format: WriteFormat = "minilora") -> None:
        """Write an adapter, as `minilora.save` would from a model that carries it alone. Inverse: `load`.

        Raises:
            CheckpointError: when a tensor is not finite, or the format cannot express the adapter; nothing
                is written.
            MiniLoRAError: when the bank has no adapter of that name, or an argument is wrong.
            OSError: when the file cannot be written; what was there before still is.
        """
        self._directory.slot(name)
        target = path_for(path, self.model, call="Bank.save(name, path)")
        require_format(format)
        write(target, self.contents(name), Sites(self.model).bare(), format)

    def contents(self, name: str) -> Contents:
        """Return what a file of an adapter would hold.

        Raises:
            MiniLoRAError: when the bank has no adapter of that name, or a tensor is not finite.
        """
        slot = self._directory.slot(name)
        self._require_usable()
        return contents_of(held_in(Sites(self.model).bare(), self._places, slot))

    def _read(self, path: Path, how: Reading) -> Held:
        self._require_usable()
        file = path_for(path, self.model, call="Bank.load(name, path)")
        held = from_file(Sites(self.model).bare(), file, how)
        self._require_room(held)
        return held

    def _require_usable(self) -> None:
        self._directory.require_standing()
        require_whole(self.model, "change a bank before fully_shard, and gather a full model to save")

    def _require_room(self, held: Held) -> None:
        problems = refusals(held, Sites(self.model).bare()) or misfits(held, self._places, self._directory)
        if problems:
            raise MiniLoRAError(several(problems.lines(), outcome="the bank is as it was"))
