"""Runs and sweeps as data: dataclasses, read from YAML, changed by dotted overrides, refused with the nearest key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vlmzoo.registry import unknown

T = TypeVar("T")

Part = Literal["vision", "connector", "language"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
Parallel = Literal["ddp", "fsdp2", "zero2", "zero3"]
Features = Literal["compute", "bfloat16", "float8"]
Sight = Literal["image", "nothing", "description"]
Format = Literal["llava", "parquet", "huggingface", "webdataset", "captions", "coco", "scienceqa", "mixture"]
Baseline = Literal["blind", "oracle"]
SIGHT: dict[Baseline, Sight] = {"blind": "nothing", "oracle": "description"}


def at_least(least: float, *, below: float = math.inf) -> dict[str, float]:
    """A field's metadata: numbers (in a list, tuple or mapping, each) are refused unless least <= number < below."""
    return {"least": least, "below": below}


ADDED = {"added": True}
"""Metadata of a field that came after runs were published: at its default it is no part of their hash."""


class Template(StrEnum):
    plain = "plain"  # LLaVA's stage 1: the human text is dropped
    vicuna_v1 = "vicuna_v1"
    chat = "chat"  # the tokenizer's own


@dataclass
class EncoderConfig:
    """A vision encoder: a hub id, a directory, `world:NAME`, or a transformers config with random weights."""

    name: str | None = None
    config: dict[str, Any] | None = None
    layer: int | Literal["last_hidden_state"] = -2  # index into its hidden states, or the last one behind its norm
    image_size: int | None = field(default=None, metadata=at_least(1))  # pixels a side; None: the checkpoint's own


@dataclass
class ConnectorConfig:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    lr: float | None = field(default=None, metadata=at_least(0))  # its own in all stages; None: the stages' `connector`
    plugin: str | None = None  # SHA-256 of the plugin file that registers it; filled in when the run is resolved


@dataclass
class LLMConfig:
    """A causal language model, named as an encoder is. `tokenizer` is needed where `config` is given."""

    name: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None  # None: the one beside the model
    attention: Attention | None = None  # None: transformers' choice


@dataclass
class DataConfig:
    """A data set of any format of docs/data.md: LLaVA JSON and its image folder, `world:NAME`, and so on."""

    path: str
    images: str | None = None  # a folder or URL; None: `images/` beside the file
    template: Template = Template.vicuna_v1
    image_mode: Literal["square", "pad", "native"] = "pad"  # centre crop, square with the mean colour, or as it is
    limit: int | None = field(default=None, metadata=at_least(1))  # only the first so many records
    max_length: int = field(default=2048, metadata=at_least(1))  # tokens, visual ones included
    format: Format | None = field(default=None, metadata=ADDED)  # None: told from the path


@dataclass
class LoRAConfig:
    """Low-rank adapters beside the LLM's frozen weights, trained at the stage's rate for `language`.

    The defaults are LLaVA-1.5's (github.com/haotian-liu/LLaVA, scripts/v1_5/finetune_lora.sh).
    """

    rank: int = field(default=128, metadata=at_least(1))
    alpha: float = field(default=256, metadata=at_least(0))  # the update is scaled by alpha / rank
    dropout: float = field(default=0.05, metadata=at_least(0, below=1))
    targets: list[str] | Literal["all-linear"] = "all-linear"  # patterns; or all linear layers but the LLM's head
    quantize: Literal["nf4", "int8"] | None = None  # how the frozen weights are held meanwhile; None: as loaded


@dataclass
class StageConfig:
    """One stage of training. Parts without a learning rate are frozen."""

    data: DataConfig
    lr: dict[Part, float] = field(metadata=at_least(0))
    batch_size: int = field(default=32, metadata=at_least(1))
    micro_batch_size: int | None = field(default=None, metadata=at_least(1))  # None: the whole batch at once
    steps: int | None = field(default=None, metadata=at_least(0))
    epochs: float | None = field(default=None, metadata=at_least(0))  # instead of steps; 0 of either skips the stage
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = field(default=0.03, metadata=at_least(0))
    weight_decay: float = field(default=0.0, metadata=at_least(0))
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=at_least(0, below=1))
    clip: float | None = field(default=1.0, metadata=at_least(0))  # largest gradient norm
    gradient_checkpointing: bool = False
    compile: bool = field(default=False, metadata=ADDED)  # the LLM's layers, by torch.compile
    packing: bool = field(default=False, metadata=ADDED)  # the LLM computes no padding; samples see only themselves
    group_by: Literal["length", "modality_length"] | None = field(default=None, metadata=ADDED)  # into equal batches
    only: dict[Part, list[str]] | None = field(default=None, metadata=ADDED)  # patterns of a part's parameters to train
    lora: LoRAConfig | None = field(default=None, metadata=ADDED)  # adapters instead of the LLM's own weights


