"""LLaVA-1.5's two stages, counted, and what they come to on 1 to 512 GPUs.

FLOPs and bytes are counted on tensors without memory, of the real shapes; rates and lengths are the constants below, of
which every one stands in docs/scale.md with its source.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vlmzoo.sweeps.costs import unweighted
from vlmzoo.training.recompute import recomputed
from vlmzoo.training.run import flop_counter

CONNECTORS = ("mlp", "c_abstractor", "perceiver", "qformer", "gated_cross_attention")
NUM_SEEDS = 3
CLUSTERS = (1, 8, 64, 512)
NODE = 8  # GPUs

MFU = 0.35  # needed FLOPs over the maker's peak
LINK_SHARE = 0.7  # of what a link or memory promises
FITS = 0.9  # of a GPU's memory: the rest is CUDA's, the allocator's and the libraries'
MICRO_TOKENS, MICRO_SAMPLES = 8192, 32  # that a GPU takes at once, whichever is reached first
LEAST_TOKENS = 512  # a GPU needs as long for fewer
SLACK = 1.15  # a plan with fewer GPUs a run is preferred where it takes no longer than so much
LORA_RANK = 128
DECODE_SECONDS = 0.010  # of a core, an image read and resized
DRIVE, SHARED = 5e9, 1e9  # bytes a second that a node reads from a local NVMe drive and from a network file system

PATCHES, VISION_DIM = 576, 1024
VOCABULARY = 32_000


@dataclass(frozen=True)
class Gpu:
    name: str
    flops: float  # a second, bf16, dense
    memory: float  # bytes
    bandwidth: float  # bytes a second
    link: float  # bytes a second and direction of a GPU in its node
    network: float  # bytes a second and direction of a node


A100 = Gpu("A100", 312e12, 80e9, 2.0e12, 300e9, 8 * 25e9)
H100 = Gpu("H100", 989e12, 80e9, 3.35e12, 450e9, 8 * 50e9)
H200 = Gpu("H200", 989e12, 141e9, 4.8e12, 450e9, 8 * 50e9)


@dataclass(frozen=True)
class Llm:
    """A Llama or Vicuna."""

    name: str
    dim: int
    inner: int
    layers: int

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.dim,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.dim // 128,
            attn_implementation="sdpa",
        )

    @property
    def layer_parameters(self) -> int:
        return 4 * self.dim**2 + 3 * self.dim * self.inner + 2 * self.dim

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.dim + 2 * VOCABULARY * self.dim

    @property
    def lora_parameters(self) -> int:
        """Two thin matrices beside each linear layer but the head."""
        return self.layers * LORA_RANK * (4 * 2 * self.dim + 3 * (self.dim + self.inner))


LLMS = (Llm("7B", 4096, 11008, 32), Llm("13B", 5120, 13824, 40))


@dataclass(frozen=True)
class Stage:
    name: str
    samples: int
    images: int  # samples with one; the others are text alone
    batch: int
    text: int  # tokens beside an image, on average
    text_alone: int  # of a sample without one
    targets: float  # the share of the text that is supervised
    trains_llm: bool


ALIGN = Stage("stage 1", 558_128, 558_128, 256, 24, 0, 0.95, False)
TUNE = Stage("stage 2", 665_298, 624_610, 128, 280, 1500, 0.45, True)
PUBLISHED = {("7B", "stage 1"): 3.5, ("13B", "stage 1"): 5.5, ("7B", "stage 2"): 10.0, ("13B", "stage 2"): 20.0}


# Counting


@dataclass(frozen=True)
class Count:
    forward: int  # FLOPs
    backward: int
    kept: int  # bytes for the backward pass, weights and their copies left out
    given_back: int  # of these, what the trainer computes again where it does not checkpoint
    parameters: int


def count(module: nn.Module, run: Callable[[], Tensor], *, backward: bool = True, autocast: bool = False) -> Count:
    """What a module costs forward and backward, on one sample."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    copies = {shape for p in module.parameters() for shape in (p.shape, p.shape[::-1]) if autocast and p.ndim == 2}
    kept: dict[int, int] = {}
    again: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and tensor.shape not in copies:
            (again if recomputed(tensor) else kept)[storage._cdata] = storage.nbytes()
        return tensor

    held: list[Tensor] = []  # storages must not be freed and their numbers used again
    with ExitStack() as stack:
        counter = stack.enter_context(flop_counter())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or keep(t), lambda t: t))
        if autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        output = run()
        forward = counter.get_total_flops()
        if backward:
            output.float().sum().backward()
        total = counter.get_total_flops()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    given_back = sum(size for key, size in again.items() if key not in kept)
    return Count(forward, total - forward, sum(kept.values()) + given_back, given_back, parameters)


