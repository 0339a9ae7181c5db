import random
import re
from typing import Any

from vlmzoo.world import DATASETS
from vlmzoo.world.datasets import examples
from vlmzoo.world.language import IGNORED, encode
from vlmzoo.world.scenes import sample_scene
from vlmzoo.world.text import caption, dialogue, statements
from vlmzoo.world.tokenizer import PROMPTS, build_tokenizer, words

TOKENIZER = build_tokenizer()


def test_every_word_of_the_world_is_known_and_round_trips() -> None:
    rng = random.Random(0)
    texts = list(PROMPTS)
    for name in DATASETS:
        for _, turns in examples(name, 400, seed=0):
            texts += [part for turn in turns for part in (turn.text, turn.answer)]
    for _ in range(200):
        texts += [piece for piece, _ in statements(sample_scene(rng), rng)[1:]]
    unknown = TOKENIZER.unk_token_id
    for text in set(texts):
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert unknown not in ids, text
        assert str(TOKENIZER.decode(ids)).replace(" ", "") == re.sub(r"\s", "", text)
        assert ids == [TOKENIZER.get_vocab()[word] for word in words(text)]


def test_answers_and_captions_decode_exactly() -> None:
    rng = random.Random(0)
    texts = {turn.answer for _, turns in examples("conversations", 500, seed=0) for turn in turns}
    texts |= {caption(sample_scene(rng)) for _ in range(50)}
    for text in texts:
        ids = TOKENIZER(text + "</s>")["input_ids"]
        assert ids[0] == TOKENIZER.bos_token_id
        assert ids[-1] == TOKENIZER.eos_token_id
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_unknown_word_is_unknown_and_places_are_one_word() -> None:
    ids = TOKENIZER("zebra top-left", add_special_tokens=False)["input_ids"]
    assert ids == [TOKENIZER.unk_token_id, TOKENIZER.convert_tokens_to_ids("top-left")]
    assert "<image>" not in TOKENIZER.get_vocab()


def test_offsets_point_into_the_text() -> None:
    text = "USER: Is there a red circle?\nASSISTANT: yes</s>"
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert spans == ["USER:", "Is", "there", "a", "red", "circle", "?", "ASSISTANT:", "yes", "</s>"]
    assert spans == TOKENIZER.convert_ids_to_tokens(encoded["input_ids"])


def render(messages: list[Any], prompt: bool = False) -> str:
    return str(TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def test_chat_template_grows_by_whole_turns() -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Where is the red circle?"},
        {"role": "assistant", "content": "top-left"},
        {"role": "user", "content": "How many circles are there?"},
        {"role": "assistant", "content": "1"},
    ]
    whole = render(messages)
    assert whole == (
        "<s>You are a helpful assistant. USER: Where is the red circle? ASSISTANT: top-left</s>"
        "USER: How many circles are there? ASSISTANT: 1</s>"
    )
    for length in range(1, len(messages) + 1):
        assert whole.startswith(render(messages[:length]))
        assert whole.startswith(render(messages[:length], prompt=True))


def test_chat_template_takes_content_in_parts() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "Where is the red circle?"}]
    assert render([{"role": "user", "content": parts}]) == "<s>USER: <image>\nWhere is the red circle? ASSISTANT:"


def test_language_model_learns_the_form_of_the_chat_template() -> None:
    rng = random.Random(0)
    scene = sample_scene(rng)
    pieces = dialogue(scene, rng, 3)
    ids, labels = encode(pieces, TOKENIZER.get_vocab())
    messages: list[Any] = []
    for text, supervised in pieces[1:]:
        role = "assistant" if supervised else "user"
        content = text.removesuffix("</s>") if supervised else text.removeprefix("USER: ").removesuffix(" ASSISTANT:")
        messages.append({"role": role, "content": content})
    assert TOKENIZER(render(messages), add_special_tokens=False)["input_ids"] == ids
    answers = "".join(text for text, supervised in pieces if supervised)
    assert [label for label in labels if label != IGNORED] == TOKENIZER(answers, add_special_tokens=False)["input_ids"]
