"""Tokenizers of three families, trained here on a few lines, and data sets in LLaVA's form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LINES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is it? ASSISTANT: A red cube. Where is the cat? How many? Two cats sat on the left.",
    "user assistant question answer Caption: a short image description Look at and this.",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def _finish(tokenizer: Tokenizer, chat_template: str | None, **special: str) -> PreTrainedTokenizerBase:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)
    fast.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return fast


def words() -> PreTrainedTokenizerBase:
    """Whole words, no line breaks, BOS by a post-processor."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _finish(tokenizer, None, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def bytelevel(trim_offsets: bool = False) -> PreTrainedTokenizerBase:
    """As Qwen's: byte-level BPE, no BOS, ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return _finish(tokenizer, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama(legacy: bool = True) -> PreTrainedTokenizerBase:
    """As Llama's: BPE on words that begin with `▁`, byte fallback, BOS; `legacy`: `▁` after special tokens too."""
    spaced = Tokenizer(models.BPE())
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *alphabet], show_progress=False)
    spaced.train_from_iterator(LINES, trainer)
    model = json.loads(spaced.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(tokenizer, LLAMA_CHAT, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "words": words,
    "byte-level": bytelevel,
    "byte-level, trimmed": lambda: bytelevel(trim_offsets=True),
    "llama": llama,
    "llama, not legacy": lambda: llama(legacy=False),
}


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {name: build() for name, build in TOKENIZERS.items()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> PreTrainedTokenizerBase:
    return tokenizers[request.param]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder with a.png (20 x 30) and sub/b.jpg (40 x 10)."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise[:, :20]).save(folder / "a.png")
    Image.fromarray(noise[:10]).save(folder / "sub" / "b.jpg")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a data set beside the image folder and returns its path."""

    def write_records(records: Any) -> Path:
        path = tmp_path / "train.json"
        path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
        return path

    return write_records
