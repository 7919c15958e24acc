"""From the paths of A and B in a PEFT folder to the places that they are of, on a model or by names alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ....errors import TargetError
from ....layout import layout_of
from ....problems import Problems
from ....sites import Sites
from ....torch_internals import own_parameters
from ...tensors import Entry
from .computes import difference, kind_of
from .config import PeftLoraConfig
from .keys import Found
from .packing import Packing
from .places import BASE_LAYER, Kind, Place, without_wrappers
from .versions import reads_first_side

OUT_PROJ = f".{BASE_LAYER}.out_proj"

TOO_MANY_DIMENSIONS = "PEFT adapts a parameter of two dimensions, or a stack of matrices, and this is neither"


def resolve(found: Found, config: PeftLoraConfig, sites: Sites | None) -> tuple[dict[str, Place], list[str]]:
    """Return the place of each pair of A and B by its path, and problems.

    Args:
        found: the tensors.
        config: beside them.
        sites: of the model; None where there is none, and names and shapes have to do.
    """
    places: dict[str, Place] = {}
    problems = Problems()
    for path, pair in found.pairs.items():
        module, depth = without_wrappers(path)
        if missing := {"A", "B"} - set(pair):
            problems.add(module, f"no lora_{missing.pop()} in the file")
            continue
        bare = sites[module].bare if sites is not None and module in sites else None
        targets = config.parameters_of(module, bare)
        try:
            if targets:
                places[path] = _of_parameter(module, depth, targets, bare, pair, config)
            else:
                places[path] = _of_module(path, pair, found, bare)
                if bare is not None:
                    _require_the_same(places[path], bare)
        except ValueError as error:
            problems.add(module, str(error))
    return places, problems.lines()


def _of_module(path: str, pair: Mapping[str, Entry], found: Found, bare: nn.Module | None) -> Place:
    """Return the place of a module's A and B, as its keys and shapes give it away.

    Raises:
        ValueError: saying why there is none.
    """
    module, depth = without_wrappers(path)
    if depth:
        raise ValueError(
            "its key is that of a parameter's LoRA, and the config's target_parameters name none"
        )
    if path.endswith(OUT_PROJ) and path.removesuffix(OUT_PROJ) in found.pairs:
        attention = without_wrappers(path.removesuffix(OUT_PROJ))[0]
        return Place(module, attention, module, "attention output")
    if BASE_LAYER in path.split("."):
        raise ValueError("its key lies inside an adapted module, and PEFT puts none there but attention's")
    if path + OUT_PROJ in found.pairs:
        return Place(f"{module}.in_proj_weight", module, module, "attention input")
    if path in found.embeddings:
        return Place(module, module, module, "embedding")
    if kernel := pair["A"].shape[2:]:
        a, b = pair["A"].shape[0], pair["B"].shape[1:2]
        if bare is None and b and a != b[0] and a % (b[0] or a) == 0:
            raise ValueError("its B is grouped and its A is not, which is no update of a grouped weight")
        return Place(module, module, module, "convolution", packing=Packing(kernel=kernel))
    return Place(module, module, module)


def _require_the_same(place: Place, bare: nn.Module) -> None:
    """Raise unless a module of the model is what its A and B were made for, and PEFT computes what we do.

    Raises:
        ValueError: saying why not.
    """
    kinds: dict[Kind, str] = {
        "linear": "a linear layer",
        "convolution": "a convolution",
        "embedding": "an embedding",
        "attention input": "nn.MultiheadAttention",
    }
    if place.kind == "attention output":
        return  # what is asked of its attention is enough
    if problem := difference(bare):
        raise ValueError(problem)
    if kind_of(bare) != place.kind:
        raise ValueError(
            f"its tensors are those of {kinds[place.kind]}, and the model has a {type(bare).__name__} there"
        )


def _of_parameter(
    module: str,
    depth: int,
    targets: tuple[str, ...],
    bare: nn.Module | None,
    pair: Mapping[str, Entry],
    config: PeftLoraConfig,
) -> Place:
    """Return the place of the LoRA of one of a module's parameters, the first of them furthest in.

    Raises:
        ValueError: saying why it cannot be told which parameter it is of, or which way round.
    """
    if bare is None:
        raise ValueError(
            "it has LoRA on parameters, and which is which the model alone can tell: minilora.load(model, "
            "folder)"
        )
    if depth >= len(targets):
        raise ValueError(f"the file has more than {len(targets)} parameters of it, which the config targets")
    leaf = targets[-1 - depth]
    parameter = own_parameters(bare)[leaf]
    assert parameter is not None
    site = module if leaf == "weight" else f"{module}.{leaf}"
    packing = parameter_packing(bare, leaf, parameter, pair, config.peft_version)
    return Place(site, f"{module}.{leaf}", module, "parameter", depth, packing)


def parameter_packing(
    module: nn.Module,
    leaf: str,
    parameter: Tensor,
    pair: Mapping[str, Entry] | None = None,
    version: str | None = None,
) -> Packing:
    """Return the layout of the A and B that PEFT has for a parameter.

    Of a stack (E, d1, d2), A reads d1 or d2, as the shapes tell; where they do not, the version does.

    Args:
        module: that owns the parameter.
        leaf: its name there.
        parameter: itself.
        pair: PEFT's A and B, whose shapes tell; None asks for what today's PEFT makes.
        version: of the PEFT that wrote them, which tells where the shapes do not.

    Raises:
        ValueError: saying why PEFT has none, or why it cannot be told.
    """
    try:
        layout = layout_of(module, leaf, parameter)
    except TargetError as error:
        raise ValueError(str(error)) from error
    if parameter.dim() == 2:
        return Packing(crossed=layout.transposed)
    if parameter.dim() != 3 or not layout.leading:
        raise ValueError(f"{leaf!r} has the shape {tuple(parameter.shape)}: {TOO_MANY_DIMENSIONS}")
    experts, first, last = parameter.shape
    reads_first = layout.transposed
    if pair is not None:
        widths = (pair["A"].shape[1:], pair["B"].shape[:1])
        ways = {True: ((first,), (last,)) == widths, False: ((last,), (first,)) == widths}
        if all(ways.values()):
            reads_first = reads_first_side(version, layout.transposed)
        elif any(ways.values()):
            reads_first = ways[True]
        else:
            raise ValueError(
                f"A and B, {pair['A'].shape} and {pair['B'].shape}, do not fit {leaf!r} of the shape "
                f"{tuple(parameter.shape)}"
            )
    if experts == 1 and reads_first:
        raise ValueError(
            "PEFT cannot add an update that is read from the first side to a stack of one matrix"
        )
    return Packing(experts=experts, crossed=reads_first != layout.transposed)
