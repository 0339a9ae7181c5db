"""A folder as a user has it: checkpoints saved by transformers, a LLaVA JSON and its images. All tiny and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from tests.tiny import CLIP, LLAMA, QWEN, SIGLIP

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}
WORDS = [
    *COLORS,
    "What",
    "color",
    "is",
    "it",
    "?",
    ".",
    "a",
    "picture",
    "Describe",
    "USER:",
    "ASSISTANT:",
    "left",
    "now",
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    table = {word: index for index, word in enumerate(["<unk>", "<s>", "<pad>", "</s>", *WORDS])}
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"USER:|ASSISTANT:|\w+|[^\w\s]"), behavior="removed", invert=True)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT, **special)


def write_models(folder: Path) -> Path:
    """`clip`, `siglip`, `llama` and `qwen` below the folder, in transformers' own format."""
    for name, values, processor in (("clip", CLIP, CLIPImageProcessorPil), ("siglip", SIGLIP, SiglipImageProcessorPil)):
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(**values)).save_pretrained(folder / name)
        size = {"shortest_edge": 24} if name == "clip" else {"height": 24, "width": 24}
        processor(size=size, crop_size={"height": 24, "width": 24}).save_pretrained(folder / name)
    for name, values in (("llama", LLAMA), ("qwen", QWEN)):
        torch.manual_seed(0)
        values = {**values, "eos_token_id": 3, "pad_token_id": 2, "max_position_embeddings": 128}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder


def write_llava(folder: Path) -> Path:
    """`llava` below a folder that `write_models` filled: its `clip` and `llama`, as transformers saves the whole."""
    vision = CLIPVisionModel.from_pretrained(folder / "clip")
    language = LlamaForCausalLM.from_pretrained(folder / "llama")
    words = tokenizer()
    words.add_special_tokens({"extra_special_tokens": ["<image>"]})
    image = words.get_vocab()["<image>"]
    whole = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision.config, text_config=language.config, image_token_id=image)
    )
    whole.model.vision_tower.load_state_dict(vision.state_dict())
    whole.save_pretrained(folder / "llava")
    words.save_pretrained(folder / "llava")
    processor = "preprocessor_config.json"
    (folder / "llava" / processor).write_bytes((folder / "clip" / processor).read_bytes())
    return folder / "llava"


def write_data(folder: Path, count: int = 16) -> Path:
    """`data.json`: what colour a picture has; every fifth record is text alone, every seventh has two pictures.
    `captions.json`: a word on each of the pictures."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for index in range(count):
        colors = [list(COLORS)[rng.integers(len(COLORS))] for _ in range(2)]
        names = []
        for place, color in enumerate(colors):
            noise = rng.integers(-10, 10, (30, 40, 3))
            picture = (np.array(COLORS[color]) + noise).clip(0, 255).astype(np.uint8)
            names.append(f"{index}-{place}.png")
            Image.fromarray(picture).save(images / names[-1])
            talk = [("human", "<image>\nDescribe"), ("gpt", color)]
            captions.append({"id": names[-1], "image": names[-1], "conversations": _turns(talk)})
        record: dict[str, Any] = {"id": f"record-{index}"}
        question = "What color is it ?"
        if index % 5 == 4:
            talk = [("human", "What is red ?"), ("gpt", "a color")]
        elif index % 7 == 6:
            record["image"] = names
            talk = [("human", f"<image>\n<image>\n{question}"), ("gpt", " ".join(colors))]
        else:
            record["image"] = names[0]
            talk = [
                ("human", f"<image>\n{question}"),
                ("gpt", colors[0]),
                ("human", "What is it ?"),
                ("gpt", "a picture"),
            ]
        record["conversations"] = _turns(talk)
        records.append(record)
    (folder / "captions.json").write_text(json.dumps(captions))
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def _turns(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in talk]


def run_values(folder: Path, connector: Any = "mlp", encoder: str = "clip", llm: str = "llama") -> dict[str, Any]:
    """A run over such a folder, as YAML values: a few steps of both stages, and evaluation."""
    data = {"path": str(folder / "data.json"), "template": "chat"}
    stage = {"batch_size": 4, "steps": 4, "schedule": "cosine"}
    return {
        "encoder": str(folder / encoder),
        "connector": connector,
        "llm": str(folder / llm),
        "stages": {
            "align": {
                **stage,
                "data": {"path": str(folder / "captions.json"), "template": "plain"},
                "lr": {"connector": 1e-3},
            },
            "finetune": {**stage, "data": data, "lr": {"connector": 1e-3, "language": 1e-3}},
        },
        "evaluation": {"colors": {"data": data, "max_new_tokens": 4}},
        "checkpoint_every": 3,
    }
