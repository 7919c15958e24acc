"""Dotted names: which ends with which, which lies within which, and how a list of them reads.

A name is that of a module or a parameter in the bare model, `encoder.layer.3.query`; its segments stand
between the dots, and a segment of digits alone is an index.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from .errors import listed


def ends(name: str) -> Iterator[str]:
    """Yield the ends of a name in whole segments, the name itself first.

    >>> list(ends("layer.0.my_query"))
    ['layer.0.my_query', '0.my_query', 'my_query']
    """
    yield name
    begin = name.find(".") + 1
    while begin:
        yield name[begin:]
        begin = name.find(".", begin) + 1


def ends_with(name: str, end: str) -> bool:
    """Return whether whole segments at the end of a name read `end`.

    >>> ends_with("layer.0.query", "query"), ends_with("layer.0.my_query", "query")
    (True, False)
    """
    return name == end or name.endswith(f".{end}")


def lies_within(name: str, outer: str) -> bool:
    """Return whether a name is `outer` itself or below it.

    >>> lies_within("head.dense", "head"), lies_within("header", "head")
    (True, False)
    """
    return name == outer or name.startswith(f"{outer}.")


def above(name: str) -> Iterator[str]:
    """Yield the names above a name, the outermost first.

    >>> list(above("layer.0.query"))
    ['layer', 'layer.0']
    """
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)


def outermost_of(name: str, names: Collection[str]) -> str | None:
    """Return the outermost of some names that a name equals or lies within; None where there is none.

    >>> outermost_of("head.dense.weight", {"head", "body"})
    'head'
    """
    return next((outer for outer in (*above(name), name) if outer in names), None)


def generic(name: str) -> str:
    """Return a name with its indices as stars.

    >>> generic("layer.3.query")
    'layer.*.query'
    """
    return ".".join("*" if segment.isdigit() else segment for segment in name.split("."))


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `layer.2` before `layer.10`, as a model does.

    >>> sorted(["layer.10", "layer.2"], key=natural)
    ['layer.2', 'layer.10']
    """
    return [(int(part) if part.isdecimal() and len(part) < 10 else -1, part) for part in name.split(".")]


def described(names: Iterable[str]) -> str:
    """Return names for a message, those that differ in their indices only as one.

    >>> described(["layer.0.query", "layer.1.query", "head"])
    "'layer.*.query' (x2), 'head'"
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(generic(name), []).append(name)
    return listed([f"{g!r} (x{len(of)})" if len(of) > 1 else repr(of[0]) for g, of in groups.items()])


def suffix_counts(names: Iterable[str]) -> Counter[str]:
    """Return how often each end of up to three segments occurs, but for those that begin with an index.

    >>> dict(suffix_counts(["layer.0.query", "layer.1.query"]))
    {'query': 2, 'layer.0.query': 1, 'layer.1.query': 1}
    """
    counts: Counter[str] = Counter()
    for name in names:
        segments = name.split(".")
        for length in range(1, min(3, len(segments)) + 1):
            if not segments[-length].isdigit():
                counts[".".join(segments[-length:])] += 1
    return counts


def nearest(word: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Return the names that someone who wrote `word` may have meant, the likeliest first.

    Spelling comes first. Then parts of a name, the other usual slip: "attention.q" for
    "attention.self.query", and words that share one of their own, such as "q_proj" and "q_lin".

    >>> nearest("qery", ["query", "key", "value"])
    ['query']
    """
    choices = list(dict.fromkeys(names))
    found = difflib.get_close_matches(word, choices, n=limit, cutoff=0.6)
    depth = word.count(".")
    found += [name for name in choices if word and word in name and name.count(".") == depth]
    parts = [part for part in re.split(r"[._]", word.lower()) if part]
    # One letter is a word cut short in q_proj, for query; in c_attn it is none, and tells nothing.
    if parts and not found and (len(parts[0]) > 1 or parts[0] in "qkvo"):
        first = parts[0]
        found += [name for name in choices if name.count(".") == depth and name.lower().startswith(first)]
    return list(dict.fromkeys(found))[:limit]
