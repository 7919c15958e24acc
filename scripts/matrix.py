"""Run the fast tests with other versions of Python, torch and transformers: make matrix.

    make matrix                                  # each combination that this machine has what is needed for
    make matrix ARGS="--only 3.12 4.57"          # the named ones
    make matrix ARGS="--torch-index URL"         # torch from an index, such as PyTorch's own of CPU builds
    make matrix ARGS="--only 4.57 -- -k trainers"    # what follows -- goes to pytest

Each combination gets an environment of its own under build/matrix/, which stays for the next time. An
interpreter is one that is installed already, by whatever means; none is fetched. torch is taken from what
pip finds on disk (`find-links` in its configuration), and from an index only where one is named, because what
an index gives for it may be gigabytes. The rest comes by pip as it is set up. What cannot be run is skipped,
with the reason. The exit code is 1 if a combination failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "matrix"
PINS = ROOT / "constraints.txt"


@dataclass(frozen=True)
class Combination:
    """Versions to test together; what is pinned comes from constraints.txt."""

    name: str
    python: str
    torch: str | None = None
    """Other than the pinned one."""
    transformers: str | None = None
    """Other than the pinned one; whatever depends on it is then what pip chooses."""
    numpy: str | None = None
    """Other than what pip chooses."""

    @property
    def pinned(self) -> bool:
        return self.torch is None and self.transformers is None


COMBINATIONS = (
    Combination("oldest", "3.10", torch="2.6.*", transformers="4.57.*", numpy="1.26.*"),
    *(Combination(version, version) for version in ("3.10", "3.11", "3.12", "3.13", "3.14")),
    Combination("2.6", "3.11", torch="2.6.*"),
    Combination("2.14", "3.11", torch="2.14.*"),
    Combination("4.57", "3.11", transformers="4.57.*", numpy="1.26.*"),
)

# What the tests need, where the pins and the extra of the tests do not hold. Tests of what is absent skip.
UNPINNED = [
    *("pytest", "pytest-xdist", "hypothesis", "safetensors[torch]", "accelerate", "peft"),
    *("loralib", "datasets", "matplotlib", "tqdm"),
]


@dataclass
class Outcome:
    """What became of a combination."""

    name: str
    result: str
    """passed, failed or not run."""
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    tests: str = ""
    date: str = ""


class Unavailable(Exception):
    """Something that a combination needs is not here."""


def interpreter(version: str) -> str:
    """Return an installed Python of a version.

    Raises:
        Unavailable: there is none.
    """
    for path in _interpreters(version):
        program = "import sys; print('%d.%d' % sys.version_info[:2])"
        # A shim of pyenv is there for versions, too, that it will not start.
        told = subprocess.run([path, "-c", program], capture_output=True, text=True, check=False)
        if told.stdout.strip() == version:
            return path
    raise Unavailable(f"no Python {version} on this machine")


def _interpreters(version: str) -> Iterator[str]:
    if on_path := shutil.which(f"python{version}"):
        yield on_path
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python")))
    if uv := shutil.which("uv"):
        command = [uv, "python", "find", "--no-python-downloads", version]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        yield from found.stdout.split("\n")[:1] if found.returncode == 0 else ()


def environment(combination: Combination, torch_index: str | None) -> str:
    """Make the environment of a combination, or find it made. Returns its Python.

    Raises:
        Unavailable: the interpreter, torch, or another package cannot be had.
    """
    found = interpreter(combination.python)
    folder = FOLDER / combination.name
    python = str(folder / "bin" / "python")
    if (folder / "made").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _make(found, folder)
    torch = combination.torch or _pinned("torch")
    source = ["--index-url", torch_index] if torch_index else ["--no-index"]
    if not _pip(python, "--no-deps", *source, f"torch=={torch}"):
        where = f"in {torch_index}" if torch_index else "on this disk; --torch-index says where else"
        raise Unavailable(f"no torch {torch} for Python {combination.python} {where}")
    if combination.pinned:
        complete = _pip(python, "--constraint", str(PINS), "--editable", f"{ROOT}[test]")
    else:
        transformers = combination.transformers or _pinned("transformers")
        wanted = [f"torch=={torch}", f"transformers=={transformers}", *UNPINNED]
        if combination.numpy:  # and the last of what goes with numpy 1, which pip is not told
            wanted += [f"numpy=={combination.numpy}", "pyarrow<26", "pandas<3"]
        complete = _pip(python, "--editable", str(ROOT), *wanted)
    if not complete:
        raise Unavailable("pip finds no versions that go together")
    (folder / "made").touch()
    return python


def _make(python: str, folder: Path) -> None:
    subprocess.run([python, "-m", "venv", folder], check=True)


def _pinned(package: str) -> str:
    lines = PINS.read_text(encoding="utf-8").splitlines()
    return next(
        line.partition("==")[2].partition(" ")[0] for line in lines if line.startswith(f"{package}==")
    )


def _pip(python: str, *arguments: str) -> bool:
    """Install, saying so. Returns whether it could be done."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments]
    print("+", *command, file=sys.stderr, flush=True)
    return subprocess.run(command, check=False).returncode == 0


