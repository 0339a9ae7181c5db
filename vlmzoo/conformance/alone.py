"""Checks of a connector by itself: what it makes of a batch of images."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import numpy as np
import torch

from vlmzoo.conformance.compare import by_image, connect, require, require_equal, tensors
from vlmzoo.conformance.subject import GRIDS, Subject, convert, pad, take
from vlmzoo.connector import ImageLayout, TokenConnectorAdapter, VisualTokens

GARBAGE = 1e4


def tokens_agree_with_num_tokens(subject: Subject) -> str:
    """As many tokens as `num_tokens` says, or by the mask fewer; at least one, the real ones first."""
    connector, layouts = subject.connector, subject.layouts
    slots = [connector.num_tokens(layout) for layout in layouts]
    require(min(slots) >= 1, f"num_tokens says {min(slots)}; an image takes at least 1 slot")
    found = connect(connector, subject.visual())
    shape = (len(layouts), max(slots), subject.model.text_spec.hidden_size)
    require(found.tokens.shape == shape, f"tokens are {tuple(found.tokens.shape)}; by num_tokens they are {shape}")
    for index, values in found.additions.items():
        require(values.shape == shape, f"additions to layer {index} are {tuple(values.shape)}, the tokens {shape}")
    require(found.mask.dtype == torch.bool, f"the mask is {found.mask.dtype}, not bool")
    require(found.mask.shape == shape[:2], f"the mask is {tuple(found.mask.shape)}, the tokens {shape}")
    counts = found.mask.sum(1)
    first = torch.arange(shape[1]) < counts[:, None]
    require(torch.equal(found.mask, first), "real tokens do not come first in the mask")
    exact = isinstance(connector, TokenConnectorAdapter)
    for layout, slot, count in zip(layouts, slots, counts.tolist(), strict=True):
        agrees = count == slot if exact else 1 <= count <= slot
        require(agrees, f"{count} tokens for crops of {layout.grids} patches; num_tokens says {slot}")
    for grid in subject.grids:
        output, count = connector.output_grid(grid), connector.num_tokens(ImageLayout((grid,)))
        agrees = output is None or math.prod(output) == count
        require(agrees, f"output_grid makes {output} of {grid}; num_tokens says {count}")
    refused = [grid for grid in GRIDS if grid not in subject.grids]
    return f"{counts.tolist()} tokens in {slots} slots" + (f"; refuses grids {refused}" if refused else "")


def padding_has_no_influence(subject: Subject) -> str:
    """What stands in padded patches and instruction tokens, and how many there are, changes no output and no logits."""
    visual, batch = subject.visual(), subject.batch()
    expected = by_image(connect(subject.connector, visual))
    logits = subject.logits(batch)[batch.is_text]
    for more, what in ((0, f"with {GARBAGE:.0f} in the padding"), (3, "with more padding")):
        found = by_image(connect(subject.connector, pad(visual, GARBAGE, more)))
        for image, parts in enumerate(found):
            require_equal(parts, expected[image], f"image {image} {what}")
        padded = replace(batch, visual=pad(visual, GARBAGE, more))
        require_equal(subject.logits(padded)[batch.is_text], logits, f"logits {what}", tolerance=1e-4)
    return "in patches" + (" and instructions" if visual.instruction else "")


def deterministic_under_a_seed(subject: Subject) -> str:
    """One seed gives one initialisation, others others; a forward in evaluation repeats; no other generator moves."""
    visual = subject.visual()
    before = _generators()
    connector = subject.build(seed=0)
    require(_generators() == before, "building it moves the global generator of torch, random or numpy")
    again = subject.build(seed=0).state_dict()
    for name, value in connector.state_dict().items():
        require(torch.equal(value, again[name]), f"{name} differs between two builds with one seed")
    del again
    first, second = (by_image(connect(connector, visual)) for _ in range(2))
    for image, parts in enumerate(first):
        require_equal(parts, second[image], f"image {image} in a second forward", tolerance=0)
    drawn = [name for name, value in connector.named_parameters() if value.numel() > 1 and value.std() > 0]
    if not drawn:
        return "nothing is drawn: every parameter is constant"
    other = dict(subject.build(seed=1).named_parameters())
    differ = [name for name in drawn if not torch.equal(other[name], connector.get_parameter(name))]
    require(bool(differ), "two builds with different seeds are the same: it seeds a generator itself")
    return f"{len(differ)} of {len(drawn)} parameters that are not constant are drawn from the seed"


def batch_of_one_equals_batch_of_many(subject: Subject) -> str:
    """An image or a sample gives the same alone as in a batch: no neighbour, padding or crop of another matters."""
    visual, batch = subject.visual(), subject.batch()
    together = by_image(connect(subject.connector, visual))
    for image, expected in enumerate(together):
        (alone,) = by_image(connect(subject.connector, take(visual, [image])))
        require_equal(alone, expected, f"image {image} alone")
    logits = subject.logits(batch)
    for row in range(len(batch.input_ids)):
        sample = batch.sample(row)
        alone = subject.logits(sample)[sample.is_text]
        require_equal(alone, logits[row][batch.is_text[row]], f"logits of sample {row} alone", tolerance=1e-4)
    return f"{visual.num_images} images, {len(batch.input_ids)} samples"


def compiles(subject: Subject) -> str:
    """`torch.compile(fullgraph=True)` gives what the plain forward gives."""
    visual = subject.visual()
    expected = by_image(connect(subject.connector, visual))
    torch.compiler.reset()
    try:  # with gradients, so that the graph is the one of training
        found = by_image(torch.compile(subject.connector, fullgraph=True, backend="aot_eager")(visual))
    finally:
        torch.compiler.reset()
    for image, parts in enumerate(found):
        require_equal(parts, expected[image], f"image {image} compiled")
    return "in one graph"


def works_on_meta(subject: Subject) -> str:
    """Built under `torch.device("meta")` it counts tokens and gives the shapes that it gives with weights."""
    visual = subject.visual()
    expected = tensors(connect(subject.connector, visual))
    with torch.device("meta"):
        connector = subject.build()
    for layout in subject.layouts:
        count, slots = connector.num_tokens(layout), subject.connector.num_tokens(layout)
        require(count == slots, f"num_tokens says {count} on meta, {slots} with weights")
    found = tensors(connect(connector, convert(visual, device="meta")))
    require(found.keys() == expected.keys(), f"on meta it gives {', '.join(found)}; else {', '.join(expected)}")
    for name, value in found.items():
        require(value.is_meta, f"{name} on {value.device} from inputs on meta")
        shape = tuple(expected[name].shape)
        require(value.shape == shape, f"{name} are {tuple(value.shape)} on meta, {shape} with weights")
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in found.items())


def dtype_and_device_are_kept(subject: Subject) -> str:
    """In float32 and bfloat16 what comes out has the type of what came in and is finite; all of it follows `.to`."""
    visual = subject.visual()
    _require_kept(connect(subject.connector, visual), torch.float32, "cpu")
    half = copy.deepcopy(subject.model).bfloat16()
    _require_kept(connect(half.connector, convert(visual, dtype=torch.bfloat16)), torch.bfloat16, "cpu")
    with torch.no_grad():
        logits = half(**subject.batch().inputs()).logits
    require(logits.dtype == torch.bfloat16, f"logits of a bfloat16 model are {logits.dtype}")
    require(logits.isfinite().all(), "logits of a bfloat16 model are not finite")
    moved = half.connector.to("meta")
    _require_kept(connect(moved, convert(visual, device="meta", dtype=torch.bfloat16)), torch.bfloat16, "meta")
    return "float32, bfloat16 and another device (meta)"


def _require_kept(found: VisualTokens, dtype: torch.dtype, device: str) -> None:
    for name, value in tensors(found).items():
        require(value.device.type == device, f"{name} on {value.device} from inputs on {device}")
        if not name.endswith("mask"):
            require(value.dtype == dtype, f"{name} are {value.dtype} from inputs in {dtype}")
            require(value.is_meta or value.isfinite().all(), f"{name} in {dtype} are not finite")


def _generators() -> tuple:
    """The states of the global generators."""
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), position
