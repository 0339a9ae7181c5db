"""Records -> samples: ids with every image's slots laid out, and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from vlmzoo.config import Template
from vlmzoo.connector import ImageLayout
from vlmzoo.data.images import ImageFile
from vlmzoo.data.records import IMAGE_TOKEN, Record, RecordError
from vlmzoo.data.templates import Rendered, Renderer, instruction_texts, special_tokens
from vlmzoo.data.tokens import Tokenised, tokenise

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Sample:
    """A record as the model reads it."""

    input_ids: list[int]
    labels: list[int]  # IGNORE where there is no target
    images: tuple[ImageFile, ...]
    layouts: tuple[ImageLayout, ...]  # one an image
    instruction_ids: tuple[list[int], ...]  # one an image where the connector reads the instruction, else none
    record: Record


@dataclass(frozen=True)
class SampleBuilder:
    """Builds samples for one model and one template.

    Args:
        tokenizer: a fast one, with `<image>` as a special token.
        num_tokens: the slots that an image takes, from its layout.
        layout: of an image file; its second argument names the record in messages.
        max_length: tokens of a sample, visual ones included; text beyond it is cut.
        instruction: whether the connector reads the instruction.

    Raises:
        ValueError: the tokenizer lacks what the template needs.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    num_tokens: Callable[[ImageLayout], int]
    layout: Callable[[ImageFile, str], ImageLayout]
    template: Template
    max_length: int
    instruction: bool = False

    def __post_init__(self) -> None:
        name = f"tokenizer {self.tokenizer.name_or_path or type(self.tokenizer).__name__}"
        if not self.tokenizer.is_fast:
            raise ValueError(f"{name} gives no character offsets; expected a fast tokenizer (tokenizer.json)")
        if (found := special_tokens(self.tokenizer).get(IMAGE_TOKEN)) != self.image_token_id:
            raise ValueError(f"{name}: {IMAGE_TOKEN} has id {found}, the model expects {self.image_token_id}")
        if self.tokenizer.pad_token_id is None:
            raise ValueError(f"{name} has no pad token; set its pad_token")
        if self.template is Template.vicuna_v1 and self.tokenizer.eos_token is None:
            raise ValueError(f"{name} has no EOS to end an answer of template vicuna_v1 with; set its eos_token")
        if self.template is Template.chat and not self.tokenizer.chat_template:
            raise ValueError(f"{name} has no chat template; set its chat_template, or use template vicuna_v1")

    def build(self, records: Sequence[Record], *, generation: bool = False) -> list[Sample]:
        """The records' samples; for generation, their prompts without the last answer.

        Raises:
            RecordError: what `tokens` and `assemble` raise.
        """
        return self.assemble(records, self.tokens(records, generation=generation), generation=generation)

    def tokens(self, records: Sequence[Record], *, generation: bool = False) -> list[Tokenised]:
        """The records' conversations, with one `<image>` an image, and the instructions that their connector reads.

        Raises:
            RecordError: a conversation that the template cannot express.
        """
        rendered = [self._render(record, generation) for record in records]
        found = tokenise(rendered, self.tokenizer)
        if not self.instruction:
            return found
        return [
            replace(tokens, instruction_ids=self._instructions(record))
            for record, tokens in zip(records, found, strict=True)
        ]

    def assemble(
        self, records: Sequence[Record], tokens: Sequence[Tokenised], *, generation: bool = False
    ) -> list[Sample]:
        """Samples of these records with the slots of their images laid out.

        Raises:
            RecordError: an image or all targets beyond `max_length`, a prompt longer than that, no target at all.
        """
        return [self._sample(record, found, generation) for record, found in zip(records, tokens, strict=True)]

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.template, self.tokenizer)

    def _render(self, record: Record, generation: bool) -> Rendered:
        try:
            return self._renderer.render(record.turns, generation=generation)
        except ValueError as error:
            raise RecordError(f"{record.where}: {error}", "template") from None

    def _sample(self, record: Record, tokens: Tokenised, generation: bool) -> Sample:
        layouts = tuple(self.layout(path, record.where) for path in record.images)
        if (placed := tokens.input_ids.count(self.image_token_id)) != len(layouts):
            raise RecordError(
                f"{record.where}: its text has {placed} {IMAGE_TOKEN} for {len(layouts)} images", "image-count"
            )
        ids = list(tokens.input_ids)
        labels = [token if target else IGNORE for token, target in zip(ids, tokens.supervised, strict=True)]
        images_end = 0
        for layout in layouts:
            place, count = ids.index(self.image_token_id, images_end), self.num_tokens(layout)
            ids[place : place + 1] = [self.image_token_id] * count
            labels[place : place + 1] = labels[place : place + 1] * count
            images_end = place + count
        self._check_length(record, len(ids), images_end, generation)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if not generation and labels.count(IGNORE) == len(labels):
            raise RecordError(
                f"{record.where}: no target within {self.max_length} tokens; shorten it or raise max_length",
                "no-target",
            )
        return Sample(ids, labels, record.images, layouts, tokens.instruction_ids, record)

    def _check_length(self, record: Record, length: int, images_end: int, generation: bool) -> None:
        if images_end > self.max_length:
            raise RecordError(
                f"{record.where}: its images end at token {images_end}, beyond max_length {self.max_length}",
                "images-cut",
            )
        if generation and length > self.max_length:
            raise RecordError(f"{record.where}: its prompt has {length} tokens, more than max_length {self.max_length}")

    def _instructions(self, record: Record) -> tuple[list[int], ...]:
        texts = instruction_texts(record.turns, self.template)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