def test(combination: Combination, torch_index: str | None, selection: Sequence[str]) -> Outcome:
    """Run the tests of one combination."""
    try:
        python = environment(combination, torch_index)
    except Unavailable as error:
        return Outcome(combination.name, "not run", str(error))
    report = FOLDER / f"{combination.name}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}", *selection]
    print("+", *command, file=sys.stderr, flush=True)
    # pytest takes the package from where it stands; one thread for each process, as `make test` has it.
    code = subprocess.run(
        command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False
    ).returncode
    tests = shlex.join(["-m", "not slow", *selection])
    counts = _counts(report)
    result = "passed" if code == 0 and counts.get("passed") else "failed"
    reason = "" if result == "passed" else f"pytest ended with {code}"
    today = date.today().isoformat()
    return Outcome(combination.name, result, reason, counts, _versions(python), tests, today)


def _counts(report: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped."""
    if not report.exists():
        return {}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = sum(any(part.tag in ("failure", "error") for part in case) for case in cases)
    skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
    return {"passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped}


def _versions(python: str) -> dict[str, str]:
    program = (
        "import importlib.metadata as m, json, platform\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "told = {name: found[name] for name in ('torch', 'transformers', 'numpy', 'peft') if name in found}\n"
        "print(json.dumps({'python': platform.python_version()} | told))"
    )
    told: dict[str, str] = json.loads(subprocess.check_output([python, "-c", program], text=True))
    return told


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as Markdown."""
    header = ["combination", "Python", "torch", "transformers", "numpy", "result", "tests"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for combination in COMBINATIONS:
        for outcome in outcomes:
            if outcome.name == combination.name:
                asked = {
                    "python": combination.python,
                    "torch": combination.torch or _pinned("torch"),
                    "transformers": combination.transformers or _pinned("transformers"),
                    "numpy": combination.numpy or "-",
                }
                versions = " | ".join((asked | outcome.versions)[name] for name in asked)
                counts = ", ".join(f"{count:,} {what}" for what, count in outcome.counts.items() if count)
                told = outcome.result + (f": {outcome.reason}" if outcome.reason else "")
                lines.append(f"| {outcome.name} | {versions} | {told} | {counts or '-'} |")
    run = dict.fromkeys(outcome.tests for outcome in outcomes if outcome.tests)
    which = (
        f"- {', '.join(o.name for o in outcomes if o.tests == tests)}: `pytest {tests}`" for tests in run
    )
    return "\n".join([*lines, "", *which]).rstrip()


def recorded(path: Path) -> list[Outcome]:
    """Return the outcomes in a record, which may not be there yet."""
    return [Outcome(**entry) for entry in json.loads(path.read_text("utf-8"))] if path.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    """Test the combinations and print a table. Returns the exit code."""
    arguments, selection = list(sys.argv[1:] if argv is None else argv), []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, selection = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [combination.name for combination in COMBINATIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--torch-index", metavar="URL", help="where to take torch from")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what came of it, too, as JSON")
    args = parser.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    chosen = [combination for combination in COMBINATIONS if combination.name in args.only]
    outcomes = [test(combination, args.torch_index, selection) for combination in chosen]
    print(table(outcomes))
    if args.record:
        kept = [outcome for outcome in recorded(args.record) if outcome.name not in args.only]
        in_order = sorted([*kept, *outcomes], key=lambda outcome: names.index(outcome.name))
        content = json.dumps([asdict(outcome) for outcome in in_order], indent=2)
        args.record.write_text(content + "\n", encoding="utf-8")
    return int(any(outcome.result == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
