"""Greedy answers of a model to the questions of a data set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from vlmzoo.config import Template
from vlmzoo.data.samples import Sample
from vlmzoo.data.tokens import stop_token_ids
from vlmzoo.evaluation.metrics import Prediction, exact_match
from vlmzoo.files import write_whole

WHOLE = "all"
"""The capability of records that name none."""


class Generator(Protocol):
    """What is evaluated: a VisionLanguageModel, or anything that answers as it does."""

    def eval(self) -> Any: ...

    def generate(self, **inputs: Any) -> Tensor:
        """(batch, prompt + new tokens)"""
        ...


def evaluate(
    model: Generator,
    samples: Sequence[Sample],
    batch_of: Callable[[Sequence[Sample]], Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    batch_size: int,
    max_new_tokens: int,
) -> list[Prediction]:
    """A prediction a sample, in order; the same for every batch size. The model is left in eval mode.

    Args:
        samples: built for generation; each record's last answer is what is expected.
        batch_of: the model's inputs for some samples, padded on the left, with pixels or features of their images.
        template: of the samples; an answer ends at the EOS or where the template ends one.

    Raises:
        ValueError: a batch that is not padded on the left.
    """
    model.eval()
    stops = stop_token_ids(template, tokenizer)
    predictions = []
    for start in tqdm(range(0, len(samples), batch_size), desc="evaluate", unit="batch", disable=None):
        chunk = samples[start : start + batch_size]
        inputs = {key: value for key, value in batch_of(chunk).items() if key != "labels"}
        if not inputs["attention_mask"][:, -1].all():
            raise ValueError(
                "prompts are padded on the right; expected padding on the left, so that answers follow them"
            )
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        predictions += [_prediction(sample, answer.strip()) for sample, answer in zip(chunk, answers, strict=True)]
    return predictions


def _prediction(sample: Sample, answer: str) -> Prediction:
    *_, question, expected = sample.record.turns
    return Prediction(
        id=sample.record.id,
        prompt=question.text,
        answer=answer,
        expected=expected.text,
        score=exact_match(answer, expected.text),
        capability=sample.record.capability or WHOLE,
    )


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Writes a line of JSON a prediction; the file is there whole or not at all."""
    lines = [json.dumps(dataclasses.asdict(prediction), ensure_ascii=False) for prediction in predictions]
    write_whole(path, "".join(f"{line}\n" for line in lines))