@lru_cache
def encoder() -> Count:
    """CLIP-L/14 of one image at 336 pixels; frozen."""
    config = CLIPVisionConfig(
        hidden_size=VISION_DIM,
        intermediate_size=4 * VISION_DIM,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"), torch.no_grad():
        model = CLIPVisionModel(config).bfloat16()
        pixels = torch.zeros(1, 3, 336, 336, dtype=torch.bfloat16)
        return count(model, lambda: model(pixels).last_hidden_state, backward=False)


@lru_cache
def connector(name: str, llm: Llm, text: int) -> tuple[Count, int]:
    """A connector with its layers inside the LLM, of one image and so much text; and the image's slots."""
    parts = unweighted(name, VISION_DIM, llm.dim, text_layers=llm.layers)
    if text and not parts.connector.llm_layers():
        return connector(name, llm, 0)  # which no text passes
    for key, parameter in parts.connector.named_parameters():
        parameter.requires_grad_(key not in parts.connector.without_gradient)
    hidden = torch.zeros(1, text, llm.dim, dtype=torch.bfloat16, device="meta", requires_grad=True)
    parts = dataclasses.replace(parts, text=hidden)
    slots = parts.connector.num_tokens(parts.visual.layouts[0])
    return count(parts.connector, lambda: parts.run()[1]), slots


@lru_cache
def decoder_layer(llm: Llm, length: int, trained: bool) -> Count:
    """`counted_layer` at any length: a linear and a quadratic part, from two lengths."""
    short, long = counted_layer(llm, 256, trained), counted_layer(llm, 512, trained)

    def at(a: int, b: int) -> int:
        square = Fraction(b - 2 * a, 2 * 256**2)
        return int(square * length**2 + (Fraction(a, 256) - square * 256) * length)

    return Count(
        at(short.forward, long.forward),
        at(short.backward, long.backward),
        at(short.kept, long.kept),
        at(short.given_back, long.given_back),
        short.parameters,
    )


@lru_cache
def counted_layer(llm: Llm, length: int, trained: bool) -> Count:
    """One layer of the LLM over one sample: frozen in bf16, or trained in float32 and computed in bf16."""
    dtype = torch.float32 if trained else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():  # unlike the meta device it knows autocast and fused attention
            layer = LlamaDecoderLayer(llm.config, 0).requires_grad_(trained)
            hidden = torch.zeros(1, length, llm.dim, requires_grad=True)
            rotary = torch.zeros(1, length, 128)
            return count(layer, lambda: layer(hidden, position_embeddings=(rotary, rotary)), autocast=trained)
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Work:
    """Needed FLOPs of a sample, on average: no padding, no recomputed activations."""

    encoder: float
    connector: float
    llm_forward: float
    llm_backward: float
    head: float
    tokens: float  # that the LLM reads

    @property
    def flops(self) -> float:
        return self.encoder + self.connector + self.llm_forward + self.llm_backward + self.head


@lru_cache
def work(stage: Stage, name: str, llm: Llm, lora: bool = False) -> Work:
    trained = stage.trains_llm and not lora
    share = stage.images / stage.samples
    part, slots = connector(name, llm, stage.text)
    lengths = {slots + stage.text: share}
    if share < 1:
        lengths[stage.text_alone] = 1 - share
    layers = {length: decoder_layer(llm, length, trained) for length in lengths}
    tokens = sum(length * weight for length, weight in lengths.items())
    extra = llm.lora_parameters * tokens if lora and stage.trains_llm else 0.0
    targets = stage.targets * (share * stage.text + (1 - share) * stage.text_alone)
    head = 2 * VOCABULARY * llm.dim * targets
    return Work(
        encoder=share * encoder().forward,
        connector=share * (part.forward + part.backward),
        llm_forward=llm.layers * sum(w * layers[length].forward for length, w in lengths.items()) + 2 * extra,
        llm_backward=llm.layers * sum(w * layers[length].backward for length, w in lengths.items()) + 4 * extra,
        head=head * (3 if trained else 2),
        tokens=tokens,
    )


# Memory and communication

STRATEGIES = ("ddp", "zero2", "fsdp2", "zero3")
LORA = "ddp + LoRA"


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    weights: float  # and their copies in the type that is computed in
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def parameters(stage: Stage, name: str, llm: Llm, strategy: str) -> tuple[int, int]:
    """How many are trained and how many frozen."""
    part = connector(name, llm, stage.text)[0].parameters
    frozen = encoder().parameters
    if strategy == LORA:
        return part + llm.lora_parameters, frozen + llm.parameters
    return (part + llm.parameters, frozen) if stage.trains_llm else (part, frozen + llm.parameters)


def micro_batch(stage: Stage, name: str, llm: Llm) -> float:
    """Samples that a GPU takes at once."""
    return min(MICRO_SAMPLES, MICRO_TOKENS / (connector(name, llm, stage.text)[1] + stage.text))


def activations(stage: Stage, name: str, llm: Llm, *, checkpointing: bool = True, lora: bool = False) -> float:
    """Bytes of a micro-batch."""
    part, slots = connector(name, llm, stage.text)
    length = slots + stage.text
    trained = stage.trains_llm and not lora
    layer = decoder_layer(llm, length, trained)
    hidden = length * llm.dim * (4 if trained else 2)  # between two layers: float32 under autocast
    kept = layer.kept - layer.given_back
    llm_bytes = llm.layers * hidden + layer.kept if checkpointing else llm.layers * kept
    logits = (2 + 4 + 2) * VOCABULARY * stage.targets * stage.text  # them; their softmax, in float32; their gradient
    return micro_batch(stage, name, llm) * (llm_bytes + logits + part.kept)


def memory(stage: Stage, name: str, llm: Llm, strategy: str, gpus: int) -> Memory:
    """Trained weights, gradients and both moments are float32 (4 + 4 + 8 bytes), frozen weights bf16."""
    trained, frozen = parameters(stage, name, llm, strategy)
    active = activations(stage, name, llm, lora=strategy == LORA)
    if strategy in ("fsdp2", "zero3"):
        gathered = 2 * 6 * llm.layer_parameters  # this layer and the next: bf16 weights, float32 gradients
        copies = 2 * trained if strategy == "zero3" else 0  # autocast's, kept until the forward pass ends
        return Memory(
            (4 * trained + 2 * frozen) / gpus + gathered + copies, 4 * trained / gpus, 8 * trained / gpus, active
        )
    shards = gpus if strategy == "zero2" else 1
    return Memory(6 * trained + 2 * frozen, 4 * trained / shards, 8 * trained / shards, active)


def traffic(stage: Stage, name: str, llm: Llm, strategy: str, gpus: int) -> float:
    """Bytes that each GPU sends in a step. A sum over all GPUs passes each twice; sharing out or gathering, once."""
    trained, frozen = parameters(stage, name, llm, strategy)
    micro = micro_batches(stage, name, llm, gpus)
    once = (gpus - 1) / gpus
    if strategy == "zero2":
        return once * (4 * trained * micro + 4 * trained)
    if strategy in ("fsdp2", "zero3"):  # weights twice, forward and backward; zero3 gathers what it trains in float32
        width = 4 if strategy == "zero3" else 2
        return once * micro * (2 * (width * trained + 2 * frozen) + 4 * trained)
    return once * 2 * 4 * trained


def micro_batches(stage: Stage, name: str, llm: Llm, gpus: int) -> int:
    return math.ceil(stage.batch / gpus / micro_batch(stage, name, llm))


def host_memory(llm: Llm) -> float:
    """Bytes on a node: where weights are shared out, each process also keeps the whole model there."""
    return NODE * 4 * llm.parameters


# Time


@dataclass(frozen=True)
class Step:
    """Seconds; communication runs beside the computing, and only what takes longer than that is waited for."""

    computing: float
    communication: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return max(self.computing, self.communication) + self.optimizer


def step(stage: Stage, name: str, llm: Llm, strategy: str, gpu: Gpu, gpus: int) -> Step:
    trained, _ = parameters(stage, name, llm, strategy)
    sample = work(stage, name, llm, strategy == LORA)
    samples = max(stage.batch / gpus, LEAST_TOKENS / sample.tokens)
    return Step(
        computing=samples * sample.flops / (MFU * gpu.flops),
        communication=traffic(stage, name, llm, strategy, gpus) / (LINK_SHARE * link(gpu, gpus)),
        # AdamW reads weight, gradient and moments, and writes all but the gradient.
        optimizer=28 * trained / (1 if strategy in ("ddp", LORA) else gpus) / (LINK_SHARE * gpu.bandwidth),
    )


def link(gpu: Gpu, gpus: int) -> float:
    """A ring through several nodes leaves each by every network card, so that a GPU's share is the node's rate."""
    return gpu.link if gpus <= NODE else min(gpu.link, gpu.network)


def hours(stage: Stage, name: str, llm: Llm, gpu: Gpu, gpus: int, strategy: str) -> float | None:
    """None: it does not fit."""
    if memory(stage, name, llm, strategy, gpus).total > FITS * gpu.memory:
        return None
    return step(stage, name, llm, strategy, gpu, gpus).seconds * math.ceil(stage.samples / stage.batch) / 3600


def stage_hours(name: str, llm: Llm, gpu: Gpu, gpus: int, *, lora: bool = False) -> tuple[float, float] | None:
    """Both stages with the fastest strategy in which both fit; None: there is none."""
    found = []
    for strategy in [LORA] if lora else STRATEGIES:
        first = hours(ALIGN, name, llm, gpu, gpus, "ddp" if lora else strategy)
        second = hours(TUNE, name, llm, gpu, gpus, strategy)
        if first is not None and second is not None:
            found.append((first, second))
    return min(found, key=sum, default=None)


def run_hours(name: str, llm: Llm, gpu: Gpu, gpus: int, *, lora: bool = False) -> float | None:
    found = stage_hours(name, llm, gpu, gpus, lora=lora)
    return None if found is None else sum(found)


@dataclass(frozen=True)
class Plan:
    """So many GPUs a run, so many runs at a time, longest first."""

    hours: float
    gpus: int
    at_once: int
    lora: bool


def plan(llm: Llm, gpu: Gpu, cluster: int) -> Plan | None:
    """The fastest way through all connectors and seeds, with LoRA only where nothing else fits; None: no way does."""
    sizes = [2**power for power in range(int(math.log2(min(cluster, TUNE.batch))) + 1)]
    for lora in (False, True):
        found = []
        for gpus in sizes:
            times = [run_hours(name, llm, gpu, gpus, lora=lora) for name in CONNECTORS]
            if None in times:
                continue
            at_once = min(cluster // gpus, NUM_SEEDS * len(CONNECTORS))
            lanes = [0.0] * at_once
            for time in sorted((t for t in times if t is not None for _ in range(NUM_SEEDS)), reverse=True):
                heapq.heapreplace(lanes, lanes[0] + time)
            found.append(Plan(max(lanes), gpus, at_once, lora))
        if found:
            best = min(plan.hours for plan in found)
            return next(plan for plan in found if plan.hours <= SLACK * best)
    return None
