"""Conversations -> the text that the LLM reads, and the spans of it that are targets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from vlmzoo.config import Template
from vlmzoo.data.records import IMAGE_TOKEN, Turn

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CAPTION_INSTRUCTION = "A short image description:"
"""What connectors that read the instruction get with `plain`, whose human text is dropped. One of InstructBLIP's."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_THOUGHTS: dict[str, Any] = {"enable_thinking": False}
"""Templates of models that think take it; answers in the data come without thoughts."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as the LLM reads it."""

    text: str
    targets: tuple[Span, ...]  # what it shall say, end markers included; a prompt has none


def render(
    turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase, *, generation: bool = False
) -> Rendered:
    """The conversation's text in a template, without the tokenizer's own BOS.

    Texts are data: one that holds a special token of the tokenizer, such as `</s>`, is refused.

    Args:
        generation: leave the last answer out and end with the prompt for it. There are no targets then.

    Raises:
        ValueError: turns that the template cannot express, or that hold a special token.
    """
    _refuse_special_tokens(turns, tokenizer)
    if generation and turns[-1].role == "gpt":
        turns = turns[:-1]
    if template is Template.plain:
        return _plain(turns, generation)
    turns = [Turn(turn.role, _images_first(turn.text)) for turn in turns]
    if template is Template.vicuna_v1:
        return _vicuna(turns, tokenizer, generation)
    return _chat(turns, tokenizer, generation)


def _refuse_special_tokens(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> None:
    special = special_tokens(tokenizer)
    for turn in turns:
        text = turn.text.replace(IMAGE_TOKEN, "") if turn.role == "human" else turn.text
        if found := next((token for token in special if token in text), None):
            raise ValueError(f"a {turn.role} turn holds {found!r}, a special token of the tokenizer: take it out")


def instruction_texts(turns: Sequence[Turn], template: Template) -> list[str]:
    """For each image the human turn that holds its `<image>`, without it."""
    if template is Template.plain:
        return [CAPTION_INSTRUCTION for turn in turns for _ in range(turn.text.count(IMAGE_TOKEN))]
    return [turn.text.replace(IMAGE_TOKEN, "").strip() for turn in turns for _ in range(turn.text.count(IMAGE_TOKEN))]


def _images_first(text: str) -> str:
    num_images = text.count(IMAGE_TOKEN)
    if not num_images:
        return text
    return (f"{IMAGE_TOKEN}\n" * num_images + text.replace(IMAGE_TOKEN, "").strip()).strip()


def _plain(turns: Sequence[Turn], generation: bool) -> Rendered:
    """`<image>`, then the caption and a line break as the target; no EOS.

    Source: Liu et al., Visual Instruction Tuning (2023), section 4.2; `preprocess_plain` in LLaVA's code.
    """
    images = IMAGE_TOKEN * turns[0].text.count(IMAGE_TOKEN)
    if not images or len(turns) != (1 if generation else 2):
        raise ValueError(
            f"template plain takes one human turn with {IMAGE_TOKEN} and one answer, got {len(turns)} turns"
        )
    if generation:
        return Rendered(images, ())
    text = f"{images}{turns[1].text}\n"
    return Rendered(text, ((len(images), len(text)),))


def _vicuna(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, generation: bool) -> Rendered:
    """Source: Chiang et al., Vicuna (2023); `conv_vicuna_v1` in LLaVA's code."""
    text, targets = f"{VICUNA_SYSTEM} ", []
    for turn in turns:
        if turn.role == "human":
            text += f"USER: {turn.text} ASSISTANT:"
        else:
            start = len(text)  # the space is the answer's: a prompt to generate from ends with the colon
            text += f" {turn.text}{tokenizer.eos_token}"
            targets.append((start, len(text)))
    return Rendered(text, () if generation else tuple(targets))


def _chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, generation: bool) -> Rendered:
    """The tokenizer's own template. An answer is what it marks as generated, or what follows the prompt for it."""
    if not generation and GENERATION.search(str(tokenizer.chat_template)):
        return _marked(turns, tokenizer)
    text = _apply(turns, tokenizer, generation)
    if generation:
        return Rendered(text, ())
    targets, markers = [], tuple(special_tokens(tokenizer))
    for index, turn in enumerate(turns):
        if turn.role == "human":
            continue
        start = _apply(turns[:index], tokenizer, True)
        end = _apply(turns[: index + 1], tokenizer, False)
        if not (text.startswith(end) and end.startswith(start)):
            raise ValueError(
                f"the chat template is not prefix-stable: it writes turn {index} otherwise within the whole"
            )
        answer = end[len(start) :]
        _check_answer(answer, index, turn)
        targets.append((len(start), len(start) + len(_until_end(answer, markers))))
    return Rendered(text, tuple(targets))


def _marked(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The conversation in a template with `{% generation %}`, which says in one pass what is generated."""
    options: Any = {"chat_template": tokenizer.chat_template, **tokenizer.special_tokens_map, **NO_THOUGHTS}
    with _refusals():
        found: Any = render_jinja_template([_messages(turns)], return_assistant_tokens_mask=True, **options)
    (text,), (spans,) = found
    markers = tuple(special_tokens(tokenizer))
    targets = [(int(start), int(start) + len(_until_end(text[start:end], markers))) for start, end in spans]
    answers = [(index, turn) for index, turn in enumerate(turns) if turn.role == "gpt"]
    if len(targets) != len(answers):
        raise ValueError(f"the chat template marks {len(targets)} answers as generated, expected {len(answers)}")
    for (start, end), (index, turn) in zip(targets, answers, strict=True):
        _check_answer(text[start:end], index, turn)
    return Rendered(text, tuple(targets))


def _check_answer(written: str, index: int, turn: Turn) -> None:
    if turn.text.strip() not in written:
        raise ValueError(f"the chat template changes the answer of turn {index}: {turn.text!r} to {written!r}")


def _apply(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, prompt: bool) -> str:
    options: dict[str, Any] = {"add_generation_prompt": prompt, **NO_THOUGHTS}
    with _refusals():
        return str(tokenizer.apply_chat_template(_messages(turns), tokenize=False, **options))


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn.role], "content": turn.text} for turn in turns]


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation ({error})") from None


def _until_end(answer: str, markers: tuple[str, ...]) -> str:
    """The answer without the space that a template writes between its end marker and the next turn."""
    stripped = answer.rstrip()
    return stripped if stripped.endswith(markers) else answer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The texts that the tokenizer turns into special tokens wherever they stand, and their ids."""
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
