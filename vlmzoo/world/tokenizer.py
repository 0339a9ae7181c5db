"""The closed vocabulary of the world and its whole-word tokenizer."""

import re

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vlmzoo.world.scenes import COLORS, SHAPES, SIGN, SIZES
from vlmzoo.world.text import CAPTION_REQUEST, PLACES, PLURALS

SPECIAL = ("<unk>", "<s>", "<pad>", "</s>")
# transformers' CLIP reads an eos id of 2 as that of a broken old configuration: 2 is the padding here.
BOS_ID, PAD_ID, EOS_ID = 1, 2, 3
# A role with its colon is one word, as is a place; other punctuation stands alone; white space is dropped.
WORD = r"<s>|</s>|USER:|ASSISTANT:|\w+(?:[-']\w+)*|[^\w\s]"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set parts = namespace(text='') %}{% for part in message['content'] %}"
    "{% set parts.text = parts.text + (part['text'] if part['type'] == 'text' else '<image>\n') %}{% endfor %}"
    "{% set text = parts.text %}{% endif %}"
    "{% if message['role'] == 'system' %}{{ text + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + text + ' ASSISTANT:' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('unknown role ' + message['role'] + ', expected system, user or assistant') }}"
    "{% endif %}{% endfor %}"
)
# Words for prompts that people put around an image; the world itself never says them.
PROMPTS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "You are a helpful assistant. Describe the image concisely. Give a brief description of the given image.",
    "Provide a brief description of the given image. What is in the image? Write a caption for the picture. yes no",
    "This photo shows. A short image caption: A photo of. Question: Short answer: Please look at and read it.",
    "human gpt",
)
QUESTIONS = (
    "Is there a ? What size color shape number is the object at on ? How many objects are there ? Where is ?",
    "left or right of above or below level count any , ; . 0 1 2 3 4 5 6 7 8 9 yes no",
)


def words(text: str) -> list[str]:
    """The text cut into words, as the tokenizer does it."""
    return re.findall(WORD, text)


def vocabulary() -> dict[str, int]:
    """Word to id: special tokens first, the world's own words, then those of prompts."""
    texts = (
        "USER: ASSISTANT:",
        *PLACES,
        *SIZES,
        *COLORS,
        *SHAPES,
        SIGN,
        *PLURALS.values(),
        *QUESTIONS,
        CAPTION_REQUEST,
        *PROMPTS,
    )
    said = (word for text in texts for word in words(text))
    return {word: index for index, word in enumerate(dict.fromkeys((*SPECIAL, *said)))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: `<s>` first, unknown words `<unk>`, right padding, words joined by spaces when decoded."""
    table = vocabulary()
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
