"""Checks of a connector inside a model: what it does to logits and gradients, while decoding, and on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers.utils import logging

from vlmzoo.conformance.compare import by_image, connect, require, require_equal
from vlmzoo.conformance.subject import IMAGES, Batch, Subject, swap_image
from vlmzoo.connector import Connector, VisualInput, VisualTokens
from vlmzoo.model import VisionLanguageModel

NUM_STEPS = 4
DECODED = 1e-4
"""The largest difference in logits between steps through the cache and one forward."""


def images_are_independent(subject: Subject) -> str:
    """Another image changes only its own tokens and memory, and only the logits behind it in its own sample."""
    visual, other, batch = subject.visual(), subject.visual(seed=1), subject.batch()
    swapped = [swap_image(visual, image, other) for image in range(visual.num_images)]
    with subject.training() as model:  # where a batch norm, for one, would mix the images
        before = by_image(_seeded(model.connector, visual))
        for image, changed in enumerate(swapped):
            for index, found in enumerate(by_image(_seeded(model.connector, changed))):
                if index != image:
                    require_equal(found, before[index], f"image {index} when image {image} changes")
    logits = subject.logits(batch)
    for image, changed in enumerate(swapped):
        unseen = batch.is_text & ~_behind(subject, batch, image)
        found = subject.logits(replace(batch, visual=changed))
        require_equal(found[unseen], logits[unseen], f"logits of text not behind image {image} when that changes")
    return f"{visual.num_images} images in {len(IMAGES)} samples"


def _seeded(connector: Connector, visual: VisualInput) -> VisualTokens:
    torch.manual_seed(0)  # of dropout
    return connect(connector, visual)


def _behind(subject: Subject, batch: Batch, image: int) -> Tensor:
    """(batch, length), True where an image stands before the token in its sample."""
    (row,) = (row for row, images in enumerate(IMAGES) if image in images)
    slots = [subject.model.num_tokens(subject.layouts[other]) for other in IMAGES[row] if other < image]
    behind = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    behind[row] = (batch.input_ids[row] == subject.model.config.image_token_id).cumsum(0) > sum(slots)
    return behind


def every_parameter_gets_a_gradient(subject: Subject) -> str:
    """The loss of the model has a gradient in every trainable parameter but those that the source leaves without."""
    without = subject.connector.without_gradient
    batch = subject.batch()
    with subject.training() as model:
        _loss(model, batch).backward()
        trainable = {name: value for name, value in model.connector.named_parameters() if value.requires_grad}
        reached = {name for name, value in trainable.items() if value.grad is not None and value.grad.any()}
    unknown = sorted(without - dict(subject.connector.named_parameters()).keys())
    require(not unknown, f"without_gradient names what is no parameter: {', '.join(unknown)}")
    frozen = without - trainable.keys()
    missing = [name for name in trainable if name not in reached | without]
    require(not missing, f"no gradient in {', '.join(missing)}")
    surprising = sorted(without & reached)
    require(not surprising, f"without_gradient lists what gets one: {', '.join(surprising)}")
    if not trainable:
        return "does not apply: it has no trainable parameter"
    unmoved = sorted(without & trainable.keys())
    listed = f"; none by its source in {', '.join(unmoved)}" if unmoved else ""
    listed += f"; {len(frozen)} more are frozen" if frozen else ""
    return f"in {len(reached)} of {len(trainable)} parameters" + listed


def image_reaches_the_loss(subject: Subject) -> str:
    """The loss of text behind an image depends on each of its crops, in each layer that the connector asks for."""
    batch = subject.batch()
    assert batch.visual is not None
    leaves: dict[str, Tensor] = {}
    for index, features in enumerate(batch.visual.maps):
        where = f" of feature map {index}" if len(batch.visual.maps) > 1 else ""
        leaves[f"patches{where}"] = features.values.requires_grad_()
        if features.cls is not None:
            leaves[f"CLS{where}"] = features.cls.requires_grad_()
    with subject.training() as model:
        loss = _loss(model, batch)
        require(loss.requires_grad, "the loss does not depend on any image")
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for what, gradient in zip(leaves, gradients, strict=True):
        for crop, image in enumerate(batch.visual.image_of_crop.tolist()):
            reached = gradient is not None and gradient[crop].any()
            require(reached, f"no gradient in the {what} of crop {crop}, image {image}")
    return f"{', '.join(leaves)} of {len(batch.visual.image_of_crop)} crops"


def checkpointed_gradients_are_the_same(subject: Subject) -> str:
    """Layers recomputed in the backward give the same gradients, of two batches in reverse order too."""
    batch = subject.batch()
    batches = (batch, replace(batch, visual=subject.visual(seed=1)))
    with subject.training() as model:
        for each in batches:
            _loss(model, each).backward()
        expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        model.zero_grad(set_to_none=True)
        with _checkpointing(model):
            losses = [_loss(model, each) for each in batches]
            for loss in reversed(losses):
                loss.backward()
        found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    require_equal(found, expected, "gradients with checkpointing")
    return f"of {len(found)} parameters, LLM and in-LLM layers included"


def _loss(model: VisionLanguageModel, batch: Batch) -> Tensor:
    torch.manual_seed(0)  # of dropout
    return model(**batch.inputs(), labels=batch.labels, use_cache=False).loss


def cached_decoding_equals_full_forward(subject: Subject) -> str:
    """The logits of greedy steps through the cache are those of one forward over all of it, padded on the left."""
    batch = subject.batch()
    prompt = batch.input_ids.shape[1]
    found = subject.model.generate(
        **batch.inputs(),
        max_new_tokens=NUM_STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    attention_mask = torch.nn.functional.pad(batch.attention_mask, (0, NUM_STEPS), value=1)
    full = subject.logits(replace(batch, input_ids=found.sequences, attention_mask=attention_mask))
    for step, logits in enumerate(found.logits):
        require_equal(logits, full[:, prompt - 1 + step], f"logits of step {step} through the cache", DECODED)
    return f"{NUM_STEPS} steps of {len(batch.input_ids)} samples"


def save_and_load_are_exact(subject: Subject) -> str:
    """Weights in safetensors, and the model by `save_pretrained`, give the same outputs again, bit for bit."""
    visual, batch = subject.visual(), subject.batch()
    expected = by_image(connect(subject.connector, visual))
    logits = subject.logits(batch)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "connector.safetensors"
        save_model(subject.connector, str(file))
        loaded = subject.build(seed=1)
        load_model(loaded, file)
        for image, found in enumerate(by_image(connect(loaded, visual))):
            require_equal(found, expected[image], f"image {image} after its weights were loaded", tolerance=0)
        del loaded
        with _quiet():
            subject.model.save_pretrained(folder)
            with _poisoned_memory():
                model = VisionLanguageModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(**batch.inputs()).logits
    require_equal(found, logits, "logits of the model from from_pretrained", tolerance=0)
    return "state_dict and save_pretrained"


@contextmanager
def _checkpointing(model: VisionLanguageModel) -> Iterator[None]:
    model.checkpoint_activations(True)
    try:
        yield
    finally:
        model.checkpoint_activations(False)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody fills (transformers leaves buffers that are not saved so) is NaN."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