@dataclass
class EvaluationConfig:
    data: DataConfig
    batch_size: int = field(default=64, metadata=at_least(1))
    max_new_tokens: int = field(default=16, metadata=at_least(1))
    shuffled: int = field(default=0, metadata=at_least(0))  # so many questions are asked again with another's image


@dataclass
class SeedConfig:
    """Initialisation, data order and dropout are seeded apart."""

    init: int = field(default=0, metadata=at_least(0, below=2**63))
    data: int = field(default=0, metadata=at_least(0, below=2**63))
    dropout: int = field(default=0, metadata=at_least(0, below=2**63))


@dataclass
class RunConfig:
    """Everything that decides what a run computes; its hash names the trial."""

    encoder: EncoderConfig
    connector: ConnectorConfig
    llm: LLMConfig
    stages: dict[str, StageConfig]
    evaluation: dict[str, EvaluationConfig] = field(default_factory=dict)
    seed: SeedConfig = field(default_factory=SeedConfig)
    sees: Sight = "image"  # what the LLM is given in the place of each image: a baseline sees none
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = field(default=200, metadata=at_least(1))  # steps
    threads: int | None = field(default=None, metadata=at_least(1))  # CPU threads; None: torch's choice
    features: Features = field(default="compute", metadata=ADDED)  # how they are cached: in `dtype`, or narrower
    parallel: Parallel = field(default="ddp", metadata=ADDED)  # how several processes share the work


@dataclass
class SweepConfig:
    """A run, and what is varied over it: every combination is a trial."""

    run: RunConfig
    connectors: list[ConnectorConfig]
    seeds: list[int] = field(metadata=at_least(0, below=2**63))
    encoders: list[EncoderConfig] = field(default_factory=list)  # empty: the run's own
    llms: list[LLMConfig] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list, metadata=at_least(0))  # of connectors; empty: their own
    baselines: list[Baseline] = field(default_factory=list)  # trained beside the connectors, once an LLM and seed

    def trials(self) -> list[RunConfig]:
        """Every combination as a run, seed by seed, so that an early table already compares all connectors."""
        runs = []
        for seed in self.seeds:
            seeded = dataclasses.replace(self.run, seed=SeedConfig(seed, seed, seed))
            llms = self.llms or [self.run.llm]
            runs += [
                own_rate(dataclasses.replace(seeded, encoder=encoder, llm=llm, connector=connector))
                for encoder in self.encoders or [self.run.encoder]
                for llm in llms
                for connector in self.candidates()
            ]
            blank = dataclasses.replace(seeded, encoder=(self.encoders or [self.run.encoder])[0])
            runs += [baseline(dataclasses.replace(blank, llm=llm), name) for llm in llms for name in self.baselines]
        return runs

    def candidates(self) -> list[ConnectorConfig]:
        """The connectors, each with every learning rate where the study varies them."""
        if not self.lrs:
            return self.connectors
        return [dataclasses.replace(connector, lr=lr) for connector in self.connectors for lr in self.lrs]


def own_rate(run: RunConfig) -> RunConfig:
    """The run with its connector's own learning rate, where it has one, in every stage that trains connectors."""
    if run.connector.lr is None:
        return run
    rate = {"connector": run.connector.lr}
    stages = {
        key: dataclasses.replace(stage, lr=stage.lr | (rate if "connector" in stage.lr else {}))
        for key, stage in run.stages.items()
    }
    return dataclasses.replace(run, stages=stages)


def baseline(run: RunConfig, name: Baseline) -> RunConfig:
    """The run of an arm that gets nothing, or a description, instead of images: the same data, steps and seeds.

    Only the LLM is trained, in the stages that train it: no image reaches the connector, which is always a `linear`
    one, so that a study's connectors don't change its baselines.
    """
    stages = {
        key: dataclasses.replace(stage, lr=_language(stage.lr), only=_language(stage.only or {}) or None)
        for key, stage in run.stages.items()
        if "language" in stage.lr
    }
    evaluation = {task: dataclasses.replace(config, shuffled=0) for task, config in run.evaluation.items()}
    linear = ConnectorConfig("linear")
    return dataclasses.replace(run, connector=linear, stages=stages, evaluation=evaluation, sees=SIGHT[name])


def _language(parts: Mapping[Part, T]) -> dict[Part, T]:
    return {part: value for part, value in parts.items() if part == "language"}


def parse(kind: type[T], values: object, where: str = "") -> T:
    """A dataclass (or list, dict, scalar) of type `kind` from plain YAML values. A string where a dataclass with a
    `name` or `path` is expected stands for that alone: `connector: mlp`.

    Raises:
        ValueError: an unknown key, a missing one, or a value of another type, with its dotted place.
    """
    return _parse(kind, values, where)


