"""Masks are shown by decoding what is supervised, and ids by LLaVA's own way of building them."""

from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from vlmzoo.config import Template
from vlmzoo.data.records import Turn
from vlmzoo.data.templates import GENERATION, Renderer
from vlmzoo.data.tokens import Tokenised, stop_token_ids, tokenise

ANSWERS = ["A red cube.", "字 and é 🎉", " leads with a space", "Two\ncats", "\n", "trails \n", "no"]
Tokenizers = dict[str, PreTrainedTokenizerBase]


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("gpt" if index % 2 else "human", text) for index, text in enumerate(texts))


def encode(
    conversation: tuple[Turn, ...], template: Template, tokenizer: PreTrainedTokenizerBase, *, generation: bool = False
) -> Tokenised:
    (tokens,) = tokenise([Renderer(template, tokenizer).render(conversation, generation=generation)], tokenizer)
    return tokens


def supervised_text(tokens: Tokenised, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = [token for token, target in zip(tokens.input_ids, tokens.supervised, strict=True) if target]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def squeeze(text: str) -> str:
    return "".join(text.split())


def cases(tokenizers: Tokenizers) -> list[tuple[str, Template]]:
    chat = [(name, Template.chat) for name, tokenizer in tokenizers.items() if tokenizer.chat_template]
    return chat + [(name, template) for name in tokenizers for template in (Template.plain, Template.vicuna_v1)]


def test_what_is_supervised_are_the_answers_and_their_ends(tokenizers: Tokenizers) -> None:
    for name, template in cases(tokenizers):
        tokenizer = tokenizers[name]
        conversation = turns("<image>\nWhat is it?", "A red cube.", "How many?", "Two cats")
        conversation = conversation[:2] if template is Template.plain else conversation
        end = "" if template is Template.plain else str(tokenizer.eos_token)
        tokens = encode(conversation, template, tokenizer)
        found = supervised_text(tokens, tokenizer)
        assert squeeze(found) == squeeze("".join(turn.text + end for turn in conversation[1::2])), (name, template)
        if template is Template.plain and name != "words":  # whole words have no line break
            assert found.endswith("\n"), name


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_prompt_is_what_stands_before_the_targets(answer: str, tokenizers: Tokenizers) -> None:
    for name, template in cases(tokenizers):
        tokenizer = tokenizers[name]
        for earlier in ((), ("Who?", "The cat.")):
            if earlier and template is Template.plain:
                continue
            conversation = turns(*earlier, "<image>\nWhat is it?", answer)
            prompt = encode(conversation, template, tokenizer, generation=True)
            whole = encode(conversation, template, tokenizer)
            length = len(prompt.input_ids)
            assert not any(prompt.supervised)
            assert whole.input_ids[:length] == prompt.input_ids, (name, template)
            rest = whole.supervised[length:]
            after = 1 if template is Template.chat and "byte-level" in name else 0  # ChatML's break after the end
            assert rest == [True] * (len(rest) - after) + [False] * after, (name, template)
            assert earlier or not any(whole.supervised[:length]), (name, template)


def test_vicuna_is_llavas_string(tokenizers: Tokenizers) -> None:
    conversation = turns("What is <image> it?", "A red cube.", "How many?", "Two.")
    expected = (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is  it? ASSISTANT: A red cube."
        "</s>USER: How many? ASSISTANT: Two.</s>"
    )
    tokenizer = tokenizers["llama, not legacy"]
    tokens = encode(conversation, Template.vicuna_v1, tokenizer)
    text = str(tokenizer.decode(tokens.input_ids, clean_up_tokenization_spaces=False))
    assert text.replace("<s> ", "<s>") == expected


@pytest.mark.parametrize(
    "conversation",
    [
        turns("<image>\nWhat is it?", "A red cube."),
        turns("What is it? <image>", "字 or a cat", "How many?", "Two cats.", "Where?", "On the left"),
        turns("Hello", "Hi"),
    ],
)
def test_vicuna_ids_and_mask_are_llavas(conversation: tuple[Turn, ...], tokenizers: Tokenizers) -> None:
    """LLaVA tokenises the pieces around `<image>` and around each `</s>` apart, and counts."""
    tokenizer = tokenizers["llama"]
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions. "

    def pieces(text: str) -> list[int]:
        ids = []
        for index, piece in enumerate(text.split("<image>")):
            ids += [image_id] * (index > 0) + tokenizer(piece)["input_ids"][1:]
        return ids

    image_id = tokenizer.convert_tokens_to_ids("<image>")
    ids, mask = [tokenizer.bos_token_id], [False]
    for index in range(0, len(conversation), 2):
        question = conversation[index].text
        if "<image>" in question:
            question = "<image>\n" + question.replace("<image>", "").strip()
        head = pieces(("" if index else system) + f"USER: {question} ASSISTANT:")
        both = pieces(("" if index else system) + f"USER: {question} ASSISTANT: {conversation[index + 1].text}</s>")
        ids += both
        mask += [False] * len(head) + [True] * (len(both) - len(head))
    tokens = encode(conversation, Template.vicuna_v1, tokenizer)
    assert tokens.input_ids == ids
    assert tokens.supervised == mask


def test_plain_ids_are_llavas(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["llama"]
    tokens = encode(turns("Describe it.\n<image>", "A red cube"), Template.plain, tokenizer)
    image = [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<image>")]
    caption = tokenizer("A red cube\n")["input_ids"][1:]
    assert tokens.input_ids == image + caption
    assert tokens.supervised == [False, False] + [True] * len(caption)


def test_bos_stands_once_where_the_tokenizer_has_one(tokenizers: Tokenizers) -> None:
    for name, template in cases(tokenizers):
        tokenizer = tokenizers[name]
        ids = encode(turns("<image>", "A."), template, tokenizer).input_ids
        bos = tokenizer.bos_token_id
        assert [index for index, token in enumerate(ids) if token == bos] == ([] if bos is None else [0]), name


def test_chatml_is_the_tokenizers_own(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["byte-level"]
    conversation = turns("<image>\nWhat?", "A cube.", "And?", "A cat.")
    tokens = encode(conversation, Template.chat, tokenizer)
    roles = {"human": "user", "gpt": "assistant"}
    own = tokenizer.apply_chat_template(
        [{"role": roles[turn.role], "content": turn.text} for turn in conversation], return_dict=False
    )
    assert tokens.input_ids == own
    assert supervised_text(tokens, tokenizer) == "A cube.<|im_end|>A cat.<|im_end|>"


def test_several_images_stand_in_front_of_their_own_turn(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["byte-level"]
    conversation = turns("Look at <image> and <image>.", "A.", "<image> And this?", "B.")
    text = tokenizer.decode(encode(conversation, Template.chat, tokenizer).input_ids)
    assert "user\n<image>\n<image>\nLook at  and .<|im_end|>" in text
    assert "user\n<image>\nAnd this?<|im_end|>" in text


@pytest.mark.parametrize("role", [0, 1])
def test_special_tokens_in_texts_are_refused(role: int, tokenizers: Tokenizers) -> None:
    planted = {"llama": "</s>", "words": "<pad>", "byte-level": "<|im_start|>"}
    for name, special in planted.items():
        texts = ["What?", "A cube."]
        texts[role] += special
        with pytest.raises(ValueError, match="turn holds") as caught:
            encode(turns(*texts), Template.vicuna_v1, tokenizers[name])
        assert special in str(caught.value)
    texts = ["What?", "A <b>bold</b> <|im_end|> cube"]  # text to a tokenizer that has no such token
    assert encode(turns(*texts), Template.vicuna_v1, tokenizers["llama"]).input_ids
    with pytest.raises(ValueError, match="<image>"):
        encode(turns("What?", "A <image>."), Template.vicuna_v1, tokenizers["llama"])


CHATML_START = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
CHATML_END = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_what_a_template_marks_as_generated_is_what_follows_the_prompts(tokenizers: Tokenizers) -> None:
    plain = _copy(tokenizers["byte-level"], MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    marked = _copy(tokenizers["byte-level"], MARKED)
    for texts in (["<image>\nWhat?", "A cube."], ["What?", "Two\ncats", "And?", "A.", "Who?", " é 字 "]):
        assert encode(turns(*texts), Template.chat, marked) == encode(turns(*texts), Template.chat, plain)
    assert GENERATION.search(MARKED)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}",
            "marks 1 answers .* expected 2",
        ),
        ("{% generation %}{{ m.content | upper }}{% endgeneration %}", "marks 4 answers .* expected 2"),
        (
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content | upper }}{% endgeneration %}{% endif %}",
            "changes the answer of turn 1: 'A cube.' to 'A CUBE.'",
        ),
    ],
)
def test_templates_that_mark_what_no_answer_is(body: str, message: str, tokenizers: Tokenizers) -> None:
    with_template = _copy(tokenizers["byte-level"], CHATML_START + body + CHATML_END)
    with pytest.raises(ValueError, match=message):
        encode(turns("What?", "A cube.", "And?", "A cat."), Template.chat, with_template)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{{ ('' if loop.last else 'old ') + m.content }}", "not prefix-stable"),
        ("{{ messages | length }}{{ m.content }}", "not prefix-stable"),
        ("{{ m.content | upper }}", "changes the answer of turn 1: 'A cube.' to 'A CUBE.<|im_end|>"),
        ("{{ raise_exception('no users') }}", "refuses the conversation .no users"),
    ],
)
def test_templates_whose_answers_cannot_be_found(body: str, message: str, tokenizers: Tokenizers) -> None:
    with_template = _copy(tokenizers["byte-level"], CHATML_START + body + CHATML_END)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        encode(turns("What?", "A cube.", "And?", "A cat."), Template.chat, with_template)


