"""Names and configurations -> parts. Nothing else touches a registry."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17's top level wants torchvision
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

import vlmzoo.language.decoders  # noqa: F401  # makes them known to AutoModelForCausalLM
from vlmzoo.config import ConnectorConfig, DataConfig, EncoderConfig, LLMConfig, RunConfig, own_rate
from vlmzoo.connector import Connector, TextSpec, TokenConnector, TokenConnectorAdapter, VisionSpec, connectors
from vlmzoo.data.records import LlavaRecords, Record
from vlmzoo.registry import unknown
from vlmzoo.vision.several import SeveralTowers
from vlmzoo.vision.towers import image_side, tower

IMAGE_TOKEN = "<image>"
ENTRY_POINTS = "vlmzoo.connectors"

_plugins: dict[str, dict[str, str]] = {}  # connector -> the plugin file that registered it
_loaded: set[str] = set()  # hashes of loaded plugin files, and "built in"


def load_connectors(plugins: Sequence[Path] = ()) -> None:
    """Registers the connectors of this repository, of installed packages, and of the plugin files.

    Raises:
        ValueError: a plugin that cannot be loaded, or registers nothing, or a name twice.
    """
    if "built in" not in _loaded:
        package = importlib.import_module("vlmzoo.connectors")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"vlmzoo.connectors.{module.name}")
        for entry in metadata.entry_points(group=ENTRY_POINTS):
            _load_entry(entry)
        _loaded.add("built in")
    for plugin in plugins:
        _load_plugin(Path(plugin))


def _load_entry(entry: metadata.EntryPoint) -> None:
    try:
        entry.load()
    except Exception as error:  # whatever somebody's package raises is reported as one line that names it
        package = entry.dist.name if entry.dist else entry.module
        raise ValueError(f"connector {entry.name!r} of the package {package}: {_reason(error)}") from error


def _load_plugin(file: Path) -> list[str]:
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"plugin {file}: cannot be read ({error.strerror})") from None
    if digest in _loaded:
        return [name for name, plugin in _plugins.items() if plugin["sha256"] == digest]
    before = set(connectors.names())
    module = f"vlmzoo_plugin_{digest[:12]}"
    spec = importlib.util.spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"plugin {file}: not a Python file")
    sys.modules[module] = loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except (Exception, SystemExit) as error:  # whatever a user's file raises is one line, with nothing left behind
        del sys.modules[module]
        connectors.remove(set(connectors.names()) - before)
        raise ValueError(f"plugin {file}: {_reason(error)}") from error
    names = sorted(set(connectors.names()) - before)
    if not names:
        raise ValueError(f"plugin {file}: registers no connector; decorate a class with @register(NAME)")
    _plugins.update({name: {"file": file.name, "sha256": digest} for name in names})
    _loaded.add(digest)
    return names


def connectors_of(file: Path) -> list[str]:
    """The names that a plugin file registers."""
    load_connectors()
    return _load_plugin(file)


def plugin_of(name: str) -> dict[str, str] | None:
    """The file name and SHA-256 of the plugin that registered a connector; None: no plugin did."""
    return _plugins.get(name)


def check_plugin(name: str, plugin: Mapping[str, str] | None) -> None:
    """Refuses a saved model whose connector came from a plugin that is not loaded."""
    load_connectors()
    if plugin is None:
        return
    if name not in connectors.names():
        raise ValueError(f"connector {name!r} comes from the plugin {plugin['file']}: pass --plugin {plugin['file']}")
    if plugin_of(name) != plugin:
        warnings.warn(f"connector {name!r}: {plugin['file']} is not the file that it was saved with", stacklevel=2)


def resolve(run: RunConfig) -> RunConfig:
    """The run with every option of its connector written out, and the hash of the plugin that it comes from.

    Raises:
        ValueError: an unknown connector or option, or a run that was resolved with another plugin file.
    """
    options = connector_options(run.connector)
    plugin = plugin_of(run.connector.name)
    digest = plugin["sha256"] if plugin else None
    if run.connector.plugin not in (None, digest):
        now = f"{plugin['file']} has {plugin['sha256'][:12]}" if plugin else "no plugin registers it now"
        raise ValueError(
            f"connector {run.connector.name!r}: the run expects a plugin of hash {run.connector.plugin[:12]}, {now}"
        )
    chosen = dataclasses.replace(run.connector, options=options, plugin=digest)
    return own_rate(dataclasses.replace(run, connector=chosen))


def connector_options(config: ConnectorConfig) -> dict[str, Any]:
    """A connector's options with every default written out."""
    load_connectors()
    return connectors.resolve(config.name, config.options)


