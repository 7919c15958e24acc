r"""PEFT's rules of matching names, odd ones included, since they decide what a file means.

    target_modules, a list    a module's full name or a whole-segment suffix of it
    target_modules, a string  "all-linear", or a regular expression that the full name matches
    exclude_modules           by the same two rules
    rank_pattern's keys       regular expressions; `(.*\.)?(KEY)$` is matched, the first that fits counts
    modules_to_save           any module whose name ends with the entry, in the middle of a segment too; and
                              LoRA leaves out what `(^|.*\.)ENTRY($|\..*)` matches

An adapter may have thousands of sites, heads and patterns. None of them is held against all others: each
rule is asked in steps that grow with the length of the name alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from ....names import above, ends

SPECIAL = frozenset(".^$*+?{}[]|()\\")
ESCAPED = SPECIAL | frozenset("-#&~ ")  # what re.escape, and people, put a backslash before

Number = TypeVar("Number", int, float)

Parts = Callable[[str], Iterable[tuple[bool, str]]]


def end_parts(name: str) -> Iterator[tuple[bool, str]]:
    """Yield the ends of a name in whole segments, each with whether the name begins with it.

    >>> list(end_parts("a.b"))
    [(True, 'a.b'), (False, 'b')]
    """
    for end in ends(name):
        yield len(end) == len(name), end


def inner_parts(name: str) -> Iterator[tuple[bool, str]]:
    """Yield every run of whole segments in a name, each with whether the name begins with it.

    >>> list(inner_parts("a.b"))
    [(True, 'a'), (True, 'a.b'), (False, 'b')]
    """
    for first, end in end_parts(name):
        for run in (*above(end), end):
            yield first, run


class LooseEnds:
    """Texts, asked which of them a name ends with, in the middle of a segment too."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._by_length: dict[int, set[str]] = {}
        for text in texts:
            self._by_length.setdefault(len(text), set()).add(text)

    def of(self, name: str) -> list[str]:
        """Return those that the name ends with.

        >>> LooseEnds(["head", "head.dense"]).of("overhead")
        ['head']
        """
        tails = {length: name[len(name) - length :] for length in self._by_length if length <= len(name)}
        return [tail for length, tail in tails.items() if tail in self._by_length[length]]


class Expressions:
    """Regular expressions in an order, asked which is the first to match a name.

    Nearly all are plain names, in which a dot stands for any character. These are looked up; the others are
    tried one by one.

    Args:
        texts: the expressions.
        around: makes the expression that is matched, `re.match(around(text), name)`.
        parts: yields those parts of a name that `around` lets a plain one match in full.
    """

    def __init__(self, texts: Sequence[str], around: Callable[[str], str], parts: Parts) -> None:
        self._texts, self._around, self._parts = texts, around, parts
        # By length, then by where the dots are and whether it begins with "^": what is left -> its index.
        self._plain: dict[int, dict[tuple[tuple[int, ...], bool], dict[str, int]]] = {}
        self._others: list[tuple[int, re.Pattern[str]]] = []
        for index, text in enumerate(texts):
            if (plain := _plain(text)) is None:
                self._others.append((index, re.compile(around(text))))
            else:
                characters, dots, anchored = plain
                tables = self._plain.setdefault(len(characters), {})
                tables.setdefault((dots, anchored), {}).setdefault(_without(characters, dots), index)

    def first(self, name: str) -> int | None:
        """Return the index of the first expression that matches a name, or None."""
        if "\n" in name:  # which no dot matches
            found = (i for i, text in enumerate(self._texts) if re.match(self._around(text), name))
            return next(found, None)
        best = len(self._texts)
        for first, part in self._parts(name):
            for (dots, anchored), table in self._plain.get(len(part), {}).items():
                if first or not anchored:
                    best = min(best, table.get(_without(part, dots), best))
        for index, expression in self._others:
            if index > best:
                break
            if expression.match(name):
                return index
        return best if best < len(self._texts) else None


