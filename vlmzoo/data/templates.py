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


class Renderer:
    """Conversations in one template -> the text that the LLM reads, without the tokenizer's own BOS.

    What it needs of the tokenizer is read once, here, because every record asks for it.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template, self._tokenizer = template, tokenizer
        special = special_tokens(tokenizer)
        self._markers = tuple(special)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._marked = bool(GENERATION.search(str(tokenizer.chat_template)))
        self._options: dict[str, Any] = {**tokenizer.special_tokens_map, **NO_THOUGHTS}

    def render(self, turns: Sequence[Turn], *, generation: bool = False) -> Rendered:
        """One conversation. Texts are data: one that holds a special token, such as `</s>`, is refused.

        Args:
            generation: leave the last answer out and end with the prompt for it. There are no targets then.

        Raises:
            ValueError: turns that the template cannot express, or that hold a special token.
        """
        self._refuse_special_tokens(turns)
        if generation and turns[-1].role == "gpt":
            turns = turns[:-1]
        if self._template is Template.plain:
            return _plain(turns, generation)
        turns = [Turn(turn.role, _images_first(turn.text)) for turn in turns]
        if self._template is Template.vicuna_v1:
            return _vicuna(turns, str(self._tokenizer.eos_token), generation)
        if generation:
            return Rendered(self._apply(turns, prompt=True), ())
        return self._by_marks(turns) if self._marked else self._by_prompts(turns)

    def _refuse_special_tokens(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            text = turn.text.replace(IMAGE_TOKEN, "") if turn.role == "human" else turn.text
            if found := self._special.search(text):
                raise ValueError(
                    f"a {turn.role} turn holds {found[0]!r}, a special token of the tokenizer: take it out"
                )

    def _by_marks(self, turns: Sequence[Turn]) -> Rendered:
        """The conversation in a template with `{% generation %}`, which says in one pass what is generated."""
        chat: Any = [_messages(turns)]
        with _refusals():
            found: Any = render_jinja_template(
                chat,
                chat_template=str(self._tokenizer.chat_template),
                return_assistant_tokens_mask=True,
                **self._options,
            )
        (text,), (spans,) = found
        targets = [(int(start), int(start) + len(self._until_end(text[start:end]))) for start, end in spans]
        answers = [(index, turn) for index, turn in enumerate(turns) if turn.role == "gpt"]
        if len(targets) != len(answers):
            raise ValueError(f"the chat template marks {len(targets)} answers as generated, expected {len(answers)}")
        for (start, end), (index, turn) in zip(targets, answers, strict=True):
            _check_answer(text[start:end], index, turn)
        return Rendered(text, tuple(targets))

    def _by_prompts(self, turns: Sequence[Turn]) -> Rendered:
        """The conversation in any other template: an answer is what follows the prompt for it."""
        text, targets = self._apply(turns), []
        for index, turn in enumerate(turns):
            if turn.role == "human":
                continue
            start = self._apply(turns[:index], prompt=True)
            end = self._apply(turns[: index + 1])
            if not (text.startswith(end) and end.startswith(start)):
                raise ValueError(
                    f"the chat template is not prefix-stable: it writes turn {index} otherwise within the whole"
                )
            answer = end[len(start) :]
            _check_answer(answer, index, turn)
            targets.append((len(start), len(start) + len(self._until_end(answer))))
        return Rendered(text, tuple(targets))

    def _apply(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        options: dict[str, Any] = {"add_generation_prompt": prompt, **NO_THOUGHTS}
        with _refusals():
            return str(self._tokenizer.apply_chat_template(_messages(turns), tokenize=False, **options))

    def _until_end(self, answer: str) -> str:
        """The answer without the space that a template writes between its end marker and the next turn."""
        stripped = answer.rstrip()
        return stripped if stripped.endswith(self._markers) else answer


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


def _vicuna(turns: Sequence[Turn], eos_token: str, generation: bool) -> Rendered:
    """Source: Chiang et al., Vicuna (2023); `conv_vicuna_v1` in LLaVA's code."""
    text, targets = f"{VICUNA_SYSTEM} ", []
    for turn in turns:
        if turn.role == "human":
            text += f"USER: {turn.text} ASSISTANT:"
        else:
            start = len(text)  # the space is the answer's: a prompt to generate from ends with the colon
            text += f" {turn.text}{eos_token}"
            targets.append((start, len(text)))
    return Rendered(text, () if generation else tuple(targets))


def _check_answer(written: str, index: int, turn: Turn) -> None:
    if turn.text.strip() not in written:
        raise ValueError(f"the chat template changes the answer of turn {index}: {turn.text!r} to {written!r}")


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn.role], "content": turn.text} for turn in turns]


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation ({error})") from None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The texts that the tokenizer turns into special tokens wherever they stand, and their ids."""
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
