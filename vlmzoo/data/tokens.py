"""Conversations -> token ids and which of them are targets, by the spans of the answers in the text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from vlmzoo.config import Template
from vlmzoo.data.records import IMAGE_TOKEN, Turn
from vlmzoo.data.templates import render, special_tokens

BEYOND = (math.inf, math.inf)  # a target that no token reaches


@dataclass(frozen=True)
class Tokenised:
    input_ids: list[int]
    supervised: list[bool]


def encode_conversation(
    turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase, *, generation: bool = False
) -> Tokenised:
    """The conversation's ids, with one `<image>` an image, and which of them are supervised.

    The text is tokenised once, as a whole; a token is supervised if it shares a character with a target. Texts are
    data: one that holds a special token of the tokenizer, such as `</s>`, is refused.

    Args:
        generation: leave the last answer out and end with the prompt for it. No token is supervised then.

    Raises:
        ValueError: turns that the template cannot express.
    """
    special = special_tokens(tokenizer)
    _refuse(special, turns)
    if generation and turns[-1].role == "gpt":
        turns = turns[:-1]
    rendered = render(turns, template, tokenizer, generation=generation)
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    special_ids = set(special.values())
    targets = iter((*rendered.targets, BEYOND))
    target_start, target_end = next(targets)
    supervised, previous = [], 0
    for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
        if start == end:
            start = previous  # byte-level tokenizers trim the space that such a token is
        while target_end <= start:
            target_start, target_end = next(targets)
        # A special token that begins before a target only swallowed the space there.
        begins_before = start < target_start and token in special_ids
        supervised.append(start < target_end and end > target_start and not begins_before)
        previous = end
    begin = _begin(tokenizer)
    if ids[:1] != begin:  # a chat template may have written it
        ids, supervised = [*begin, *ids], [False] * len(begin) + supervised
    return Tokenised(ids, supervised)


@lru_cache(maxsize=4)  # a tokenizer is asked for every record
def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer begins every text with: its BOS, or nothing."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _refuse(special: Iterable[str], turns: Sequence[Turn]) -> None:
    for turn in turns:
        text = turn.text.replace(IMAGE_TOKEN, "") if turn.role == "human" else turn.text
        if found := next((token for token in special if token in text), None):
            raise ValueError(f"a {turn.role} turn holds {found!r}, a special token of the tokenizer: take it out")


def stop_token_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the EOS, and what a chat template writes after an answer."""
    stops = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    if template is Template.chat:
        rendered = render((Turn("human", "question"), Turn("gpt", "answer")), template, tokenizer)
        answered = rendered.text[: rendered.targets[-1][1]]
        stops |= {index for token, index in special_tokens(tokenizer).items() if answered.endswith(token)}
    return sorted(stops)
