"""Words of other libraries: each is answered with ours."""

import inspect
import re

import pytest

import minilora
from minilora import MiniLoRAError
from minilora.words import OURS, explains_foreign_words, foreign_words


@pytest.mark.parametrize("word", OURS)
def test_what_is_named_instead_exists(word):
    """Each answer is a call of ours, with an argument that it takes."""
    for callee, arguments in re.findall(r"(\w+)\(([^()]*)", OURS[word]):
        taken = inspect.signature(getattr(minilora, callee)).parameters
        assert set(re.findall(r"(\w+)=", arguments)) <= set(taken)
        assert arguments


@explains_foreign_words
def example(model, targets=(), *, trainable=None):
    """Return what came."""
    return model, targets, trainable


def test_a_decorated_function_is_as_it_was():
    assert example(1, 2, trainable=3) == example(model=1, targets=2, trainable=3) == (1, 2, 3)
    assert (example.__name__, example.__doc__) == ("example", "Return what came.")
    assert list(inspect.signature(example).parameters) == ["model", "targets", "trainable"]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        example()


def test_every_foreign_word_comes_at_once():
    with pytest.raises(MiniLoRAError) as caught:
        example(1, target_modules=2, lora_alpha=3, no_such=4)
    assert str(caught.value).splitlines() == [
        "3 problems; nothing was done:",
        "  - example has no argument 'target_modules': here it is inject(model, targets=[...])",
        "  - example has no argument 'lora_alpha': here it is LoRAConfig(alpha=...)",
        "  - example has no argument 'no_such'",
        "example takes model, targets, trainable",
    ]


def test_no_foreign_word_no_message():
    assert foreign_words(["r"], ["r", "alpha"], caller="LoRAConfig") is None
    assert foreign_words([], [], caller="f") is None