def connector(
    name: str, options: Mapping[str, Any], *, vision: VisionSpec, text: TextSpec, seed: int | None = None
) -> Connector:
    """A new connector; with a seed, initialised from it and leaving torch's generator as it was.

    Raises:
        ValueError: an unknown name or option, or sizes that the connector refuses.
    """
    load_connectors()
    provided = {"vision_dim": vision.hidden_size, "text_dim": text.hidden_size, "vision": vision, "text": text}
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            part = connectors.create(name, options, provided)
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(f"connector {name!r} with {dict(options)}: {error}") from error
    return TokenConnectorAdapter(part) if isinstance(part, TokenConnector) else part


def text_spec(config: PreTrainedConfig) -> TextSpec:
    """What connectors may know of an LLM, read from its configuration."""
    config = config.get_text_config()
    norm = next((getattr(config, key) for key in ("rms_norm_eps", "layer_norm_eps") if hasattr(config, key)), 1e-5)
    return TextSpec(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        norm_eps=norm,
        intermediate_size=getattr(config, "intermediate_size", 4 * config.hidden_size),
        vocab_size=config.vocab_size,
    )


def vision(
    config: EncoderConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, weights: bool = True
) -> PreTrainedModel:
    """The vision tower: pretrained by name, or random from a configuration and a seed. Names joined by `+` are one.

    Args:
        weights: False: none are read, and they are random.
    """
    if config.config is not None:
        return _random(new_tower, config.config, "encoder", seed, dtype)
    if len(parts := _several(config)) > 1:
        return SeveralTowers.of(
            [vision(part, dtype=dtype, weights=weights) for part in parts], [image_processor(part) for part in parts]
        )
    source = _source(config.name, "encoder")
    whole = read(AutoConfig.from_pretrained, source, "encoder")
    part = getattr(whole, "vision_config", whole)
    if not weights:
        return new_tower(part, dtype=dtype)
    return _pretrained(tower(part).model, source, part, "encoder", dtype)


def _several(config: EncoderConfig) -> list[EncoderConfig]:
    """The encoders that a name such as `world:clip+world:siglip` names."""
    if config.name is None or Path(config.name).expanduser().is_dir():
        return [config]
    return [dataclasses.replace(config, name=name) for name in config.name.split("+")]


