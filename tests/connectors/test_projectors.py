"""Connectors that transformers has too, against its modules; and against them with a fault in ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    AriaConfig,
    CLIPVisionConfig,
    DeformableDetrConfig,
    Gemma3Config,
    Idefics2Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    Ovis2Config,
    PerceptionLMConfig,
    SiglipVisionConfig,
    VipLlavaConfig,
)
from transformers.models.aria.modeling_aria import AriaProjector
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionModel, Ovis2VisualEmbeddingTable
from transformers.models.perception_lm.modeling_perception_lm import PerceptionLMMultiModalProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

from tests.connectors.parts import TEXT, VISION, adapted, copy_weights, create, distance, rescale, visual_input
from vlmzoo.connectors._layers import gelu_tanh

GRID = (4, 4)
LLAMA = LlamaConfig(hidden_size=TEXT.hidden_size, rms_norm_eps=TEXT.norm_eps)
CLIP = CLIPVisionConfig(hidden_size=VISION.hidden_size, layer_norm_eps=VISION.norm_eps)


@dataclass(frozen=True)
class Case:
    """A connector of ours, transformers' module, how that is called, and what turns our names into its."""

    name: str
    options: dict[str, Any]
    build: Callable[[], nn.Module]
    call: Callable[[Any, Tensor], Tensor]
    renames: Sequence[tuple[str, Any]] = ()
    layers: int = 1
    grid: tuple[int, int] = GRID

    def pair(self) -> tuple[Any, nn.Module]:
        theirs = self.build()
        rescale(theirs)
        ours = create(self.name, self.options)
        copy_weights(theirs, ours, self.renames)
        return ours, theirs

    def difference(self, ours: Any, theirs: nn.Module) -> float:
        generator = torch.Generator().manual_seed(3)
        height, width = self.grid
        patches = torch.randn(2, height * width, self.layers * VISION.hidden_size, generator=generator)
        found = adapted(ours)(visual_input(patches, [self.grid] * 2)).tokens
        return distance(found, self.call(theirs, patches))


def internvl_call(theirs: Any, patches: Tensor) -> Tensor:
    maps = rearrange(patches, "b (h w) d -> b h w d", h=4)
    shuffled = InternVLModel.pixel_shuffle(theirs, maps, 0.5)
    return theirs(shuffled.flatten(1, 2))


def in_blocks(theirs: nn.Module, patches: Tensor) -> Tensor:
    """Qwen2-VL's encoder gives the patches of a block one behind the other."""
    blocks = rearrange(patches, "b (h r w c) d -> (b h w r c) d", h=2, r=2, c=2)
    return theirs(blocks).unflatten(0, (len(patches), -1))


def mistral_call(theirs: Any, patches: Tensor) -> Tensor:
    size = theirs.patch_merger.patch_size
    sizes = torch.tensor([[4 * size, 4 * size]] * len(patches))
    return theirs(patches.flatten(0, 1), sizes).unflatten(0, (len(patches), -1))


