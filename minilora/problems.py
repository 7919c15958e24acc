"""`Problems`: what is wrong with which site, for a message that says everything, and each thing once."""

from __future__ import annotations

from collections.abc import Callable

from .names import described


class Problems:
    """What is wrong with which site; sites of the same problem become one line.

    Example:
        >>> from minilora.problems import Problems
        >>> problems = Problems()
        >>> for site in ("layer.0.norm", "layer.1.norm"):
        ...     problems.add(site, "is no matrix")
        >>> problems.lines()
        ["'layer.*.norm' (x2): is no matrix"]
    """

    def __init__(self) -> None:
        self._sites: dict[str, list[str]] = {}

    def add(self, site: str, problem: str) -> None:
        """Note a problem."""
        self._sites.setdefault(problem, []).append(site)

    def __len__(self) -> int:
        return len(self._sites)

    def __iadd__(self, other: Problems) -> Problems:
        for text, sites in other._sites.items():
            self._sites.setdefault(text, []).extend(sites)
        return self

    def lines(self, hint: Callable[[list[str]], str] = lambda sites: "") -> list[str]:
        """Return a line for each problem, with what `hint` has to say to its sites."""
        return [f"{described(sites)}: {text}{hint(sites)}" for text, sites in self._sites.items()]