def test_empty_thoughts_are_the_prompts(tokenizers: Tokenizers) -> None:
    """As Qwen3: the prompt closes the thoughts when told not to think, and so does the last answer."""
    thoughts = "{{ '<think>\n\n</think>\n\n' }}"
    body = "{% if m.role == 'assistant' and loop.last %}" + thoughts + "{% endif %}{{ m.content }}"
    end = "{% if add_generation_prompt and enable_thinking is false %}" + thoughts + "{% endif %}"
    tokenizer = _copy(tokenizers["byte-level"], CHATML_START + body + CHATML_END + end)
    tokens = encode(turns("What?", "A cube."), Template.chat, tokenizer)
    assert supervised_text(tokens, tokenizer) == "A cube.<|im_end|>"


def test_a_special_token_that_swallows_space_is_no_target(tokenizers: Tokenizers) -> None:
    tokenizer = _copy(
        tokenizers["byte-level"],
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}"
        "{{ '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    )
    tokenizer.add_tokens([AddedToken(f"<|{role}|>", special=True, rstrip=True) for role in ("user", "assistant")])
    tokens = encode(turns("What?", "  A cube."), Template.chat, tokenizer)
    assert supervised_text(tokens, tokenizer) == "A cube.<|im_end|>"


@pytest.mark.parametrize("name", ["byte-level", "byte-level, trimmed", "llama", "llama, not legacy"])
def test_the_space_at_the_end_of_a_prompt_is_no_target(name: str, tokenizers: Tokenizers) -> None:
    end = str(tokenizers[name].eos_token)
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = _copy(tokenizers[name], template)
    tokens = encode(turns("What?", "字"), Template.chat, tokenizer)
    assert supervised_text(tokens, tokenizer) == "字" + end
    assert sum(tokens.supervised) == 4  # three bytes and the end


def test_plain_takes_one_image_turn_and_one_answer(tokenizers: Tokenizers) -> None:
    for conversation in (turns("Hi", "A."), turns("<image>", "A.", "B?", "C.")):
        with pytest.raises(ValueError, match="template plain takes one human turn with <image> and one answer"):
            encode(conversation, Template.plain, tokenizers["llama"])


def test_answers_stop_at_the_eos_and_at_the_templates_end(tokenizers: Tokenizers) -> None:
    tokenizer = _copy(tokenizers["byte-level"], str(tokenizers["byte-level"].chat_template), eos_token="<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids
    assert stop_token_ids(Template.vicuna_v1, tokenizer) == [ids("<|endoftext|>")]
    assert stop_token_ids(Template.chat, tokenizer) == sorted(ids(["<|endoftext|>", "<|im_end|>"]))


def _copy(tokenizer: Any, chat_template: str, **special: str) -> Any:
    """The tokenizer with another chat template."""
    names = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token, "bos_token": tokenizer.bos_token}
    return type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=chat_template, **{**names, **special}
    )
