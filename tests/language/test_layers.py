"""In-LLM layers on an unmodified decoder: checkpointing both ways, order, beams, threads, a shared decoder."""

import copy
import threading
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.tiny import HybridConnector, MemoryConnector, left_pad, model, pixels
from vlmzoo.language.layers import decoder_layers
from vlmzoo.model import VisionLanguageModel


def batch(vlm, seed: int = 0):
    image = vlm.config.image_token_id
    rows = left_pad([[1, image, 5, 6, image, 7, 8], [1, 9, image, 5]])
    labels = (
        rows["input_ids"].masked_fill(rows["input_ids"] == image, -100).masked_fill(rows["attention_mask"] == 0, -100)
    )
    return {**rows, "pixel_values": pixels(3, seed), "labels": labels}


def gradients(vlm):
    return {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}


def checkpoint_calls(language) -> None:
    """As transformers 5.17 does it: the layer's whole call is run again, hooks included."""
    for layer in decoder_layers(language):
        kind = type(layer)
        if not hasattr(kind, "_plain_call"):

            class Checkpointed(kind):
                _plain_call = kind.__call__

                def __call__(self, *args, **kwargs):
                    return checkpoint(partial(self._plain_call, **kwargs), *args, use_reentrant=False)

            layer.__class__ = Checkpointed


def checkpoint_forwards(vlm) -> None:
    vlm.checkpoint_activations(True)


@pytest.mark.parametrize("how", ["forward", "call"])
def test_checkpointing_gives_the_same_gradients(how):
    vlm = model(MemoryConnector).train()
    vlm(**batch(vlm)).loss.backward()
    expected = gradients(vlm)
    vlm.zero_grad()
    checkpoint_forwards(vlm) if how == "forward" else checkpoint_calls(vlm.language)
    vlm(**batch(vlm)).loss.backward()
    found = gradients(vlm)
    assert found.keys() == expected.keys()
    assert any("connector.layers" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("how", ["plain", "forward", "call"])
def test_two_forwards_then_two_backwards_in_reverse(how):
    vlm = model(MemoryConnector).train()
    expected = []
    for seed in (1, 2):
        vlm.zero_grad()
        vlm(**batch(vlm, seed)).loss.backward()
        expected.append(gradients(vlm))
    if how == "forward":
        checkpoint_forwards(vlm)
    elif how == "call":
        checkpoint_calls(vlm.language)
    losses = [vlm(**batch(vlm, seed)).loss for seed in (1, 2)]
    for index in (1, 0):
        vlm.zero_grad()
        losses[index].backward()
        for name, value in gradients(vlm).items():
            torch.testing.assert_close(value, expected[index][name], msg=name)


def test_generating_in_threads():
    vlm = model(MemoryConnector)
    image = vlm.config.image_token_id
    prompt = torch.tensor([[1, image, 5]])
    expected = [vlm.generate(prompt, pixel_values=pixels(1, seed), max_new_tokens=12) for seed in range(4)]
    assert len({tuple(row[0].tolist()) for row in expected}) > 1, "the images make no difference"
    found = [None] * 4

    def run(seed: int) -> None:
        found[seed] = vlm.generate(prompt, pixel_values=pixels(1, seed), max_new_tokens=12)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_two_models_over_one_decoder():
    first = model(MemoryConnector)
    prompt = {"input_ids": torch.tensor([[1, first.config.image_token_id, 5]]), "pixel_values": pixels(1)}
    text = torch.tensor([[1, 2, 3]])
    alone = first(**prompt).logits
    plain = first.language(text).logits
    connector = copy.deepcopy(first.connector)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.mul_(-2)
    second = VisionLanguageModel.from_parts(first.vision.model, connector, first.language)
    assert not torch.allclose(second(**prompt).logits, alone, atol=1e-2)
    assert torch.equal(first(**prompt).logits, alone)
    assert torch.equal(first.language(text).logits, plain), "the decoder itself has changed"
    hooks = sum(len(layer._forward_pre_hooks) for layer in decoder_layers(first.language))
    assert hooks == len(decoder_layers(first.language)), "a second model hooks a second time"


def test_a_copied_model_has_its_own_layers():
    vlm = model(MemoryConnector)
    prompt = {"input_ids": torch.tensor([[1, vlm.config.image_token_id, 5]]), "pixel_values": pixels(1)}
    expected = vlm(**prompt).logits
    copied = copy.deepcopy(vlm)
    with torch.no_grad():
        for parameter in copied.connector.parameters():
            parameter.zero_()
    assert torch.equal(vlm(**prompt).logits, expected)
    assert not torch.allclose(copied(**prompt).logits, expected, atol=1e-3)


def test_layers_run_where_they_are_asked_to():
    """Before decoder layer k, k = number of layers standing before the final norm."""
    vlm = model(MemoryConnector)
    order = []
    for index, layer in enumerate(decoder_layers(vlm.language)):
        layer.mlp.register_forward_hook(lambda *_, index=index: order.append(f"decoder {index}"))
    for index, layer in enumerate(vlm.connector.layers):
        layer.register_forward_hook(lambda *_, index=index: order.append(f"memory {index}"))
    vlm.language.get_decoder().norm.register_forward_hook(lambda *_: order.append("norm"))
    vlm(torch.tensor([[1, vlm.config.image_token_id, 5]]), pixel_values=pixels(1))
    assert order == ["decoder 0", "memory 0", "decoder 1", "decoder 2", "memory 1", "norm"]


def test_a_decoder_that_drops_the_call_is_refused():
    """Silence would train nothing."""
    vlm = model(MemoryConnector)
    decoder = vlm.language.get_decoder()
    honest = decoder.forward
    decoder.forward = lambda *args, in_llm=None, **kwargs: honest(*args, **kwargs)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM has no place for in-LLM layers before .* \[1, 3\]: it has 3"
    ):
        vlm(torch.tensor([[1, vlm.config.image_token_id, 5]]), pixel_values=pixels(1))


def test_a_layer_beyond_the_last_is_refused():
    vlm = model(MemoryConnector)
    vlm.in_llm_layers = {5: list(vlm.connector.layers)}
    with pytest.raises(ValueError, match=r"before decoder layers \[5\]: it has 3"):
        vlm(torch.tensor([[1, vlm.config.image_token_id, 5]]), pixel_values=pixels(1))


@pytest.mark.parametrize("use_cache", [False, True])
def test_additions_reach_the_slots_before_their_layers(use_cache):
    """As hooks of our own add them, and only where the image stands."""
    vlm = model(HybridConnector)
    slots = [vlm.config.image_token_id] * 5
    prompt = torch.tensor([[1, *slots, 7, 8]])
    found = vlm.generate(prompt, pixel_values=pixels(1), max_new_tokens=4, use_cache=use_cache)
    context = vlm.encode_images(prompt, pixels(1))
    additions, context.additions = context.additions, {}
    assert set(additions) == {0, 1}
    without = vlm(found[:, :-1], visual=context).logits

    def add(index):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden[:, 1:6] += additions[index]

        return hook

    layers = decoder_layers(vlm.language)
    hooks = [layers[index].register_forward_pre_hook(add(index), with_kwargs=True) for index in additions]
    with torch.no_grad():
        expected = vlm(found[:, :-1], visual=context).logits
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(expected, without, atol=1e-2)
    torch.testing.assert_close(vlm(found[:, :-1], pixel_values=pixels(1)).logits, expected)
    assert torch.equal(found[:, prompt.shape[1] :], expected[:, prompt.shape[1] - 1 :].argmax(-1))
