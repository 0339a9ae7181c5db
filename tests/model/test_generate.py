"""Generation equals the un-cached forward: batched, left-padded, beams, several images, text alone."""

import pytest
import torch

from tests.tiny import LLAMA, QWEN, HybridConnector, MemoryConnector, left_pad, model, pixels
from vlmzoo.connector import ImageLayout

CONNECTORS = ["linear", MemoryConnector, HybridConnector]


def prompts(vlm):
    """Three samples: two images, one image, none."""
    image = [vlm.config.image_token_id] * vlm.num_tokens(ImageLayout(((3, 3),)))
    rows = [[1, *image, 5, 6, *image, 7], [1, 9, *image, 5], [1, 2, 3, 4]]
    return rows, [pixels(3)[:2], pixels(3)[2:], None]


@pytest.mark.parametrize("llm", [LLAMA, QWEN], ids=["llama", "qwen"])
@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 4, "num_return_sequences": 2}], ids=str
)
def test_cached_equals_uncached(connector, llm, how):
    vlm = model(connector, llm)
    rows, _ = prompts(vlm)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        batch = left_pad(rows)
        found.append(vlm.generate(**batch, pixel_values=pixels(3), max_new_tokens=6, use_cache=use_cache, **how))
    assert torch.equal(*found)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_batched_equals_alone(connector):
    vlm = model(connector)
    rows, images = prompts(vlm)
    batch = left_pad(rows)
    length = batch["input_ids"].shape[1]
    together = vlm.generate(**batch, pixel_values=pixels(3), max_new_tokens=6)[:, length:]
    for row, image, answer in zip(rows, images, together, strict=True):
        whole = torch.tensor([[*row, *answer.tolist()]])
        logits = vlm(whole, **({} if image is None else {"pixel_values": image})).logits[0]
        assert torch.equal(logits[len(row) - 1 : -1].argmax(-1), answer)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_images_matter_and_do_not_leak_between_samples(connector):
    vlm = model(connector)
    rows, _ = prompts(vlm)
    batch = left_pad(rows)
    before = vlm(**batch, pixel_values=pixels(3)).logits[:, -1]
    changed = pixels(3)
    changed[2] = pixels(1, seed=9)[0]
    after = vlm(**batch, pixel_values=changed).logits[:, -1]
    assert not torch.allclose(before[1], after[1], atol=1e-3)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]])


def test_image_token_is_never_generated():
    vlm = model("linear")
    prompt = torch.tensor([[1, 2, 3]])
    wanted = int(vlm.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1])
    vlm.config.image_token_id = wanted  # inside the vocabulary
    found = vlm.generate(prompt, max_new_tokens=4, do_sample=False)
    assert wanted not in found[0, 3:].tolist()


@pytest.mark.parametrize(("cut", "message"), [(1, "sample 0 of the batch has 8 image slots"), (9, "no image|3 images")])
def test_slots_that_do_not_fit_are_refused(cut, message):
    vlm = model("linear")
    row = [1, *[vlm.config.image_token_id] * (9 - cut), 5]
    with pytest.raises(
        ValueError, match=message if cut == 1 else "1 images were passed, but the batch has slots for 0"
    ):
        vlm(torch.tensor([row]), pixel_values=pixels(1))


def test_slots_without_an_image_are_refused():
    vlm = model("linear")
    with pytest.raises(ValueError, match="no image was passed"):
        vlm(torch.tensor([[1, vlm.config.image_token_id, 5]]))
