"""What is looked at: a data set, and how one model reads it, from a run's YAML or from names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from PIL import Image

from vlmzoo import build
from vlmzoo.config import ConnectorConfig, DataConfig, EncoderConfig, LLMConfig, RunConfig, Sight, load
from vlmzoo.connector import ImageLayout
from vlmzoo.data.samples import SampleBuilder
from vlmzoo.data.sources.llava import LlavaFile
from vlmzoo.data.sources.source import Source
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
from vlmzoo.processor import Layouts, VisionLanguageProcessor
from vlmzoo.registry import unknown


@dataclass(frozen=True)
class Subject:
    """A data set as one model reads it."""

    name: str  # of the stage or evaluation, or the data set's path
    data: DataConfig
    builder: SampleBuilder | None = None  # None: no tokenizer is named, and no token counted
    processor: VisionLanguageProcessor | None = None  # None: no encoder is named, and an image is one token
    sees: Sight = "image"

    @property
    def file(self) -> Path:
        """Its LLaVA JSON or JSON lines.

        Raises:
            ValueError: it is none, or not on this machine.
        """
        file = Path(self.data.path).expanduser()
        if file.suffix not in (".json", ".jsonl") or not file.is_file():
            raise ValueError(f"expected a LLaVA JSON or JSONL file, got {self.data.path}")
        return file

    @property
    def image_folder(self) -> Path:
        """Where its images are."""
        return Path(self.data.images).expanduser() if self.data.images else self.file.parent / "images"

    def source(self) -> Source:
        """Its records, each read when it is asked for."""
        return build.source(self.data)

    def file_records(self) -> LlavaFile:
        """Its records as they stand in its file; raises as `file` does."""
        return LlavaFile(self.file, str(self.image_folder), build.cache_folder() / "indexes")


def is_run(path: str) -> bool:
    """Whether a path names a run's YAML, and no data set: one of several data sets has `sources`, and no stages."""
    if not path.endswith((".yaml", ".yml")):
        return False
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # `load` says what is wrong with it
        return True
    return not (isinstance(values, dict) and "sources" in values)


def of_run(file: Path, overrides: Sequence[str] = (), stage: str | None = None) -> list[Subject]:
    """The data of a run's stages and evaluations, or of one, with the run's own tokenizer, template and visual tokens.

    Args:
        stage: a stage's name, or `evaluation.NAME`.

    Raises:
        ValueError: what `load` refuses, a stage that is not there, parts that do not fit one another.
    """
    run = build.resolve(load(RunConfig, file, overrides))
    found = {name: stage.data for name, stage in run.stages.items()}
    found |= {f"evaluation.{name}": task.data for name, task in run.evaluation.items()}
    if stage is not None and stage not in found:
        raise unknown("stage", stage, found)
    processor = _processor(run.encoder, run.connector, run.llm)
    return [
        Subject(name, data, processor.sample_builder(data), processor, run.sees)
        for name, data in found.items()
        if stage in (None, name)
    ]


def of_data(
    data: DataConfig, llm: str | None = None, encoder: str | None = None, connector: str = "mlp"
) -> list[Subject]:
    """One data set: alone, with an LLM's tokenizer, or with an encoder and a connector too.

    Raises:
        ValueError: an encoder without an LLM, a name that is not known, parts that do not fit one another.
    """
    if encoder is not None and llm is None:
        raise ValueError("--encoder: expected --llm with it, whose tokens an image becomes")
    if llm is None:
        return [Subject(data.path, data)]
    if encoder is not None:
        processor = _processor(EncoderConfig(encoder), ConnectorConfig(connector), LLMConfig(llm))
        return [Subject(data.path, data, processor.sample_builder(data), processor)]
    tokenizer = build.tokenizer(LLMConfig(llm))
    one = ImageLayout(((1, 1),))
    builder = SampleBuilder(
        tokenizer=tokenizer,
        image_token_id=build.image_token_id(tokenizer),
        num_tokens=lambda layout: 1,
        layout=lambda image, where: one,
        template=data.template,
        max_length=data.max_length,
    )
    return [Subject(data.path, data, builder)]


def _processor(encoder: EncoderConfig, connector: ConnectorConfig, llm: LLMConfig) -> VisionLanguageProcessor:
    """The processor of a run's model, from configurations alone: no weights are read."""
    options = build.connector_options(connector)
    with torch.device("meta"), build.quiet_transformers():
        tower, language = build.vision(encoder, weights=False), build.language(llm, weights=False)
        tokenizer = build.tokenizer(llm, build.text_spec(language.config).vocab_size)
        config = VisionLanguageConfig(
            tower.config,
            language.config,
            connector=connector.name,
            connector_options=options,
            plugin=build.plugin_of(connector.name),
            vision_layer=encoder.layer,
            image_size=encoder.image_size,
            image_token_id=build.image_token_id(tokenizer),
        )
        model = VisionLanguageModel(config, vision=tower, language=language)
    return VisionLanguageProcessor(build.image_processor(encoder), tokenizer, Layouts.of(model))


def wrong_suffix(name: str, image: Image.Image) -> str | None:
    """The suffix that the image's content asks for; None: its name has it, or says nothing."""
    formats = Image.registered_extensions()
    said, found = formats.get(Path(name).suffix.lower()), image.format
    if found is None or said in (None, found) or (said, found) == ("JPEG", "MPO"):  # a JPEG with more behind it
        return None
    return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(found) or next(
        (suffix for suffix, kind in formats.items() if kind == found), None
    )