class NameMatch:
    """target_modules or exclude_modules: names, or one regular expression that a full name matches.

    >>> NameMatch(["query"])("layer.1.query"), NameMatch("query|value")("layer.1.query")
    (True, False)
    """

    def __init__(self, names: str | Iterable[str]) -> None:
        self._names: frozenset[str] = frozenset()
        if not isinstance(names, str):
            self._names = frozenset(names)
            self._matches = self._has_an_end_of
        elif names and all(map(is_plain, names.split("|"))):
            # As minilora writes it, for thousands of sites perhaps, where ends of names would catch others.
            texts = Expressions(names.split("|"), lambda text: rf"(?:{text})\Z", lambda name: [(True, name)])
            self._matches = lambda name: texts.first(name) is not None
        else:
            expression = re.compile(names)
            self._matches = lambda name: bool(names) and expression.fullmatch(name) is not None

    def __call__(self, name: str) -> bool:
        """Return whether the name is meant."""
        return self._matches(name)

    def lists(self, name: str) -> bool:
        """Return whether the name is given in full."""
        return name in self._names

    def _has_an_end_of(self, name: str) -> bool:
        return not self._names.isdisjoint(ends(name))


class PatternValues(Generic[Number]):
    r"""rank_pattern or alpha_pattern: regular expressions, each with the value that it gives to a site.

    >>> PatternValues({"query": 4, r"layer\.1\.value": 2})("layer.1.value", 8)
    2
    """

    def __init__(self, pattern: Mapping[str, Number]) -> None:
        self._values: list[Number] = list(pattern.values())
        self._expressions = Expressions(list(pattern), around_pattern, end_parts)

    def __call__(self, site: str, default: Number) -> Number:
        """Return the value of the first expression that fits the site, or the default."""
        found = self._expressions.first(site)
        return default if found is None else self._values[found]


def around_pattern(key: str) -> str:
    """Return the expression that PEFT matches for a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({key})$"


def around_left_out(entry: str) -> str:
    """Return the expression by which LoRA leaves a module out, for an entry of modules_to_save."""
    return rf"(^|.*\.){entry}($|\..*)"


def around_layers(entry: str) -> str:
    """Return the expression that finds the index of a layer, for an entry of layers_pattern."""
    return rf"(?:^|.*?\.){entry}\.(?P<idx>\d+)\."


def is_plain(text: str) -> bool:
    r"""Return whether an expression is a name, in which a dot stands for any character.

    >>> is_plain("layer.1"), is_plain(r"layer\.1"), is_plain(r"layer\.\d")
    (True, True, False)
    """
    return _plain(text) is not None


def expression_problem(text: str, around: Callable[[str], str]) -> str | None:
    """Return why a text is no regular expression, by itself or as part of another; None where it is one."""
    if is_plain(text):
        return None
    try:
        re.compile(text)
        re.compile(around(text))
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a valid regular expression: {error}"
    return None


def _plain(text: str) -> tuple[str, tuple[int, ...], bool] | None:
    """Return an expression as characters, the places of its dots, and whether it begins with "^".

    None where it is more than that.
    """
    anchored = text.startswith("^")
    rest = iter(text[1:] if anchored else text)
    characters: list[str] = []
    dots = []
    for character in rest:
        if character == "\\":
            escaped = next(rest, "")
            if escaped not in ESCAPED:
                return None  # \d, \b, ...
            characters.append(escaped)
            continue
        if character == ".":
            dots.append(len(characters))
        elif character in SPECIAL:
            return None
        characters.append(character)
    return "".join(characters), tuple(dots), anchored


def _without(text: str, places: tuple[int, ...]) -> str:
    """Return a text without the characters at some places."""
    kept, at = [], 0
    for place in places:
        kept.append(text[at:place])
        at = place + 1
    kept.append(text[at:])
    return "".join(kept)
