"""A packed batch gives the loss and gradients of the padded one, and no sample of it sees another."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model.test_families import CONNECTORS, FAMILIES, open_gates
from tests.tiny import CLIP, LLAMA, HybridConnector, MemoryConnector, left_pad, model, pixels
from vlmzoo.connector import ImageLayout, VisualTokens
from vlmzoo.data.layout import BatchLayout
from vlmzoo.language.packing import Packing, packs
from vlmzoo.model import VisionLanguageModel


def batch(vlm: VisionLanguageModel) -> dict[str, Any]:
    """Two images in one sample, one in another, text alone in a third: padded on the right, two targets in each."""
    token = vlm.config.image_token_id
    slots = [token] * vlm.num_tokens(ImageLayout(((3, 3),)))
    rows = [[1, *slots, 5, 6, *slots, 7, 8], [1, 9, *slots, 5, 11], [1, 5, 7, 9]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        labels[index, len(row) - 2 : len(row)] = ids[index, len(row) - 2 : len(row)]
    lengths = tuple(len(row) for row in rows)
    found = BatchLayout.of_tensors(ids, labels, token)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
        "labels": labels,
        "pixel_values": pixels(3),
        "layout": BatchLayout(lengths, found.slots, found.targets),
    }


def loss_and_gradients(vlm: VisionLanguageModel, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    vlm.zero_grad()
    loss = vlm(**inputs, **options).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-6 * largest, msg=name)


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_packed_is_the_same(family: str, connector: str) -> None:
    torch.manual_seed(0)
    llm = {"config": {**LLAMA, **FAMILIES[family], "model_type": family}}
    vlm = VisionLanguageModel.from_parts({"config": CLIP}, CONNECTORS[connector], llm).eval()
    open_gates(vlm)
    inputs = batch(vlm)
    expected = loss_and_gradients(vlm, inputs)
    with packs(vlm.language):
        close(loss_and_gradients(vlm, inputs, packing=True), expected)


@pytest.mark.parametrize("connector", [MemoryConnector, HybridConnector])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_memory_additions_and_slots_that_stay_empty(connector: Any, attention: str) -> None:
    vlm = model(connector)
    expected = loss_and_gradients(vlm, batch(vlm))
    vlm.language.set_attn_implementation(attention)
    with packs(vlm.language):
        close(loss_and_gradients(vlm, batch(vlm), packing=True), expected)
    assert vlm.language.config._attn_implementation == attention


@pytest.mark.parametrize("packing", [False, True])
def test_what_follows_an_image_is_predicted_from_its_last_token(packing: bool) -> None:
    """Whatever stands in slots that stay empty changes nothing, and they are as if they had never been there."""
    vlm = model(HybridConnector)
    token, connector, found = vlm.config.image_token_id, cast(Any, vlm.connector), []
    for slots, filler in ((5, 0.0), (5, 7.0), (3, 0.0)):
        connector.num_tokens = lambda image, slots=slots: slots

        def forward(visual: Any, slots: int = slots, filler: float = filler) -> VisualTokens:
            tokens = connector.project(visual.maps[0].values[:, :slots])
            mask = torch.arange(slots) < 3
            return VisualTokens(tokens.masked_fill(~mask[:, None], filler), mask.expand(tokens.shape[:2]))

        connector.forward = forward
        ids = torch.tensor([[1, *[token] * slots, 5, 6]])
        labels = torch.tensor([[-100] * (1 + slots) + [5, 6]])
        with packs(vlm.language, packing), torch.no_grad():
            found.append(vlm(input_ids=ids, labels=labels, pixel_values=pixels(1), packing=packing).logits)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)


def test_no_padding_and_no_empty_slot_reaches_the_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model(HybridConnector)
    seen: list[torch.Size] = []
    forward = vlm.language.forward

    def spy(**inputs: Any) -> Any:
        seen.append(inputs["inputs_embeds"].shape)
        return forward(**inputs)

    monkeypatch.setattr(vlm.language, "forward", spy)
    inputs = batch(vlm)
    with packs(vlm.language):
        seen.clear()
        logits = vlm(**inputs, packing=True).logits
    assert seen == [(1, 15 + 9 + 4 - 3 * 2, 48)]  # five slots an image of which three are filled
    assert logits.shape == (1, 6, 60)


@pytest.mark.parametrize("connector", [MemoryConnector, HybridConnector])
def test_samples_do_not_see_one_another(connector: Any) -> None:
    """Another text and another image in one sample change no bit of the other samples' logits."""
    vlm = model(connector)
    inputs = batch(vlm)
    with packs(vlm.language), torch.no_grad():
        before = vlm(**inputs, packing=True).logits[0]
        inputs["input_ids"][0, -1] = 33
        inputs["pixel_values"][:2] += 1
        after = vlm(**inputs, packing=True).logits[0]
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[2:], before[2:])


@pytest.mark.parametrize("leak", ["attention", "positions"])
def test_a_leak_is_seen(leak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault planted: attention over the whole row; positions that run on."""
    vlm = model("linear")
    expected = loss_and_gradients(vlm, batch(vlm))
    if leak == "attention":

        def whole(self: Packing) -> dict[str, Any]:
            return {"sample_lengths": [sum(self.lengths)]}

        monkeypatch.setattr(Packing, "arguments", whole)
        with pytest.raises(ValueError, match="samples of one row see one another"), packs(vlm.language):
            pass
    else:
        monkeypatch.setattr(Packing, "pack_positions", lambda self, ids: torch.arange(len(self.index))[None] * 3)
        with packs(vlm.language), pytest.raises(AssertionError):
            close(loss_and_gradients(vlm, batch(vlm), packing=True), expected)


def test_a_decoder_that_mixes_what_follows_is_refused() -> None:
    """State-space layers carry a state from one sample of a row to the next."""
    mamba = {
        "model_type": "mamba",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 60,
        "state_size": 4,
    }
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**mamba))
    with pytest.raises(ValueError, match="samples of one row see one another in MambaForCausalLM"), packs(language):
        pass


def test_prompts_read_both_ways_are_refused() -> None:
    vlm = model("linear")
    vlm.config.bidirectional = "prefix"
    with pytest.raises(ValueError, match="reads its prompt in both directions"), packs(vlm.language):
        vlm(**batch(vlm), packing=True)


def test_a_call_that_is_not_packed_is_refused_while_packing() -> None:
    vlm = model("linear")
    with packs(vlm.language), pytest.raises(ValueError, match="expected a packed call"):
        vlm(**batch(vlm))


def test_a_window_ends_at_the_sample() -> None:
    window = {**LLAMA, "model_type": "mistral", "sliding_window": 3}
    vlm = model("linear", window)
    expected = loss_and_gradients(vlm, batch(vlm))
    with packs(vlm.language):
        close(loss_and_gradients(vlm, batch(vlm), packing=True), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_targets_alone(side: str) -> None:
    """They are those rows of the whole call's, whatever side is padded and whether the layout is known."""
    vlm = model("linear")
    inputs = batch(vlm)
    if side == "left":
        inputs = {**left_pad([[1, 9, 8, 5, 11], [1, 5, 7]])}
        inputs["labels"] = torch.tensor([[-100, -100, 8, -100, 11], [-100, -100, -100, 5, -100]])
    for known in (True, False):
        given = {key: value for key, value in inputs.items() if known or key != "layout"}
        with torch.no_grad():
            found = vlm(**given).logits
            whole = vlm(**{key: value for key, value in given.items() if key not in ("labels", "layout")}).logits
        expected = whole[:, :-1][inputs["labels"][:, 1:] != -100]
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
