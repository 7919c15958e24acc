"""`Fields`: the fields of a JSON object, each checked as it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....errors import quoted
from .matching import around_pattern, expression_problem

# Initialisations that touch A and B only. All others replace the base's weights when an adapter is loaded.
HARMLESS_INITS: dict[object, str] = {
    True: "kaiming",
    False: "kaiming",
    "gaussian": "gaussian",
    "eva": "kaiming",
    "orthogonal": "kaiming",
}


class Fields:
    """The fields of a JSON object, each checked as it is taken; what is wrong gathers in `problems`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []

    def flag(self, name: str) -> bool:
        """Take a boolean; false where there is none."""
        value: bool = self._take(name, False, lambda v: isinstance(v, bool), "true or false")
        return value

    def integer(self, name: str, default: int) -> int:
        """Take an integer above 0."""
        value: int = self._take(name, default, _is_rank, "a number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        """Take a number."""
        value: float = self._take(name, default, _is_number, "a number")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Take one of several words, the first of them where there is none."""
        value: str = self._take(name, choices[0], lambda v: v in choices, f"one of {quoted(choices)}")
        return value

    def optional_text(self, name: str) -> str | None:
        """Take a string or null."""
        value: str | None = self._take(name, None, lambda v: isinstance(v, str), "a string")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """Take a list of strings."""
        return tuple(self._take(name, (), _is_names, "a list of names"))

    def integers(self, name: str) -> tuple[int, ...]:
        """Take an integer or a list of them."""
        value = self.values.get(name)
        found = [] if value is None else [value] if is_integer(value) else value
        if isinstance(found, list) and all(map(is_integer, found)):
            return tuple(found)
        self.problems.append(f"{name}: must be an integer or a list of them, not {value!r:.100}")
        return ()

    def names_or_expression(self, name: str) -> str | tuple[str, ...]:
        """Take a list of strings, or a string that is a regular expression."""
        value = self._take(name, (), _is_name_or_names, "a string or a list of names")
        if isinstance(value, str):
            self.require_expression(name, value, str)
            return value
        return tuple(value)

    def expressions(self, name: str, around: Callable[[str], str]) -> tuple[str, ...]:
        """Take a regular expression or a list of them, which will be matched as part of others."""
        value = self._take(name, (), _is_name_or_names, "a string or a list of names")
        found = (value,) if isinstance(value, str) and value else tuple(value)
        for entry in found:
            self.require_expression(name, entry, around)
        return found

    def ranks(self, name: str) -> Mapping[str, int]:
        """Take an object of regular expressions and integers above 0."""
        return self._pattern(name, _is_rank, "an object of names and numbers above 0")

    def numbers(self, name: str) -> Mapping[str, float]:
        """Take an object of regular expressions and numbers."""
        return self._pattern(name, _is_number, "an object of names and numbers")

    def rows(self, name: str) -> Mapping[str, tuple[int, ...]]:
        """Take a list of rows, which comes under the name "", or an object of names and such lists."""
        value = self.values.get(name)
        named = {"": value} if isinstance(value, list) and value else value or {}
        if isinstance(named, dict) and all(map(_is_rows, named.values())):
            return {key: tuple(rows) for key, rows in named.items()}
        self.problems.append(
            f"{name}: must be a list of rows, each once and from 0 on, or an object of names and such lists, "
            f"not {value!r:.100}"
        )
        return {}

    def initialisation(self, name: str) -> str:
        """Take an initialisation, as minilora names those that leave the base alone."""
        value = self.values.get(name, True)
        if isinstance(value, (bool, str)) and value in HARMLESS_INITS:
            return HARMLESS_INITS[value]
        self.problems.append(
            f"{name}: {value!r:.100} replaces the base's weights when PEFT loads the adapter, so A and B "
            "belong to another base. Have PEFT convert it: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
        return "kaiming"

    def require_expression(self, name: str, text: str, around: Callable[[str], str]) -> None:
        """Note a problem unless a text is a regular expression, by itself and as part of another."""
        if problem := expression_problem(text, around):
            self.problems.append(f"{name}: {text!r:.100} {problem}")

    def _pattern(self, name: str, valid: Callable[[object], bool], what: str) -> Mapping[str, Any]:
        value: dict[str, Any] = self._take(
            name, {}, lambda v: isinstance(v, dict) and all(map(valid, v.values())), what
        )
        for key in value:
            self.require_expression(name, key, around_pattern)
        return value

    def _take(self, name: str, default: Any, valid: Callable[[Any], bool], what: str) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if valid(value):
            return value
        self.problems.append(f"{name}: must be {what}, not {value!r:.100}")
        return default


def is_integer(value: object) -> bool:
    """Return whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return is_integer(value) and value > 0


def _is_rows(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(map(is_integer, value)):
        return False
    return min(value) >= 0 and len(set(value)) == len(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_name_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)
