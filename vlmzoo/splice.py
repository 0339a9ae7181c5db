"""Where visual tokens go: from images to the slots of each sample, into the embeddings, out of the masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmzoo.connector import VisualTokens
from vlmzoo.kernels.splice import splice_rows


@dataclass
class VisualContext:
    """The images of one forward or one `generate` call, arranged by sample. Slots are positions of `<image>`."""

    tokens: Tensor  # (batch, slots, text_dim)
    filled: Tensor  # (batch, slots), False where an image gave fewer tokens than its slots, and in the padding
    image_of_slot: Tensor  # (batch, slots), index of the slot's image within its sample
    place_of_slot: Tensor  # (batch, slots), index of the slot within its image's
    num_slots: Tensor  # (batch,)
    additions: dict[int, Tensor] = field(default_factory=dict)  # layer -> like `tokens`
    offsets: Tensor | None = None  # (batch, slots, 4), where the LLM takes positions on grids
    memory: Tensor | None = None  # (batch, images, memory_tokens, memory_dim)
    memory_mask: Tensor | None = None  # (batch, images, memory_tokens)
    cache: dict[nn.Module, tuple[Tensor, Tensor]] | None = None  # keys and values of the memory, while decoding
    unfilled_prompt: Tensor | None = None  # (batch, prompt), slots that later steps must not see

    def expand(self, copies: int) -> VisualContext:
        """Each sample repeated, for beams and several sequences; all of one sample see the same images."""

        tensors: dict[str, Any] = {
            key: value.repeat_interleave(copies, dim=0)
            for key, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(
            self, **tensors, additions={k: v.repeat_interleave(copies, 0) for k, v in self.additions.items()}
        )

    def slot_of_token(self, is_image: Tensor) -> Tensor:
        """(batch, length): the last slot at or before each token, -1: none. A call's slots are its sample's last."""
        first = self.num_slots - is_image.sum(1)
        return first[:, None] + is_image.cumsum(1) - 1


def assign_images(slots: Sequence[int], placeholders: Sequence[int]) -> list[list[int]]:
    """The images of each sample, from the slots that images need and those that samples have."""
    samples: list[list[int]] = []
    image = 0
    for row, count in enumerate(placeholders):
        images, left = [], count
        while left > 0 and image < len(slots):
            images.append(image)
            left -= slots[image]
            image += 1
        if left != 0:
            raise ValueError(f"sample {row} of the batch has {count} image slots, its images need {count - left}")
        samples.append(images)
    if image != len(slots):
        raise ValueError(f"{len(slots)} images were passed, but the batch has slots for {image}")
    return samples


def arrange(found: VisualTokens, samples: Sequence[Sequence[int]], slots: Sequence[int]) -> VisualContext:
    """Tokens and memory gathered from images to samples, without a copy to the host.

    Raises:
        ValueError: the connector returned more tokens than the slots that it asked for.
    """
    device = found.tokens.device
    # One slot at least, which no token stands in, where the images are no sample's: the same computation for all.
    width = max(1, max((sum(slots[image] for image in images) for images in samples), default=0))
    most = found.tokens.shape[1]
    if most > max(slots):
        raise ValueError(f"the connector returned {most} tokens for an image, its num_tokens said {max(slots)}")
    source, image_of_slot, place_of_slot = [], [], []
    for images in samples:
        places = [(image, place) for image in images for place in range(slots[image])]
        padding = width - len(places)
        source.append([image * most + place if place < most else -1 for image, place in places] + [-1] * padding)
        order = {image: index for index, image in enumerate(images)}
        image_of_slot.append([order[image] for image, _ in places] + [-1] * padding)
        place_of_slot.append([place for _, place in places] + [-1] * padding)
    index = torch.tensor(source, device=device).view(len(samples), width)
    flat = index.clamp(min=0)

    def by_slot(values: Tensor) -> Tensor:
        return values.flatten(0, 1)[flat]

    context = VisualContext(
        tokens=by_slot(found.tokens),
        filled=by_slot(found.mask) & (index >= 0),
        image_of_slot=torch.tensor(image_of_slot, device=device).view(len(samples), width),
        place_of_slot=torch.tensor(place_of_slot, device=device).view(len(samples), width),
        num_slots=torch.tensor([sum(slots[image] for image in images) for images in samples], device=device),
        additions={layer: by_slot(values) for layer, values in found.additions.items()},
    )
    if found.memory is not None:
        memory_mask = found.memory_mask
        if memory_mask is None:
            memory_mask = torch.ones(found.memory.shape[:2], dtype=torch.bool, device=device)
        count = max(1, max(len(images) for images in samples))
        rows = torch.tensor([[*images, *[-1] * (count - len(images))] for images in samples], device=device)
        context.memory = found.memory[rows.clamp(min=0)]
        context.memory_mask = memory_mask[rows.clamp(min=0)] & (rows >= 0)[..., None]
    return context


def token_of_slot(visual: VisualContext, is_image: Tensor, slot: Tensor) -> Tensor | None:
    """(batch, images, slots), the token in this call that stands in each image's slots, -1: none; None: no slot at all.

    Args:
        slot: (batch, length), the last slot at or before each token.
    """
    if not is_image.any():
        return None
    images, slots = int(visual.image_of_slot.max()) + 1, int(visual.place_of_slot.max()) + 1
    place = visual.image_of_slot * slots + visual.place_of_slot
    target = place.gather(1, slot.clamp(min=0)).masked_fill(~is_image, images * slots)  # text goes behind the last one
    tokens = torch.arange(is_image.shape[1], device=is_image.device).expand_as(target)
    found = tokens.new_full((len(target), images * slots + 1), -1).scatter(1, target, tokens)
    return found[:, :-1].unflatten(1, (images, slots))


def gather_slots(values: Tensor, slot: Tensor) -> Tensor:
    return values.gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))


def splice(embeds: Tensor, visual: VisualContext, is_image: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    filled = visual.filled.gather(1, slot.clamp(min=0))
    return splice_rows(embeds, visual.tokens, torch.where(is_image, slot, -1)), is_image & ~filled


def hide_unfilled(
    attention_mask: Tensor | None, unfilled: Tensor, num_cached: int, visual: VisualContext
) -> Tensor | None:
    """The attention mask without slots that no token fills, in the prompt's call and in those that continue it."""
    if visual.unfilled_prompt is None:
        visual.unfilled_prompt = unfilled
    hidden = visual.unfilled_prompt
    if not hidden.any():
        return attention_mask
    if attention_mask is None:
        attention_mask = hidden.new_ones(len(hidden), num_cached + unfilled.shape[1], dtype=torch.long)
    rest = attention_mask.shape[1] - hidden.shape[1]
    return attention_mask.masked_fill(nn.functional.pad(hidden, (0, rest)), 0)


def last_visible(attention_mask: Tensor, places: Tensor) -> Tensor:
    """These places of a flattened batch, or where they are hidden the last place before them that is not.

    What follows an image is predicted from its last token, not from slots that none fills.
    """
    rows, length = attention_mask.shape
    flat = torch.arange(rows * length, device=attention_mask.device).view(rows, length)
    return flat.masked_fill(attention_mask == 0, 0).cummax(1).values.flatten()[places]


def positions(attention_mask: Tensor, length: int) -> Tensor:
    """Position ids (batch, length) of the last tokens under a mask: hidden ones take none."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