class Gemma(nn.Module):
    """transformers' module with its parameters as ours are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(VISION.hidden_size))
        self.project = nn.Parameter(torch.zeros(TEXT.hidden_size, VISION.hidden_size))

    def forward(self, patches: Tensor) -> Tensor:
        vision = SiglipVisionConfig(
            hidden_size=VISION.hidden_size, layer_norm_eps=VISION.norm_eps, image_size=56, patch_size=14
        )
        text = {"hidden_size": TEXT.hidden_size}
        inner = Gemma3MultiModalProjector(
            Gemma3Config(vision_config=vision.to_dict(), text_config=text, mm_tokens_per_image=4)
        )
        with torch.no_grad():
            inner.mm_soft_emb_norm.weight.copy_(self.norm)
            inner.mm_input_projection_weight.copy_(self.project.T)
        return inner(patches)


class Ovis(nn.Module):
    """transformers' head and table behind a transformer that returns what it is given."""

    def __init__(self) -> None:
        super().__init__()
        config = Ovis2Config(
            vision_config={
                "hidden_size": VISION.hidden_size,
                "hidden_stride": 2,
                "vocab_size": 45,
                "num_visual_indicator_tokens": 5,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 8,
            }
        )
        inner = Ovis2VisionModel(config.vision_config)
        inner.transformer = Given()
        self.vision = inner
        self.table = Ovis2VisualEmbeddingTable(40, TEXT.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.table(self.vision(pixel_values=patches).pooler_output)


class Honeybee(nn.Module):
    """transformers' Deformable DETR layers, fed as Honeybee feeds them."""

    def __init__(self) -> None:
        super().__init__()
        config = DeformableDetrConfig(
            d_model=16,
            decoder_attention_heads=2,
            decoder_n_points=3,
            decoder_ffn_dim=20,
            num_feature_levels=1,
            dropout=0.0,
            disable_custom_kernels=True,
        )
        config._attn_implementation = "eager"
        self.embed = nn.Linear(VISION.hidden_size, 16)
        self.positions = nn.Parameter(torch.zeros(16, 4, 4))
        self.queries = nn.Parameter(torch.zeros(4, 16))
        self.places = nn.Parameter(torch.zeros(4, 2))
        self.layers = nn.ModuleList(DeformableDetrDecoderLayer(config) for _ in range(2))
        self.project = nn.Linear(16, TEXT.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        features = self.embed(patches) + self.positions.flatten(1).T
        pooled = F.adaptive_avg_pool2d(rearrange(features, "b (h w) d -> b d h w", h=4), 2).flatten(2).mT
        hidden = self.queries.expand(len(patches), -1, -1)
        for layer in self.layers:
            hidden = layer(
                hidden,
                object_queries_position_embeddings=pooled,
                reference_points=self.places.expand(len(patches), -1, -1)[:, :, None],
                spatial_shapes=torch.tensor([[4, 4]]),
                spatial_shapes_list=[(4, 4)],
                level_start_index=torch.tensor([0]),
                encoder_hidden_states=features,
            )
        return self.project(hidden)


class Given(nn.Module):
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return (pixel_values,)


def idefics2_module() -> nn.Module:
    text = MistralConfig(hidden_size=TEXT.hidden_size, intermediate_size=TEXT.intermediate_size)
    perceiver = {
        "hidden_size": TEXT.hidden_size,
        "resampler_n_latents": 5,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 6,
        "num_key_value_heads": 2,
    }
    vision = {"hidden_size": VISION.hidden_size}
    return Idefics2Connector(Idefics2Config(vision_config=vision, text_config=text, perceiver_config=perceiver))


def aria_module() -> nn.Module:
    vision = {"hidden_size": VISION.hidden_size, "num_attention_heads": VISION.num_heads}
    counts = {9: 3, 16: 6}
    text = {"hidden_size": TEXT.hidden_size}
    config = AriaConfig(vision_config=vision, text_config=text, projector_patch_to_query_dict=counts)
    return Unpacked(AriaProjector(config))


def masked(theirs: nn.Module, patches: Tensor) -> Tensor:
    return theirs(patches, torch.ones(patches.shape[:2], dtype=torch.bool))


class Unpacked(nn.Module):
    """A module whose `nn.MultiheadAttention` shows its three projections apart."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Tensor:
        return self.inner(*args)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.inner.named_parameters():
            if "in_proj_" in name:
                parts = zip(("query", "key", "value"), parameter.chunk(3), strict=True)
                yield from ((name.replace("in_proj_", f"{part}."), value) for part, value in parts)
            else:
                yield name, parameter


CASES = {
    "vip_llava": Case(
        "vip_llava",
        {"layers": (-2, -5, 6)},
        lambda: VipLlavaMultiModalProjector(
            VipLlavaConfig(vision_config=CLIP, text_config=LLAMA, vision_feature_layers=(-2, -5, 6))
        ),
        lambda theirs, patches: theirs(patches),
        [("^norm", "projector_layernorm"), ("^project.up", "linear_1"), ("^project.down", "linear_2")],
        layers=3,
    ),
    "internvl": Case(
        "internvl",
        {},
        lambda: InternVLMultiModalProjector(
            InternVLConfig(vision_config={"hidden_size": VISION.hidden_size}, text_config=LLAMA)
        ),
        internvl_call,
        [("^norm", "layer_norm"), ("^project.up", "linear_1"), ("^project.down", "linear_2")],
    ),
    "idefics3": Case(
        "idefics3",
        {},
        lambda: Idefics3Connector(
            Idefics3Config(vision_config={"hidden_size": VISION.hidden_size}, text_config=LLAMA, scale_factor=2)
        ),
        lambda theirs, patches: theirs(patches),
        [("^project", "modality_projection.proj")],
    ),
    "smolvlm": Case(
        "idefics3",
        {"factor": 4},
        lambda: Idefics3Connector(
            Idefics3Config(vision_config={"hidden_size": VISION.hidden_size}, text_config=LLAMA, scale_factor=4)
        ),
        lambda theirs, patches: theirs(patches),
        [("^project", "modality_projection.proj")],
    ),
    "qwen2_vl": Case(
        "qwen2_vl",
        {},
        lambda: PatchMerger(TEXT.hidden_size, VISION.hidden_size),
        in_blocks,
        [("^merger.norm", "ln_q"), ("^merger.project.up", "mlp.0"), ("^merger.project.down", "mlp.2")],
    ),
    "qwen2_5_vl": Case(
        "qwen2_vl",
        {"norm": "rms"},
        lambda: Qwen2_5_VLPatchMerger(TEXT.hidden_size, VISION.hidden_size),
        in_blocks,
        [("^merger.norm", "ln_q"), ("^merger.project.up", "mlp.0"), ("^merger.project.down", "mlp.2")],
    ),
    "mistral3": Case(
        "mistral3",
        {},
        lambda: Mistral3MultiModalProjector(
            Mistral3Config(vision_config={"hidden_size": VISION.hidden_size}, text_config=LLAMA)
        ),
        mistral_call,
        [
            ("^merge", "patch_merger.merging_layer"),
            ("^project.up", "linear_1"),
            ("^project.down", "linear_2"),
        ],
    ),
    "gemma3": Case("gemma3", {"factor": 2}, Gemma, lambda theirs, patches: theirs(patches), [(".weight", "")]),
    "idefics2": Case(
        "idefics2",
        {"num_latents": 5, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
        idefics2_module,
        masked,
        [
            (r"^project\.", "modality_projection."),
            (r"^(?!modality)", "perceiver_resampler."),
            ("attention.query", "self_attn.q_proj"),
            ("attention.key", "self_attn.k_proj"),
            ("attention.value", "self_attn.v_proj"),
            ("attention.out", "self_attn.o_proj"),
            ("media_norm", "input_context_norm"),
            ("latent_norm", "input_latents_norm"),
            ("feed_forward_norm", "post_attention_layernorm"),
            ("feed_forward", "mlp"),
            (r"(gate|up|down)\.", r"\1_proj."),
        ],
    ),
    "ovis": Case(
        "ovis",
        {"vocab_size": 40, "factor": 2},
        Ovis,
        lambda theirs, patches: theirs(patches),
        [("^head", "vision.head_linear"), ("^norm", "vision.head_norm")],
    ),
    "aria": Case(
        "aria",
        {"num_queries": 3, "many_patches": 9},
        aria_module,
        lambda theirs, patches: theirs(patches),
        [
            ("^queries", "query"),
            (r"^(query|key|value)\.", lambda m: f"cross_attn.{m[1][0]}_proj."),
            (r"^attention\.out", "cross_attn.multihead_attn.out_proj"),
            (r"^attention\.", "cross_attn.multihead_attn."),
            ("^out", "cross_attn.linear"),
            ("^query_norm", "cross_attn.layer_norm"),
            ("^memory_norm", "cross_attn.layer_norm_kv"),
            ("^norm", "layer_norm"),
            (r"^project\.up", "feed_forward.linear_in"),
            (r"^project\.down", "feed_forward.linear_out"),
        ],
    ),
}
CASES["perception_lm"] = Case(
    "perception_lm",
    {},
    lambda: PerceptionLMMultiModalProjector(
        PerceptionLMConfig(
            vision_config={"model_args": {"embed_dim": VISION.hidden_size}},
            text_config=LLAMA,
            projector_pooling_ratio=2,
        )
    ),
    lambda theirs, patches: theirs(patches),
    [("^project.up", "linear_1"), ("^project.down", "linear_2")],
)
CASES["d_abstractor"] = Case(
    "d_abstractor",
    {
        "side": 2,
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "num_points": 3,
        "intermediate_size": 20,
        "position_side": 4,
    },
    lambda: Honeybee(),
    lambda theirs, patches: theirs(patches),
    [
        (r"self_attention\.(query|key|value)", lambda m: f"self_attn.{m[1][0]}_proj"),
        (r"self_attention\.out", "self_attn.o_proj"),
        ("self_attention_norm", "self_attn_layer_norm"),
        (r"deformable\.offsets", "encoder_attn.sampling_offsets"),
        (r"deformable\.weights", "encoder_attn.attention_weights"),
        (r"deformable\.value", "encoder_attn.value_proj"),
        (r"deformable\.out", "encoder_attn.output_proj"),
        ("deformable_norm", "encoder_attn_layer_norm"),
        ("feed_forward_norm", "final_layer_norm"),
        (r"feed_forward\.up", "mlp.fc1"),
        (r"feed_forward\.down", "mlp.fc2"),
    ],
)
CASES["aria, few patches"] = replace(CASES["aria"], grid=(3, 3))


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str) -> None:
    ours, theirs = CASES[case].pair()
    assert CASES[case].difference(ours, theirs) <= 1e-4


def without(part: str) -> Callable[[Any], None]:
    """A layer left out."""

    def fault(ours: Any) -> None:
        *parents, last = part.split(".")
        setattr(ours.get_submodule(".".join(parents)), last, nn.Identity())

    return fault


def other_activation(ours: Any) -> None:
    ours = getattr(ours, "merger", ours)
    ours.project.activation = F.gelu if ours.project.activation is gelu_tanh else gelu_tanh


def layers_reversed(ours: Any) -> None:
    honest = ours.forward
    ours.forward = lambda patches, grid: honest(torch.cat(patches.chunk(3, -1)[::-1], -1), grid)


def turned(ours: Any) -> None:
    """Blocks by columns instead of rows."""
    honest = ours.forward

    def forward(patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return honest(rearrange(patches, "b (h r w c) d -> b (h c w r) d", h=2, r=2, c=2), grid)

    ours.forward = forward


def channels(order: str) -> Callable[[Any], None]:
    """The channels of a block in another order."""

    def fault(ours: Any) -> None:
        linear = ours.merge if hasattr(ours, "merge") else getattr(ours.project, "up", ours.project)
        with torch.no_grad():
            linear.weight.copy_(rearrange(linear.weight.clone(), order, r=2, c=2))

    return fault


def highest_instead_of_mean(ours: Any) -> None:
    honest = ours.forward

    def forward(patches: Tensor, grid: tuple[int, int]) -> Tensor:
        best = rearrange(patches, "b (h r w c) d -> b (h w) (r c) d", h=2, r=2, c=2).amax(2, keepdim=True)
        return honest(rearrange(best.expand(-1, -1, 4, -1), "b (h w) (r c) d -> b (h r w c) d", h=2, r=2), grid)

    ours.forward = forward


def heads_in_turns(ours: Any) -> None:
    for layer in ours.layers:
        layer.attention._shared = lambda x: torch.cat([x, x], dim=2)


def no_latents_among_keys(ours: Any) -> None:
    for layer in ours.layers:
        honest = layer.attention.forward
        layer.attention.forward = lambda q, media, latents, mask, honest=honest: honest(
            q, media, None, mask[..., : media[0].shape[1]]
        )


def exact_gelu_gate(ours: Any) -> None:
    ours.project.activation = F.gelu


def one_layer_less(ours: Any) -> None:
    ours.layers = ours.layers[:-1]


def norms_swapped(ours: Any) -> None:
    for layer in ours.layers:
        layer.media_norm, layer.latent_norm = layer.latent_norm, layer.media_norm


def hard(ours: Any) -> None:
    """One word instead of a mixture."""
    honest = ours.norm.forward
    ours.norm.forward = lambda x: 1e4 * honest(x)


def last_queries(ours: Any) -> None:
    ours.queries = nn.Parameter(ours.queries.detach().flip(0))


def keys_are_values(ours: Any) -> None:
    ours.value.weight = ours.key.weight


def turned_before(ours: Any) -> None:
    """The image mirrored along its diagonal."""
    honest = ours.forward
    ours.forward = lambda patches, grid: honest(patches.unflatten(1, grid).transpose(1, 2).flatten(1, 2), grid)


def places_turned(ours: Any) -> None:
    ours.places = nn.Parameter(ours.places.detach().flip(-1))


def values_placed(ours: Any) -> None:
    """Self-attention whose values have positions too."""
    for layer in ours.layers:
        attention, seen = layer.self_attention, []
        keys, values = attention.keys, attention.values
        attention.keys = lambda memory, keys=keys, seen=seen: keys(seen.append(memory) or memory)
        attention.values = lambda memory, values=values, seen=seen: values(seen[-1])


def weights_forgotten(ours: Any) -> None:
    for layer in ours.layers:
        nn.init.zeros_(layer.deformable.weights.weight)


def corners_aligned(ours: Any) -> None:
    for layer in ours.layers:
        honest = layer.deformable.forward
        layer.deformable.forward = lambda queries, places, features, grid, honest=honest: honest(
            queries, places * (grid[0] - 1) / grid[0], features, grid
        )


FAULTS = [
    ("vip_llava", without("norm")),
    ("vip_llava", other_activation),
    ("vip_llava", layers_reversed),
    ("internvl", without("norm")),
    ("internvl", other_activation),
    ("internvl", turned),
    ("internvl", channels("o (r c d) -> o (d r c)")),
    ("idefics3", turned),
    ("idefics3", channels("o (r c d) -> o (c r d)")),
    ("qwen2_vl", without("merger.norm")),
    ("qwen2_vl", other_activation),
    ("qwen2_vl", turned),
    ("qwen2_5_vl", without("merger.norm")),
    ("mistral3", without("norm")),
    ("mistral3", other_activation),
    ("mistral3", turned),
    ("mistral3", channels("o (d r c) -> o (r c d)")),
    ("gemma3", without("norm")),
    ("gemma3", highest_instead_of_mean),
    ("idefics2", heads_in_turns),
    ("idefics2", no_latents_among_keys),
    ("idefics2", exact_gelu_gate),
    ("idefics2", one_layer_less),
    ("idefics2", norms_swapped),
    ("idefics2", without("norm")),
    ("ovis", without("norm")),
    ("ovis", hard),
    ("ovis", turned),
    ("aria", without("norm")),
    ("aria", without("query_norm")),
    ("aria", without("memory_norm")),
    ("aria", without("out")),
    ("aria", other_activation),
    ("aria, few patches", last_queries),
    ("aria", keys_are_values),
    ("perception_lm", other_activation),
    ("perception_lm", turned_before),
    ("d_abstractor", places_turned),
    ("d_abstractor", one_layer_less),
    ("d_abstractor", values_placed),
    ("d_abstractor", weights_forgotten),
    ("d_abstractor", corners_aligned),
]


@pytest.mark.parametrize(("case", "fault"), FAULTS)
def test_the_comparison_sees(case: str, fault: Callable[[Any], None]) -> None:
    ours, theirs = CASES[case].pair()
    fault(ours)
    assert CASES[case].difference(ours, theirs) > 1e-4


def test_ovis_fills_its_blocks_with_zeros() -> None:
    ours = create("ovis", {"vocab_size": 40, "factor": 2})
    rescale(ours)
    patches = torch.randn(2, 3, 3, VISION.hidden_size, generator=torch.Generator().manual_seed(0))
    filled = F.pad(patches, (0, 0, 0, 1, 0, 1))
    assert torch.equal(ours(patches.flatten(1, 2), (3, 3)), ours(filled.flatten(1, 2), (4, 4)))
