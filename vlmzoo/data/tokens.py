"""Rendered conversations -> token ids and which of them are targets, by the spans of the answers in the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from vlmzoo.config import Template
from vlmzoo.data.records import Turn
from vlmzoo.data.templates import Rendered, Renderer, Span, special_tokens

BEYOND = (math.inf, math.inf)  # a target that no token reaches


@dataclass(frozen=True)
class Tokenised:
    input_ids: list[int]
    supervised: list[bool]
    instruction_ids: tuple[list[int], ...] = ()  # one an image where the connector reads the instruction


def tokenise(conversations: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[Tokenised]:
    """The ids of every conversation, with one `<image>` an image, and which of them are supervised.

    Each text is tokenised once, as a whole; a token is supervised if it shares a character with a target.
    """
    texts = [conversation.text for conversation in conversations]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special, begin = set(special_tokens(tokenizer).values()), _begin(tokenizer)
    found = []
    for conversation, ids, offsets in zip(conversations, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        supervised = _supervised(ids, offsets, conversation.targets, special)
        if ids[: len(begin)] == begin:  # a chat template may have written it
            found.append(Tokenised(ids, supervised))
        else:
            found.append(Tokenised([*begin, *ids], [False] * len(begin) + supervised))
    return found


def _supervised(ids: list[int], offsets: list[Span], spans: Sequence[Span], special: set[int]) -> list[bool]:
    targets = iter((*spans, BEYOND))
    target_start, target_end = next(targets)
    supervised, previous = [], 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start == end:
            start = previous  # byte-level tokenizers trim the space that such a token is
        while target_end <= start:
            target_start, target_end = next(targets)
        # A special token that begins before a target only swallowed the space there.
        begins_before = start < target_start and token in special
        supervised.append(start < target_end and end > target_start and not begins_before)
        previous = end
    return supervised


@lru_cache(maxsize=4)  # a tokenizer is asked for every record
def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer begins every text with: its BOS, or nothing."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def stop_token_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the EOS, and what a chat template writes after an answer."""
    stops = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    if template is Template.chat:
        rendered = Renderer(template, tokenizer).render((Turn("human", "question"), Turn("gpt", "answer")))
        answered = rendered.text[: rendered.targets[-1][1]]
        stops |= {index for token, index in special_tokens(tokenizer).items() if answered.endswith(token)}
    return sorted(stops)
