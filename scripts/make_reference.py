"""Write docs/reference.md from signatures and docstrings: python scripts/make_reference.py."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import minilora

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"

ROOMS = {
    "Injecting": ["inject", "eject", "LoRAConfig", "AdapterConfig"],
    "Training": [
        *("freeze", "trainable_parameters", "parameter_groups", "disabled", "check_gradients"),
        "slim_checkpoints",
        *("summary", "Summary", "SummaryRow"),
    ],
    "Merging": ["merge", "unmerge", "fuse", "merged_weights", "merge_loss"],
    "Files": ["save", "load", "adapter_state_dict"],
    "Many adapters": ["Bank", "combine", "Combination"],
    "What stands in a model": [
        *("InjectedModule", "LoRA", "LoRALinear", "Adapter"),
        *("TrainableHead", "TrainedParameter", "FrozenStatistics"),
    ],
    "Errors": ["MiniLoRAError", "TargetError", "CheckpointError", "MergeError"],
}

OPENING = """\
# Reference

Every public name, from the docstrings. Import them from `minilora`: `from minilora import LoRAConfig`.
The types `Target` and `Targets`, in signatures, stand for

```python notest
Target = str | re.Pattern[str] | Callable[[str, Any], bool]
Targets = Target | Iterable[Target]
```

and are explained in [Choosing targets](targets.md). Functions that change a model change it in place and
return it. When one raises, nothing has changed. An argument that another library takes, such as
`target_modules=` or `lora_alpha=`, raises a `MiniLoRAError` that names the one here.
"""


def page() -> str:
    """Return the whole page."""
    parts = [OPENING]
    for room, names in ROOMS.items():
        parts.append(f"\n## {room}\n")
        parts += [f"\n### `{name}`\n\n{entry(name)}" for name in names]
    return "".join(parts)


def entry(name: str) -> str:
    value = getattr(minilora, name)
    head = class_head(name, value) if inspect.isclass(value) else signature("def", name, value)
    text = f"```python notest\n{head}\n```\n\n{prose(inspect.getdoc(value) or '')}\n"
    if inspect.isclass(value) and (members := public_members(value)):
        text += "\nIt offers:\n\n" + "".join(f"- `{m}`: {first_line(value, m)}\n" for m in members)
    return text


def class_head(name: str, value: type) -> str:
    bases = public_bases(value)
    head = f"class {name}({', '.join(bases)}):" if bases else f"class {name}:"
    if issubclass(value, Exception):
        return f"{head} ..."
    return f"{head}\n{textwrap.indent(signature('def', '__init__', value), '    ')}"


def is_named(kind: type) -> bool:
    """Return whether the page, Python or torch has a name for a class."""
    return kind.__name__ in minilora.__all__ or not kind.__module__.startswith("minilora")


def public_bases(value: type) -> list[str]:
    """Return the bases that have a name; in the place of one that has none, that one's own."""
    names: list[str] = []
    for base in value.__bases__:
        if not is_named(base):
            names += public_bases(base)
        elif base is not object:
            names.append(f"nn.{base.__name__}" if base.__module__.startswith("torch.") else base.__name__)
    return names


def signature(keyword: str, name: str, value: object) -> str:
    found = inspect.signature(value)  # type: ignore[arg-type]
    lines = ["    self,"] if name == "__init__" else []
    star = False
    for parameter in found.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            star = True
            lines.append("    *,")
        default = "" if parameter.default is inspect.Parameter.empty else f" = {shown(parameter.default)}"
        lines.append(f"    {parameter.name}: {plain(parameter.annotation)}{default},")
    returns = "None" if name == "__init__" else plain(found.return_annotation)
    returns = re.sub(r"Iterator\[", "AbstractContextManager[", returns)
    return "\n".join([f"{keyword} {name}(", *lines, f") -> {returns}: ..."])


def plain(annotation: object) -> str:
    return re.sub(r"\bConfig\b", "LoRAConfig | AdapterConfig", str(annotation))


def shown(default: object) -> str:
    return "LoRAConfig()" if isinstance(default, minilora.LoRAConfig) else repr(default).replace("'", '"')


def prose(docstring: str) -> str:
    """Return a Google-style docstring as Markdown: its sections as lists, its examples as code."""
    parts = re.split(r"^(Args|Returns|Raises|Warns|Example):\n", docstring, flags=re.MULTILINE)
    text = [parts[0].rstrip()]
    for title, indented in zip(parts[1::2], parts[2::2], strict=True):
        body = textwrap.dedent(indented).strip()
        if title == "Example":
            text.append(f"```pycon\n{body}\n```")
        elif title == "Returns":
            text.append(f"Returns: {body[0].lower()}{body[1:]}")
        else:
            items = [re.sub(r"\s*\n\s+", " ", item) for item in re.split(r"\n(?=\S)", body)]
            bullets = [re.sub(r"^([\w.]+):", r"`\1`:", item) for item in items]
            text.append(f"{title}:\n\n" + "\n".join(f"- {bullet}" for bullet in bullets))
    return "\n\n".join(textwrap.fill(t, 116) if is_paragraph(t) else t for t in text)


def is_paragraph(text: str) -> bool:
    return "\n" not in text


def public_members(value: type) -> list[str]:
    """Return what a class offers beyond what the bases do that have a name."""
    mro = list(value.__mro__)
    named = next(i for i, kind in enumerate(mro) if i > 0 and is_named(kind))
    own, known = (
        {name for kind in kinds for name in (*vars(kind), *inspect.get_annotations(kind))}
        for kinds in (mro[:named], mro[named:])
    )
    return sorted(name for name in own - known if not name.startswith("_"))


def first_line(owner: type, member: str) -> str:
    """Return what a member is: its own docstring, that of the class above, or the string under a field."""
    for kind in owner.__mro__:
        value = vars(kind).get(member)
        value = getattr(value, "__func__", value)  # of a class method
        if (callable(value) or isinstance(value, property)) and value.__doc__:
            return inspect.cleandoc(value.__doc__).split("\n\n")[0].replace("\n", " ")
        if kind.__module__.startswith("minilora"):
            source = inspect.getsource(kind)
            if found := re.search(
                rf'^    {member}\b[^\n]*\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL
            ):
                return re.sub(r"\s+", " ", found[1])
            if found := re.search(rf"^    {member}: [^\n#]*#\s*([^\n]+)", source, re.MULTILINE):
                return found[1]
    raise LookupError(f"nothing says what {owner.__name__}.{member} is")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
