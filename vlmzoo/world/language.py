"""The world's language models: a small Llama and a small Qwen that read scene descriptions and saw no picture."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vlmzoo.world.fitting import fit
from vlmzoo.world.scenes import sample_scene
from vlmzoo.world.text import CAPABILITIES, Piece, caption, dialogue, sample_question, statements
from vlmzoo.world.tokenizer import BOS_ID, EOS_ID, PAD_ID, build_tokenizer, words

BATCH = 32
NUM_TURNS = 9
MAX_TOKENS = 128  # longer texts are cut: a batch of equal lengths wastes nothing on padding
IGNORED = -100
PEAK = 2e-3  # learning rate


def new_model(name: str, vocab_size: int) -> PreTrainedModel:
    """About 0.9M parameters: four layers, 128 wide; `qwen` is a Qwen3, whose queries and keys have norms of their own.

    What makes 128 channels learn look-ups within minutes, all of it together: weights that start at 1/sqrt(width),
    biases on queries and keys (without them a head can hardly learn to look at the word before), and rotations that
    tell near places apart (base 100, not 10,000).
    """
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "tie_word_embeddings": False,
        "initializer_range": 0.09,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    # On a CPU attention written out is twice as fast at these lengths as the fused one.
    if name == "llama":
        return LlamaForCausalLM._from_config(LlamaConfig(**shape), attn_implementation="eager")
    return Qwen3ForCausalLM._from_config(Qwen3Config(**shape), attn_implementation="eager")


def encode(pieces: list[Piece], vocabulary: dict[str, int]) -> tuple[list[int], list[int]]:
    """Ids and labels; only what the scene determines is a target."""
    ids: list[int] = []
    labels: list[int] = []
    for text, supervised in pieces:
        piece = [vocabulary[word] for word in words(text)]
        ids += piece
        labels += piece if supervised else [IGNORED] * len(piece)
    return ids, labels


def text_batch(seed: int, step: int, vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Ids and labels of step `step`, half of them statements and half dialogues, padded at the right."""
    rng = random.Random(f"language {seed} {step}")
    rows = []
    for index in range(BATCH):
        scene = sample_scene(rng)
        pieces = dialogue(scene, rng, NUM_TURNS) if index % 2 else statements(scene, rng)
        rows.append(encode(pieces, vocabulary))
    length = min(MAX_TOKENS, max(len(ids) for ids, _ in rows))
    ids = torch.tensor([ids[:length] + [PAD_ID] * (length - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([labels[:length] + [IGNORED] * (length - len(labels)) for _, labels in rows])


def text_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the targets; logits are computed for these alone."""
    ids, labels = ids.to(model.device), labels[:, 1:].to(model.device)
    supervised = labels != IGNORED
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1][supervised]
    head: Any = model.get_output_embeddings()
    return F.cross_entropy(head(hidden).float(), labels[supervised])


@torch.no_grad()
def answer_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_questions: int, seed: int
) -> dict[str, float]:
    """Share of evaluation questions answered in exactly the right word, by capability, with the scene given as text."""
    rng = random.Random(f"answers {seed}")
    model.eval()
    scores = {}
    for capability in CAPABILITIES:
        asked = [sample_question(rng, "evaluation", capability) for _ in range(num_questions)]
        turns = [[{"role": "user", "content": f"{caption(scene)}\n{question.text}"}] for scene, question in asked]
        answers = [question.answer for _, question in asked]
        batch: Any = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        prompts = batch.to(model.device)
        last = prompts["attention_mask"].sum(1) - 1
        found = model(**prompts).logits[torch.arange(num_questions), last].argmax(-1)
        right = [tokenizer.decode(token) == answer for token, answer in zip(found, answers, strict=True)]
        scores[capability] = sum(right) / num_questions
    return scores


def train_language_model(
    name: str, checkpoint: Path, num_steps: int, seed: int, recipe: dict[str, object], device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, float]:
    """The trained model, its tokenizer and the seconds of training."""
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    torch.manual_seed(seed)
    model = new_model(name, len(tokenizer))
    nn.Module.to(model, device)  # transformers' own `to` has an annotation that checkers cannot follow

    def loss_at(step: int) -> Tensor:
        return text_loss(model, *text_batch(seed, step, vocabulary))

    seconds = fit(model, loss_at, num_steps=num_steps, peak=PEAK, recipe=recipe, directory=checkpoint)
    return model, tokenizer, seconds
