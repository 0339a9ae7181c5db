"""The world's language model: a small Llama that has read scene descriptions and never seen a picture."""

import random
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlmzoo.world.fitting import fit
from vlmzoo.world.scenes import sample_scene
from vlmzoo.world.text import CAPABILITIES, Piece, ask, caption, dialogue, statements
from vlmzoo.world.tokenizer import BOS_ID, EOS_ID, PAD_ID, build_tokenizer, words

BATCH = 32
NUM_STATEMENTS = 18
NUM_TURNS = 9
MAX_TOKENS = 128  # longer texts are cut: a batch of equal lengths wastes nothing on padding
IGNORED = -100


def language_config(vocab_size: int) -> LlamaConfig:
    """About 1M parameters: four layers, 128 wide."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.05,  # wide enough for 128 channels; with .02 the first lookups take longer to appear
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def encode(pieces: list[Piece], vocabulary: dict[str, int]) -> tuple[list[int], list[int]]:
    """Ids and labels; only what the scene determines is a target."""
    ids: list[int] = []
    labels: list[int] = []
    for text, supervised in pieces:
        piece = [vocabulary[word] for word in words(text)]
        ids += piece
        labels += piece if supervised else [IGNORED] * len(piece)
    return ids, labels


def text_batch(seed: int, step: int, vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """Step `step`'s texts, half of them statements and half dialogues, padded at the right."""
    rng = random.Random(f"language {seed} {step}")
    rows = []
    for index in range(BATCH):
        scene = sample_scene(rng)
        pieces = dialogue(scene, rng, NUM_TURNS) if index % 2 else statements(scene, rng, NUM_STATEMENTS)
        rows.append(encode(pieces, vocabulary))
    length = min(MAX_TOKENS, max(len(ids) for ids, _ in rows))
    return {
        "input_ids": torch.tensor([ids[:length] + [PAD_ID] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels[:length] + [IGNORED] * (length - len(labels)) for _, labels in rows]),
    }


@torch.no_grad()
def answer_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_questions: int, seed: int
) -> dict[str, float]:
    """Share of evaluation questions answered in exactly the right word, by capability, with the scene given as text."""
    rng = random.Random(f"answers {seed}")
    model.eval()
    scores = {}
    for capability in CAPABILITIES:
        right = 0
        for _ in range(num_questions):
            question = None
            while question is None:
                scene = sample_scene(rng, "evaluation")
                question = ask(scene, capability, rng)
            turn = {"role": "user", "content": f"{caption(scene)}\n{question.text}"}
            prompt = tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_tensors="pt")
            answer = model(**prompt).logits[0, -1].argmax()
            right += tokenizer.decode(answer) == question.answer
        scores[capability] = right / num_questions
    return scores


def train_language_model(
    checkpoint: Path, num_steps: int, seed: int, recipe: dict[str, object]
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, float]:
    """The trained model, its tokenizer and the seconds of training."""
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(len(tokenizer)))

    def loss_at(step: int) -> Tensor:
        return model(**text_batch(seed, step, vocabulary)).loss

    seconds = fit(model, loss_at, num_steps=num_steps, peak=2e-3, recipe=recipe, directory=checkpoint)
    return model, tokenizer, seconds
