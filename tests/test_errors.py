"""The tree of errors, and how several problems become one message."""

import pytest

from minilora import CheckpointError, MergeError, MiniLoRAError, TargetError
from minilora.errors import listed, quoted, several


@pytest.mark.parametrize("kind", [TargetError, CheckpointError, MergeError])
def test_every_error_is_a_minilora_error_and_a_value_error(kind):
    assert issubclass(kind, MiniLoRAError)
    assert issubclass(kind, ValueError)


def test_merge_error_is_a_type_error_too():
    assert issubclass(MergeError, TypeError)


def test_several_lists_every_problem():
    assert (
        several(["a", "b"], outcome="no change", footer="end") == "2 problems; no change:\n  - a\n  - b\nend"
    )
    assert several(["a"], outcome="no change") == "1 problem; no change:\n  - a"


def test_long_lists_end_in_a_count():
    assert listed(list("abc"), limit=3) == "a, b, c"
    assert listed(list("abcde"), limit=3) == "a, b, c and 2 more"
    assert quoted(["a", "b"]) == "'a', 'b'"