def new_tower(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A vision tower with random weights."""
    return tower(config).model._from_config(config, **options)


def language(
    config: LLMConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, weights: bool = True
) -> PreTrainedModel:
    """The causal LM: pretrained by name, or random from a configuration and a seed; `weights` as for `vision`."""
    options = {} if config.attention is None else {"attn_implementation": config.attention}
    if config.config is not None:
        return _random(AutoModelForCausalLM.from_config, config.config, "llm", seed, dtype, **options)
    source = _source(config.name, "llm")
    parts = read(AutoConfig.from_pretrained, source, "llm")
    if not weights:
        return AutoModelForCausalLM.from_config(parts, dtype=dtype, **options)
    return _pretrained(AutoModelForCausalLM, source, parts, "llm", dtype, **options)


def tokenizer(config: LLMConfig, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer with `<image>` as a special token, and a token to pad with (never seen: it is masked).

    Args:
        vocab_size: the LLM's, where it is known; `<image>` alone may lie beyond it.

    Raises:
        ValueError: no tokenizer there, or one without a token to pad with, or for another LLM.
    """
    found = read(_read_tokenizer, _source(config.tokenizer or config.name, "llm.tokenizer"), "tokenizer")
    name = f"tokenizer {config.tokenizer or config.name}"
    if IMAGE_TOKEN not in found.all_special_tokens:  # where it is a word already, it keeps its id
        found.add_special_tokens({"extra_special_tokens": [*found.extra_special_tokens, IMAGE_TOKEN]})
    if found.pad_token is None:
        found.pad_token = found.unk_token or found.eos_token
        if found.pad_token is None:
            raise ValueError(f"{name}: it has no pad, unk or eos token to pad with")
    if vocab_size is not None:
        token, index = max(
            ((token, index) for token, index in found.get_vocab().items() if token != IMAGE_TOKEN),
            key=lambda pair: pair[1],
        )
        if index >= vocab_size:
            raise ValueError(
                f"{name}: {token!r} has id {index}, beyond the LLM's vocabulary of {vocab_size}; they do not fit"
            )
    return found


def _read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer, of the class that it names itself where that adds nothing to its tokenizer.json.

    Beside a `qwen2` transformers 5.23 would otherwise cut any text as Qwen's own does, whatever tokenizer.json says.
    """
    named = get_tokenizer_config(source).get("tokenizer_class")
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(source)
    return AutoTokenizer.from_pretrained(source)


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<image>` in a tokenizer that `tokenizer` gave."""
    return tokenizer.get_vocab()[IMAGE_TOKEN]


def image_processor(config: EncoderConfig) -> Any:
    """The encoder's image processor: the one beside it (of several, the first one's), or CLIP's for random weights."""
    if config.config is not None:
        from transformers import CLIPImageProcessorPil  # torchvision is not needed

        size = config.image_size or image_side(AutoConfig.for_model(**config.config))
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    first, *_ = _several(config)
    source = _source(first.name, "encoder")
    found = read(AutoImageProcessor.from_pretrained, source, "image processor", backend="pil")
    if hasattr(found, "max_num_patches"):  # SigLIP 2's cuts patches itself; encoders here take pixels
        from transformers import SiglipImageProcessorPil

        return SiglipImageProcessorPil(
            **{name: getattr(found, name) for name in ("image_mean", "image_std", "resample")}
        )
    if hasattr(found, "data_config"):  # timm's names all that differently
        from PIL.Image import Resampling
        from transformers import CLIPImageProcessorPil

        values = found.data_config
        resample = Resampling[values["interpolation"].upper()]
        return CLIPImageProcessorPil(image_mean=values["mean"], image_std=values["std"], resample=resample)
    return found


def dataset(config: DataConfig) -> tuple[Path, Path]:
    """The JSON file and the image folder of a data set; `world:NAME` is drawn into a cache folder at first use.

    The world has no end: a limit says how many of its records are drawn.
    """
    if config.path.startswith("world:"):
        from vlmzoo import world
        from vlmzoo.world.datasets import write_dataset

        name = config.path.removeprefix("world:")
        if name not in world.DATASETS:
            raise unknown("world data set", name, world.DATASETS)
        file = write_dataset(name, cache_folder() / "world", config.limit or world.DATASETS[name], seed=0)
    else:
        file = Path(config.path).expanduser()
    return file, Path(config.images).expanduser() if config.images else file.parent / "images"


def source(config: DataConfig) -> Sequence[Record]:
    """The records of a data set, each read and checked when it is asked for."""
    return LlavaRecords(*dataset(config), config.limit)


def cache_folder() -> Path:
    """Where files stand that can be made again: $VLMZOO_CACHE, or `~/.cache/vlmzoo`."""
    return Path(os.environ.get("VLMZOO_CACHE") or "~/.cache/vlmzoo").expanduser()


def _source(name: str | None, where: str) -> str:
    if not name:
        raise ValueError(f"{where}: expected a hub id, a directory, world:NAME or a `config`")
    if name.startswith("world:"):
        from vlmzoo import world

        return str(world.path(name.removeprefix("world:")))
    path = Path(name).expanduser()
    if (path.is_absolute() or name.startswith((".", "~"))) and not path.is_dir():
        raise ValueError(f"{where}: no directory {name}")
    return str(path) if path.is_dir() else name


def read(reader: Any, source: str, what: str, **kwargs: Any) -> Any:
    """What a library's reader makes of a directory or hub id.

    Raises:
        ValueError: it cannot; one line that says `what` it should have been, and whether anything is there.
    """
    try:
        return reader(source, **kwargs)
    except (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError) as error:
        absent = isinstance(error, OSError) and not Path(source).is_dir()
        fault = "no directory here, and the hub gave nothing" if absent else "cannot be loaded"
        raise ValueError(f"{what} {source}: {fault} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """What a library or a plugin raised, in a line: its type where that says more than OSError or ValueError do."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without its reports, which our errors replace, and without its bars where there is no terminal."""
    said, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(said)
        if bars:
            logging.enable_progress_bar()


def _random(
    make: Callable[..., PreTrainedModel],
    values: Mapping[str, Any],
    what: str,
    seed: int,
    dtype: torch.dtype,
    **options: Any,
) -> PreTrainedModel:
    values = dict(values)
    if "model_type" not in values:
        raise ValueError(
            f"{what}.config: expected a transformers configuration with a model_type, got {sorted(values)}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return make(AutoConfig.for_model(**values), dtype=dtype, **options)
        except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"{what}.config: {_reason(error)}") from error


def _pretrained(
    model: Any, source: str, config: PreTrainedConfig, what: str, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # we refuse them ourselves, in one line
    with quiet_transformers():
        loaded, found = read(
            model.from_pretrained, source, what, config=config, dtype=dtype, output_loading_info=True, **options
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{what} {source}: {len(missing)} weights are missing, {missing[0]} first")
    if mismatched := sorted(found["mismatched_keys"]):
        raise ValueError(f"{what} {source}: weights do not fit its configuration, {mismatched[0]} first")
    return loaded
