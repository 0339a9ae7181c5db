"""From a study to its trials: each a directory named by the hash of its resolved configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmzoo.config import SIGHT, ConnectorConfig, EncoderConfig, LLMConfig, RunConfig, SweepConfig, config_hash, to_dict


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, with names that tell its parts from the others of the study."""

    run: RunConfig
    folder: Path
    connector: str
    encoder: str
    llm: str

    @property
    def hash(self) -> str:
        return self.folder.name

    @property
    def is_baseline(self) -> bool:
        """Whether it is trained without images: an arm to compare connectors with."""
        return self.run.sees != "image"

    @property
    def seed(self) -> int:
        return self.run.seed.init

    @property
    def title(self) -> str:
        parts = [self.connector, self.llm] if self.is_baseline else [self.connector, self.encoder, self.llm]
        return f"{', '.join(parts)}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """Its result.json; None: not done."""
        return read_result(self.folder, self.hash)


def read_result(folder: Path, config_hash: str) -> dict[str, Any] | None:
    """The result.json of a run that ended with exactly this configuration; None: not done."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if isinstance(result, dict) and result.get("config_hash") == config_hash else None


def resolve(study: SweepConfig) -> SweepConfig:
    """The study with every option of its connectors written out, so that a changed default changes the trials."""
    from vlmzoo import build  # imports torch

    runs = [build.resolve(dataclasses.replace(study.run, connector=connector)) for connector in study.connectors]
    own = build.resolve(dataclasses.replace(study.run, connector=dataclasses.replace(study.run.connector, lr=None)))
    return dataclasses.replace(study, run=own, connectors=[run.connector for run in runs])


def plan(study: SweepConfig, out: Path) -> list[Trial]:
    """The trials of a resolved study, in the order in which they run.

    Raises:
        ValueError: nothing to run, or something is there twice.
    """
    if not study.connectors or not study.seeds:
        raise ValueError("a study needs at least one entry in 'connectors' and one in 'seeds'")
    connectors = labels(study.candidates())
    baselines = {sees: name for name, sees in SIGHT.items()}
    encoders = labels(study.encoders or [study.run.encoder])
    llms = labels(study.llms or [study.run.llm])
    trials: dict[str, Trial] = {}
    for run in study.trials():
        name = config_hash(run)
        connector = baselines[run.sees] if run.sees in baselines else connectors[_key(run.connector)]
        parts = connector, encoders[_key(run.encoder)], llms[_key(run.llm)]
        trial = Trial(run, out / "trials" / name, *parts)
        if name in trials:
            raise ValueError(f"the study holds one trial twice: {trial.title}")
        trials[name] = trial
    return list(trials.values())


def labels(parts: Sequence[ConnectorConfig] | Sequence[EncoderConfig] | Sequence[LLMConfig]) -> dict[str, str]:
    """A name for each part, by its hash; parts of one name also get the values in which they differ."""
    settings = {_key(part): dict(_flat(to_dict(part))) for part in parts}
    names = {_key(part): part.name or str(_model_type(part)) for part in parts}
    result = {}
    for key, name in names.items():
        rivals = [settings[other] for other in names if names[other] == name]
        differing = [
            f"{setting.rpartition('.')[2]}={value}"
            for setting, value in settings[key].items()
            if any(rival.get(setting) != value for rival in rivals)
        ]
        result[key] = f"{name} ({', '.join(differing)})" if differing else name
    return result


def _key(part: ConnectorConfig | EncoderConfig | LLMConfig) -> str:
    return config_hash(part)


def _model_type(part: ConnectorConfig | EncoderConfig | LLMConfig) -> str:
    config = getattr(part, "config", None) or {}
    return str(config.get("model_type", "unnamed"))


def _flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        return [(prefix, values)]
    return [item for key, value in values.items() for item in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
