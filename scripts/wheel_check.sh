#!/usr/bin/env bash
# Builds the sdist, builds the wheel from it, installs that wheel into an environment of its own
# with nothing but its declared dependencies, and uses it there. What passed is in dist/ then.
# Usage: scripts/wheel_check.sh PYTHON   (a Python that has `build`)
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$1" -m build --outdir "$work/dist" .
"$1" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt "$work"/dist/*.whl

root=$PWD
cd "$work"  # away from the source tree, so that the installed package is what gets imported
# torch warns by itself where there is no numpy, which neither it nor minilora needs.
venv/bin/python -W error -W "ignore:Failed to initialize NumPy:UserWarning" - dist/*.whl <<'PY'
import importlib.metadata
import re
import sys
import zipfile

import torch
from torch import nn

import minilora

files = zipfile.ZipFile(sys.argv[1]).namelist()
stray = [name for name in files if not re.match(r"minilora(_command\.py$|(-[^/]+\.dist-info)?/)", name)]
assert not stray, f"in the wheel, but not of the package: {stray}"
assert "minilora/py.typed" in files, "the wheel lacks py.typed: users would get no types"
assert any(name.endswith("licenses/LICENSE") for name in files), "the wheel lacks LICENSE"
assert importlib.metadata.version("minilora") == minilora.__version__
requires = importlib.metadata.requires("minilora") or []
needed = {re.match(r"[\w-]+", line)[0] for line in requires if "extra ==" not in line}
assert needed == {"torch"}, f"dependencies are {needed}"


def fresh():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))


model, x = fresh(), torch.randn(4, 8)
base = model(x)
minilora.inject(model, targets=["0"])
assert torch.equal(model(x), base), "injection changed the output"
with torch.no_grad():
    for parameter in minilora.trainable_parameters(model):
        parameter.add_(0.1)
minilora.save(model, "adapter.safetensors")
loaded = fresh()
minilora.load(loaded, "adapter.safetensors")
assert torch.equal(loaded(x), model(x)), "what was loaded is not what was saved"
assert not torch.equal(loaded(x), base), "the adapter has no effect"
minilora.eject(loaded)
assert torch.equal(loaded(x), base), "eject did not bring the base model back"
print(f"wheel-check: minilora {minilora.__version__} works with torch {torch.__version__}")
PY
rm -rf "$root/dist"
cp -r dist "$root/dist"
