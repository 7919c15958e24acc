"""`TrainedRows`: some rows of a weight, trained by themselves, for new tokens in an embedding.

    W_eff = W with T in the place of some of its rows            T (rows, cols), which is trained

    look-up        W_eff[id]   = T[i] where id is the i-th of the rows, else W[id]
    output layer   x W_eff^T   = x W^T, and x (T - W[rows])^T added to the outputs that are the rows'

T begins as W[rows], so that injection changes nothing. Neither of the two forms anything of W's size.

model.embed_tokens: TrainedRows          model.lm_head: TrainedRows, where its weight is the embedding's
    .base           the embedding            .base           the output layer
    .trained_rows   T                        (the other's T)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RowsConfig
from .errors import TargetError, listed
from .functional import compute_dtype
from .module import dtype_for
from .torch_internals import own_parameters, own_tensors, put_parameter
from .trained import not_finite
from .view import Substitution
from .weight import EffectiveWeight


class ReplacedRows(EffectiveWeight):
    """W with other rows in the place of some: L says which by their indices, in order, and R what they are.

    Example:
        >>> from minilora.rows import ReplacedRows
        >>> W, T, ids = torch.zeros(4, 2), torch.ones(1, 2), torch.tensor([3, 0])
        >>> nn.functional.embedding(ids, ReplacedRows(W, torch.tensor([3]), T, 1.0))
        tensor([[1., 1.],
                [0., 0.]])
    """

    is_matrix = False  # the rules for products with L and R are none of its own

    def formed(self) -> Tensor:
        """Return the whole, in W's dtype."""
        return self.weight.index_copy(0, self.left, self.right.to(self.weight.dtype))

    def parts(self, take: Callable[[Tensor], Tensor]) -> ReplacedRows:
        """Return the value whose W and rows are taken from this one's in the same way, moved or cast."""
        return ReplacedRows(take(self.weight), self.left, take(self.right), self.scaling, self.owner)

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """Return what a linear layer gives for x, (..., out), in y, which is what it gives with W."""
        change = (self.right - self.weight[self.left]).to(compute_dtype(x))  # zero before the first step
        return y.index_add_(-1, self.left, F.linear(x, change).to(y.dtype))

    def looked_up(self, rows: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        """Return what an embedding gives for token ids, (..., cols), where `rows` is what it gives with W.

        No gradient comes from the padding token.
        """
        at = torch.searchsorted(self.left, ids.long().contiguous()).clamp_max(len(self.left) - 1)
        found = F.embedding(at, self.right).to(rows.dtype)
        if padding_idx is not None:
            padding = (ids == padding_idx % len(self.weight)).unsqueeze(-1)
            found = torch.where(padding, found.detach(), found)
        return torch.where((self.left[at] == ids).unsqueeze(-1), found, rows)


class TrainedRows(Substitution):
    """A module that computes with trained rows in the place of some rows of one of its weights.

    Args:
        base: the module that owns the weight, or wrappers around it.
        config: which rows, and their dtype.
        site: its name, for messages.
        parameter: the weight's name in the module.
        first: the wrapper whose rows these are, around another module that owns the weight.

    Raises:
        TargetError: when the weight is no matrix of floating-point numbers, has not so many rows, or cannot
            be substituted; or when the dtype would round the rows.

    Example:
        >>> layer = minilora.TrainedRows(nn.Embedding(5, 2), minilora.RowsConfig(rows=[3, 4]))
        >>> layer.trained_rows.shape
        torch.Size([2, 2])
        >>> torch.equal(layer.weight, layer.base.weight)
        True
    """

    kind = "rows"
    position = 2

    config: RowsConfig
    trained_rows: nn.Parameter  # T, (rows, cols); of the first wrapper alone

    def __init__(
        self,
        base: nn.Module,
        config: RowsConfig,
        *,
        site: str = "",
        parameter: str = "weight",
        first: TrainedRows | None = None,
    ) -> None:
        super().__init__(base, parameter)
        weight, dtype = self.plain_parameter(), dtype_for(self.bare, config.torch_dtype)
        shape = f"{parameter!r} is {tuple(weight.shape)}"
        if weight.dim() != 2:
            raise TargetError(f"{shape}, and rows are those of a matrix")
        if beyond := [str(row) for row in config.rows if row >= len(weight)]:
            raise TargetError(
                f"{shape}, and has no row {listed(beyond)}; new tokens need a weight with room for them: "
                f"model.resize_token_embeddings({config.rows[-1] + 1}) first"
            )
        if torch.promote_types(dtype, weight.dtype) != dtype:
            raise TargetError(f"{shape} of {weight.dtype}, whose rows {dtype} would round; leave dtype out")
        if config.of and first is None:
            raise TargetError(f"its rows are those of {config.of!r}, which is not placed before it")
        if first is not None and any(getattr(m.bare, "max_norm", None) for m in (first, self)):
            raise TargetError(
                "its weight is shared by an embedding that writes into it (max_norm); untie them"
            )
        self.config, self.site = config, site
        self.__dict__["_first"] = self if first is None else first  # no child, though it is a module
        self._indices = torch.tensor(config.rows, device=weight.device)
        if first is None:
            rows = weight.detach()[self._indices]
            put_parameter(self, "trained_rows", nn.Parameter(rows.to(dtype)))

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """What transformers asks each module for, to save a shared weight once: a pattern of its name."""
        return {} if self._first is self else {rf"(base\.)+{self.parameter}$": ""}

    def value(self) -> ReplacedRows:
        """Return W with the trained rows, as a value that need not be formed."""
        weight = own_tensors(self.bare)[self.parameter]
        if self._indices.device != weight.device:  # moved since
            self._indices = torch.tensor(self.config.rows, device=weight.device)
        rows = self._first.trained_rows.to(weight.device)
        return ReplacedRows(weight, self._indices, rows, 1.0, self)

    def substituted(self) -> Tensor:
        """Return W with the trained rows as a new tensor, in W's dtype."""
        return self.value().formed()

    def merge_problem(self, dtype: torch.dtype | None = None) -> str | None:
        """Return how many values of the rows are not finite, or None. Merging leaves rows as they are."""
        return not_finite(own_tensors(self), {}, dtype)

    @torch.no_grad()
    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the base with the rows in its weight, rounded once; a shared weight stays shared."""
        weight = own_parameters(self._first.bare)[self._first.parameter]
        assert weight is not None
        if self._first is self:
            value = self.value()
            value.weight = weight.to(dtype or weight.dtype)
            weight = nn.Parameter(value.formed(), requires_grad=weight.requires_grad)
        put_parameter(self.bare, self.parameter, weight)  # else that of the first, whose turn came before
        return self.base

    def initial_value(self, name: str, tensor: Tensor, bare: dict[str, Tensor]) -> Tensor:
        """Keep what is trained; rows that are not trained yet are those of the weight that comes."""
        old, new = own_tensors(self.bare)[self.parameter], bare.get(self.parameter)
        if new is None or new.shape != old.shape:
            return tensor
        rows = list(self.config.rows)
        untrained = tensor.is_meta or torch.equal(tensor, old[rows].to(tensor))
        return new.detach()[rows].to(tensor.dtype) if untrained else tensor

    def description(self) -> str:
        """Return the kind in a few words."""
        return f"rows ({len(self.config.rows)}{f', of {self.config.of}' if self.config.of else ''})"
