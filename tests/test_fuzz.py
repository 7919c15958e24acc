"""Whatever was done to a file: it loads to the bits that were saved, or raises and the model is as it was."""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from checks import picture, randomise, state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import MLP
from torch import nn

import minilora
from minilora import AdapterConfig, CheckpointError, LoRAConfig
from minilora.files.tensors import TensorFile, digest, entries_of, read_tensors, write_tensors

quickly = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP()


def trained() -> nn.Module:
    model = minilora.inject(base(), ["up", "down"], LoRAConfig(r=2), trainable=["classifier"])
    return randomise(minilora.inject(model, ["up"], AdapterConfig(bottleneck=2), trainable=()))


def lora_alone() -> nn.Module:
    return randomise(minilora.inject(base(), ["up", "down"], LoRAConfig(r=2), trainable=["classifier"]))


def written(model: nn.Module, format: Any, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        minilora.save(model, Path(folder) / "a", format=format)
        return (Path(folder) / "a" / name if name else Path(folder) / "a").read_bytes()


GOOD = written(trained(), "minilora", "")
PEFT_TENSORS = written(lora_alone(), "peft", "adapter_model.safetensors")
PEFT_CONFIG = written(lora_alone(), "peft", "adapter_config.json")

# One model for all examples: each must leave it as it was, or be taken back.
MODEL = base()
BEFORE = picture(MODEL)


def same_bits_or_refused(path: Path, expected: dict[str, Any]) -> bool:
    """Return whether the file loaded."""
    try:
        minilora.load(MODEL, path)
    except CheckpointError:
        assert picture(MODEL) == BEFORE
        return False
    assert state(MODEL) == expected
    minilora.eject(MODEL)
    for name, _, requires_grad in BEFORE["parameters"]:
        MODEL.get_parameter(name).requires_grad_(requires_grad)
    return True


EXPECTED = state(trained())
EXPECTED_BY_PEFT = state(lora_alone())


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: bytes, values: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + values


def of_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    header, values = split(GOOD)
    change(header)
    return joined(json.dumps(header).encode(), values)


def positions(content: bytes) -> st.SearchStrategy[int]:
    # The header is the smaller and the more interesting half.
    header = 8 + int.from_bytes(content[:8], "little")
    return st.one_of(st.integers(0, 15), st.integers(0, header - 1), st.integers(0, len(content) - 1))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a file to which something happened that can happen to bytes."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = min(draw(positions(content)), len(result))
        match draw(st.sampled_from(["flip", "overwrite", "cut", "insert", "delete", "append", "swap"])):
            case "flip" if at < len(result):
                result[at] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                noise = draw(st.binary(min_size=1, max_size=16))
                result[at : at + len(noise)] = noise
            case "cut":
                del result[at:]
            case "insert":
                result[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "delete":
                del result[at : at + draw(st.integers(1, 16))]
            case "append":
                result += draw(st.binary(min_size=1, max_size=64))
            case "swap":
                other = draw(positions(content))
                result[at : at + 4], result[other : other + 4] = (
                    result[other : other + 4],
                    result[at : at + 4],
                )
    return bytes(result)


@quickly
@given(content=damaged(GOOD))
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert same_bits_or_refused(path, EXPECTED) == (content == GOOD) or _differs_in_space_only(content)


def _differs_in_space_only(content: bytes) -> bool:
    """Return whether a file that loaded says the same in other bytes, such as one space less."""
    return split(content) == split(GOOD)


@quickly
@given(content=damaged(PEFT_TENSORS))
def test_damaged_tensors_of_a_peft_folder(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(PEFT_CONFIG)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    same_bits_or_refused(tmp_path, EXPECTED_BY_PEFT)


@quickly
@given(content=damaged(PEFT_CONFIG))
def test_damaged_configs_of_a_peft_folder(content: bytes, tmp_path: Path) -> None:
    """A config is made for editing. What loads must be whole, and mean what it meant when it was saved."""
    (tmp_path / "adapter_config.json").write_bytes(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(PEFT_TENSORS)
    try:
        minilora.load(MODEL, tmp_path)
    except CheckpointError:
        assert picture(MODEL) == BEFORE
    else:
        assert state(MODEL) == EXPECTED_BY_PEFT
        configs = {(layer.config.scaling, layer.config.dropout) for layer in (MODEL.up, MODEL.down)}
        assert configs == {(8.0, 0.0)}
        minilora.eject(MODEL).requires_grad_(True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def paths_in(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: object) -> Any:
    value = json.loads(json.dumps(value))
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return value


@st.composite
def other_manifests(draw: st.DrawFn) -> bytes:
    """Draw a file whose header is sound JSON in which one value is another."""
    header, values = split(GOOD)
    entry = draw(st.sampled_from(["minilora", "minilora_base", "tensors"]))
    if entry == "tensors":
        names = {name: value for name, value in header.items() if name != "__metadata__"}
        header |= replaced(names, draw(st.sampled_from(list(paths_in(names)))), draw(json_values))
    else:
        inner = json.loads(header["__metadata__"][entry])
        inner = replaced(inner, draw(st.sampled_from(list(paths_in(inner)))), draw(json_values))
        header["__metadata__"][entry] = json.dumps(inner)
    return joined(json.dumps(header).encode(), values)


@quickly
@given(content=other_manifests())
def test_headers_of_another_shape(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    same_bits_or_refused(path, EXPECTED)


@quickly
@given(field=st.sampled_from(sorted(json.loads(PEFT_CONFIG))), value=json_values)
def test_peft_fields_of_another_shape(field: str, value: object, tmp_path: Path) -> None:
    config = {**json.loads(PEFT_CONFIG), field: value}
    test_damaged_configs_of_a_peft_folder.hypothesis.inner_test(json.dumps(config).encode(), tmp_path)


def overlapping(header: dict[str, Any]) -> None:
    header["up.lora_A"]["data_offsets"] = header["up.lora_B"]["data_offsets"]


def of_dtype(dtype: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["up.lora_A"].update(dtype=dtype)


def metadata(text: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["__metadata__"].update(minilora=text)


HOSTILE: dict[str, bytes] = {
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + GOOD[8:],
    "a header of 100 MB": (10**8).to_bytes(8, "little") + b"{" + b" " * 100,
    "a header longer than the file": len(GOOD).to_bytes(8, "little") + GOOD[8:],
    "an empty file": b"",
    "seven bytes": b"\0" * 7,
    "no header": (0).to_bytes(8, "little"),
    "overlapping offsets": of_header(overlapping),
    "offsets past the end": of_header(lambda h: h["up.lora_A"].update(data_offsets=[0, 10**12])),
    "negative offsets": of_header(lambda h: h["up.lora_A"].update(data_offsets=[-8, 8])),
    "reversed offsets": of_header(lambda h: h["up.lora_A"]["data_offsets"].reverse()),
    "a shape that overflows": of_header(lambda h: h["up.lora_A"].update(shape=[2**62, 2**62])),
    "a negative shape": of_header(lambda h: h["up.lora_A"].update(shape=[-2, -16])),
    "an unknown dtype": of_header(of_dtype("F12")),
    **{f"dtype {name}": of_header(of_dtype(name)) for name in ("I32", "U32", "F64", "C64", "F8_E4M3", "F4")},
    "no tensors": joined(json.dumps({"__metadata__": split(GOOD)[0]["__metadata__"]}).encode(), b""),
    "a hole between tensors": joined(json.dumps(split(GOOD)[0]).encode(), split(GOOD)[1] + b"\0" * 8),
    "bad JSON": joined(b'{"a": }', b""),
    "deep JSON": joined(b'{"a":' * 5000 + b"1" + b"}" * 5000, b""),
    "deep JSON inside": of_header(metadata("[" * 100_000)),
    "an endless number inside": of_header(metadata('{"format_version": 1' + "0" * 10_000 + "}")),
    "not a number inside": of_header(metadata('{"format_version": NaN}')),
    "a pickle": b"\x80\x04\x95\x15\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(HOSTILE[kind])
    assert not same_bits_or_refused(path, EXPECTED)


def test_a_header_that_is_sound_but_absurdly_long(tmp_path: Path) -> None:
    header, values = split(GOOD)
    (tmp_path / "a.safetensors").write_bytes(joined(json.dumps(header).encode() + b" " * 2**25, values))
    with pytest.raises(CheckpointError, match="the most that is read"):
        minilora.load(MODEL, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(PEFT_CONFIG + b" " * 2**25)
    with pytest.raises(CheckpointError, match="the most that is read"):
        minilora.load(MODEL, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_values_of_no_use_as_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["up.lora_A"] = tensors["up.lora_A"].to(dtype)
    safetensors.torch.save_file(tensors, path, metadata)
    assert not same_bits_or_refused(path, EXPECTED)


@pytest.mark.parametrize("key", ["minilora", "minilora_sha256"])
def test_a_file_whose_entries_were_taken_out(key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(of_header(lambda header: header["__metadata__"].pop(key)))
    with pytest.raises(CheckpointError, match=key):
        minilora.load(MODEL, path)
    assert picture(MODEL) == BEFORE


def test_one_flipped_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    content = bytearray(GOOD)
    content[-2] ^= 1
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        minilora.load(MODEL, tmp_path / "a.safetensors")


def test_the_good_file_loads(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(GOOD)
    assert same_bits_or_refused(tmp_path / "a.safetensors", EXPECTED)
    assert picture(MODEL) == BEFORE


class Unknown(nn.Module):
    """A module whose width nothing tells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


WIDEST = 2**31 - 1
ABSURD: list[dict[str, Any]] = [
    {"bottleneck": WIDEST},
    {"bottleneck": 2**62},
    {"bottleneck": 2**63},
    {"bottleneck": 10**400},
    {"bottleneck": WIDEST, "hidden_size": WIDEST},
    {"bottleneck": WIDEST, "hidden_size": WIDEST, "dtype": "float64"},
    {"hidden_size": WIDEST},
    {"hidden_size": 2**70},
    {"bottleneck": None, "reduction_factor": 1e-300},
    {"bottleneck": None, "reduction_factor": 5e-324},
    {"bottleneck": None, "reduction_factor": 1e-8, "hidden_size": WIDEST},
    {"scale": 10**400},
]


def with_config(path: Path, model: nn.Module, fields: dict[str, Any], sites: list[str]) -> None:
    """Save a model, and say something else of it in a header whose checksum is right."""
    minilora.save(model, path)
    metadata, tensors = read_tensors(path)
    del metadata["minilora_sha256"], metadata["minilora_base"]
    manifest = json.loads(metadata["minilora"])
    manifest["injections"][0]["config"] |= fields
    manifest["injections"][0]["sites"] = sites
    metadata["minilora"] = json.dumps(manifest)
    write_tensors(path, entries_of(tensors), metadata | {"minilora_sha256": digest(tensors, metadata)})


@pytest.mark.parametrize("site", ["0", "1", "2"])
@pytest.mark.parametrize("fields", ABSURD, ids=str)
def test_absurd_widths(fields: dict[str, Any], site: str, tmp_path: Path) -> None:
    def bare() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(), Unknown())

    model = minilora.inject(bare(), "0", AdapterConfig(bottleneck=2))
    with_config(tmp_path / "a", model, fields, [site])
    other = bare()
    before = picture(other)
    with pytest.raises(CheckpointError):
        minilora.load(other, tmp_path / "a")
    assert picture(other) == before


@pytest.mark.parametrize("fields", [{"r": WIDEST}, {"r": 2**62}, {"r": 10**400}, {"alpha": 10**400}], ids=str)
@pytest.mark.filterwarnings("ignore:.*r exceeds the smaller side")
def test_absurd_ranks(fields: dict[str, Any], tmp_path: Path) -> None:
    with_config(tmp_path / "a", minilora.inject(nn.Sequential(nn.Linear(8, 8)), "0"), fields, ["0"])
    with pytest.raises(CheckpointError):
        minilora.load(nn.Sequential(nn.Linear(8, 8)), tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("x", "U8", [2**33]),
        ("up.x", "F32", [2**31]),
        ("up.lora_A", "F32", [2, 2**30]),
        ("up.lora_B", "U8", [2**33]),
    ],
)
def test_tensors_that_nothing_calls_for_are_not_read(
    name: str, dtype: str, shape: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that says to be of 8 GiB, and of which next to nothing is on the disk."""
    header, values = split(GOOD)
    header.pop(name, None)
    offset = 0
    for key, entry in sorted(header.items(), key=lambda item: item[0]):
        if key != "__metadata__":
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            entry["data_offsets"] = [offset, offset + size]
            offset += size
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + 2**33]}
    text = json.dumps(header).encode()
    with open(tmp_path / "a", "wb") as file:
        file.write(joined(text, values[:offset]))
        file.truncate(8 + len(text) + offset + 2**33)
    read, real = [], TensorFile.get_tensor

    def get_tensor(self: TensorFile, key: str) -> torch.Tensor:
        read.append(key)
        return real(self, key)

    monkeypatch.setattr(TensorFile, "get_tensor", get_tensor)
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        minilora.load(MODEL, tmp_path / "a")
    assert name not in read
    assert picture(MODEL) == BEFORE
    if name == "x":  # what lies in no site of the file is refused without a model, too
        read.clear()
        with pytest.raises(CheckpointError, match="called for by nothing: 'x'"):
            minilora.files.loading.read(tmp_path / "a")
        assert read == []


def test_pickles_are_opened_in_one_place_and_for_tensors_alone() -> None:
    """`torch.load` is called once in the library, restricted, where the caller has allowed it."""
    sources = sorted(Path(minilora.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    calls = []
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.load",
                "pickle.load",
                "pickle.loads",
            ):
                calls.append((source.name, ast.unparse(node)))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords["weights_only"] == "True", source
    assert calls == [("pickles.py", "torch.load")]