def _parse(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain(value, where)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        if any(get_origin(kind) is Literal and value in get_args(kind) for kind in arguments):
            return value
        return _parse(next(kind for kind in arguments if kind is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    if origin is Literal:
        if value not in arguments:
            raise unknown(f"value of {where}:", value, arguments)
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(where, "a mapping", value)
        keys, values = arguments
        return {_parse(keys, key, where): _parse(values, item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        return [_parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise _mismatch(where, f"{len(arguments)} values", value)
        return tuple(_parse(kind, item, where) for kind, item in zip(arguments, value, strict=True))
    return _parse_scalar(kind, value, where)


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    fields = {item.name: item for item in dataclasses.fields(kind)}
    if isinstance(value, str) and (short := next((key for key in ("name", "path") if key in fields), None)):
        value = {short: value}
    if not isinstance(value, Mapping):
        raise _mismatch(where or kind.__name__, "a mapping", value)
    for key in value:
        if key not in fields:
            raise unknown(f"key {_join(where, str(key))!r}:", key, fields)
    hints = get_type_hints(kind)
    given = {key: _parse(hints[key], item, _join(where, key)) for key, item in value.items()}
    for key, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and key not in given:
            raise ValueError(f"key {_join(where, key)!r} is missing; {kind.__name__} needs it")
    for key, value in given.items():
        limits = fields[key].metadata
        if "least" in limits:
            _check_limits(value, limits["least"], limits["below"], _join(where, key))
    return kind(**given)


def _check_limits(value: Any, least: float, below: float, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_limits(item, least, below, _join(where, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_limits(item, least, below, f"{where}[{index}]")
    elif value is not None and not least <= value < below:
        raise _mismatch(where, f"at least {least}" + (f" and below {below}" if below < math.inf else ""), value)


def _plain(value: Any, where: str) -> Any:
    """A value of any type that can be hashed and written down again."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):  # a date, a set, .inf, .nan
        raise _mismatch(where, "a value that JSON can hold", value) from None
    return value


def _parse_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise _mismatch(where, "true or false", value)
        return value
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise unknown(f"value of {where}:", value, list(kind))
        return kind(value)
    if kind is str:
        if not isinstance(value, str):
            raise _mismatch(where, "a text", value)
        return value
    expected = "a whole number" if kind is int else "a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _mismatch(where, expected, value)
    try:
        number = kind(value)  # YAML reads 1e-3 as a string
    except (ValueError, OverflowError):
        raise _mismatch(where, expected, value) from None
    if (kind is int and isinstance(value, float) and number != value) or (kind is float and not math.isfinite(number)):
        raise _mismatch(where, expected, value)
    return number


def _mismatch(where: str, expected: str, value: object) -> ValueError:
    return ValueError(f"key {where!r}: expected {expected}, got {value!r}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def load(kind: type[T], path: Path, overrides: Iterable[str] = ()) -> T:
    """The dataclass in a YAML file, with `a.b=c` overrides applied first.

    Raises:
        ValueError: the file cannot be read or parsed, or holds what `parse` refuses; the message names the file.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    try:
        for override in overrides:
            values = _override(values, override)
        return parse(kind, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which the last would silently win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):  # other keys are refused as unhashable later
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def _override(values: Any, override: str) -> Any:
    key, value = assignment(override, "override", "stages.finetune.steps=100")
    *parents, last = key.split(".")
    place = values = {} if values is None else values
    for depth, parent in enumerate(parents):
        if isinstance(place, dict) and isinstance(place.get(parent), str):
            place[parent] = {"path" if parent == "data" else "name": place[parent]}  # `connector: mlp` is short
        if not isinstance(place, dict):
            raise ValueError(f"override {override!r}: {'.'.join(parents[:depth])!r} is no mapping")
        place = place.setdefault(parent, {})
    if not isinstance(place, dict):
        raise ValueError(f"override {override!r}: {'.'.join(parents)!r} is no mapping")
    place[last] = value
    return values


def assignment(text: str, what: str, example: str) -> tuple[str, Any]:
    """Key and value of a KEY=VALUE whose value is YAML.

    Raises:
        ValueError: it is none; the message calls it `what` and shows the example.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"{what} {text!r}: expected KEY=VALUE, such as {example}")
    try:
        return key, yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {text!r}: not valid YAML ({' '.join(str(error).split())})") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values with every default written out, as `parse` reads them back."""
    plain = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
    assert isinstance(plain, dict)
    return plain


def dump(config: Any) -> str:
    """The configuration as YAML, every default written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that change with any value of the configuration."""
    text = json.dumps(_hashed(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _hashed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        given = {item: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {
            item.name: _hashed(held)
            for item, held in given.items()
            if not (item.metadata.get("added") and held == item.default)
        }
    if isinstance(value, Mapping):
        return {key: _hashed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hashed(item) for item in value]
    return value
