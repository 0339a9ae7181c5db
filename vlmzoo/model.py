"""Encoder, connector and LLM as one transformers model: encode, connect, splice, decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmzoo import build
from vlmzoo.config import ConnectorConfig, EncoderConfig, LLMConfig, RunConfig, parse
from vlmzoo.connector import (
    Connector,
    FeatureMap,
    ImageLayout,
    Instruction,
    Layer,
    LayerContext,
    VisualInput,
)
from vlmzoo.data.layout import BatchLayout
from vlmzoo.language.layers import ARGUMENT, InLLMCall, attach, check_reached, take_rows
from vlmzoo.language.loss import summed_cross_entropy
from vlmzoo.language.masks import block_masks, prefix_blocks
from vlmzoo.language.packing import Packing
from vlmzoo.language.positions import grid_offsets, has_axes, on_grids, token_grids
from vlmzoo.splice import (
    VisualContext,
    arrange,
    assign_images,
    gather_slots,
    hide_unfilled,
    last_visible,
    positions,
    splice,
    token_of_slot,
)
from vlmzoo.vision.encoder import VisionEncoder

IGNORE = -100
IMAGE_INPUTS = (
    "pixel_values",
    "image_features",
    "num_crops",
    "crop_sizes",
    "tilings",
    "image_sizes",
    "token_budget",
    "instruction_ids",
    "instruction_mask",
)
"""What `encode_images` takes, and `forward` and `generate` for it."""


class VisionLanguageConfig(PreTrainedConfig):
    """What a saved model needs to be built again: both halves' configurations, the connector and its options."""

    model_type = "vlmzoo"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: str = "linear",
        connector_options: dict[str, Any] | None = None,
        plugin: dict[str, str] | None = None,  # {"file": name, "sha256": hash} of the file that registered it
        vision_layer: Layer = -2,
        image_size: int | None = None,
        image_token_id: int = -1,
        bidirectional: Literal["image", "prefix"] | None = None,
        **kwargs: Any,
    ) -> None:
        text_config = _config(text_config, "llama")
        kwargs.setdefault("tie_word_embeddings", getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)  # before the halves are there, whose attention it would reset
        self.vision_config = _config(vision_config, "clip_vision_model")
        self.text_config = text_config
        self.connector = connector
        self.connector_options = connector_options or {}
        self.plugin = plugin
        self.vision_layer: Layer = vision_layer
        self.image_size = image_size
        self.image_token_id = image_token_id
        self.bidirectional = bidirectional  # whose tokens see one another: an image's, or all before the first target


def _config(value: PreTrainedConfig | dict[str, Any] | None, default: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    values = dict(value or {})
    return AutoConfig.for_model(values.pop("model_type", default), **values)


class VisionLanguageModel(PreTrainedModel, GenerationMixin):
    """A vision encoder, a connector and a causal LM.

    `forward` and `generate` take what transformers' own image-text models take. In `input_ids` each image stands as
    `num_tokens(layout)` copies of `config.image_token_id`, images in the order of their placeholders, sample by
    sample. That id need not be in the LLM's vocabulary.
    """

    config: VisionLanguageConfig
    config_class = VisionLanguageConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: VisionLanguageConfig,
        *,
        vision: PreTrainedModel | None = None,
        connector: Connector | None = None,
        language: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        tower: Any = vision if vision is not None else build.new_tower(config.vision_config)
        decoder: Any = language if language is not None else AutoModelForCausalLM.from_config(config.text_config)
        self.vision = VisionEncoder(tower, layer=config.vision_layer, image_size=config.image_size)
        self.language: PreTrainedModel = decoder
        self.text_spec = build.text_spec(decoder.config)
        if connector is None:
            build.check_plugin(config.connector, config.plugin)
            connector = build.connector(
                config.connector, config.connector_options, vision=self.vision.spec, text=self.text_spec
            )
        if connector.requires.cls_attention:
            tower.set_attn_implementation("eager")  # the others do not say how much they attended
        self.connector = connector
        self.in_llm_layers = connector.llm_layers()
        attach(decoder)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        encoder: str | dict[str, Any] | EncoderConfig | PreTrainedModel,
        connector: str | dict[str, Any] | ConnectorConfig | Connector,
        llm: str | dict[str, Any] | LLMConfig | PreTrainedModel,
        *,
        image_token_id: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> VisionLanguageModel:
        """A new model of parts that are named, configured as in a run's YAML, or modules.

        Args:
            image_token_id: None: the id that the LLM's tokenizer gives to `<image>`, or for a module the first one
                outside its vocabulary.
            seed: of the connector's initialisation.
        """
        if not isinstance(encoder, PreTrainedModel):
            encoder_config = parse(EncoderConfig, encoder) if isinstance(encoder, str | dict) else encoder
            encoder = build.vision(encoder_config, dtype=dtype)
        else:
            encoder_config = EncoderConfig()
        if not isinstance(llm, PreTrainedModel):
            llm_config = parse(LLMConfig, llm) if isinstance(llm, str | dict) else llm
            if image_token_id is None and (llm_config.tokenizer or llm_config.name):
                image_token_id = build.image_token_id(build.tokenizer(llm_config))
            llm = build.language(llm_config, dtype=dtype)
        text = build.text_spec(llm.config)
        config = VisionLanguageConfig(
            encoder.config,
            llm.config,
            vision_layer=encoder_config.layer,
            image_size=encoder_config.image_size,
            image_token_id=text.vocab_size if image_token_id is None else image_token_id,
            bidirectional=getattr(llm.config, "bidirectional", None),  # of a model that this LLM was taken from
        )
        if not isinstance(connector, Connector):
            named = parse(ConnectorConfig, connector) if isinstance(connector, str | dict) else connector
            spec = VisionEncoder(encoder, layer=encoder_config.layer).spec
            config.connector = named.name
            connector = build.connector(named.name, named.options, vision=spec, text=text, seed=seed)
            config.connector_options = build.connector_options(named)
            config.plugin = build.plugin_of(named.name)
            connector = connector.to(dtype)
        return cls(config, vision=encoder, connector=connector, language=llm)

    @classmethod
    def of_run(cls, run: RunConfig) -> VisionLanguageModel:
        """A run's model before its first step; all its connector draws comes from the run's own seed."""
        dtype = getattr(torch, run.dtype)
        return cls.from_parts(run.encoder, run.connector, run.llm, seed=run.seed.init, dtype=dtype)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the encoder and the LLM initialise themselves, and a connector's constructor has done it."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language.get_decoder()

    def checkpoint_activations(self, enabled: bool) -> None:
        """Has the backward pass compute activations again, or not, in all parts that can."""
        if enabled == any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            return
        name = f"checkpointing_{'enable' if enabled else 'disable'}"
        new, old = f"activation_{name}", f"gradient_{name}"  # transformers 5.17 knows the old name alone
        getattr(self, new if hasattr(self, new) else old)()

    def num_tokens(self, layout: ImageLayout) -> int:
        """The slots one image takes in `input_ids`."""
        return self.connector.num_tokens(layout)

    def encode_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Sequence[FeatureMap] | None = None,
        *,
        num_crops: Tensor | None = None,
        crop_sizes: Tensor | None = None,
        tilings: Tensor | None = None,
        image_sizes: Tensor | None = None,
        token_budget: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        num_slots: Sequence[int] | None = None,
        idle: bool = False,
    ) -> VisualContext:
        """The images as the LLM gets them.

        Args:
            input_ids: (batch, length), with the images' slots.
            num_slots: of each sample, where it is known on the host.
            idle: the images are no sample's.
            pixel_values: (crops, 3, height, width), or
            image_features: what `vision.encode` gave for them.
            num_crops: (images,), where an image has several.
            crop_sizes: (crops, 2), height and width in pixels, where crops are padded on the right and below.
            tilings: (images, 2), rows and columns of crops, for an encoder with a fixed number of places for them; the
                image's other crops are empty.
            image_sizes: (images, 2), height and width in pixels of the originals, for connectors that need them.
            token_budget: (images,), for connectors that can make fewer tokens of an image than they might.
            instruction_ids, instruction_mask: (images, length), for connectors that read the instruction.

        Raises:
            ValueError: the slots of a sample are not those that its images need.
        """
        if num_slots is None:
            num_slots = (input_ids == self.config.image_token_id).sum(1).tolist()
        request = self.connector.requires
        if image_features is None:
            assert pixel_values is not None
            image_features = self.vision.encode(pixel_values, request, _pairs(crop_sizes), _pairs(tilings))
        grids = iter(image_features[0].grids)
        crops = [1] * len(image_features[0].grids) if num_crops is None else num_crops.tolist()
        budgets = [None] * len(crops) if token_budget is None else token_budget.tolist()
        sizes = _pairs(image_sizes) or [None] * len(crops)
        tiled = _pairs(tilings) or [None] * len(crops)
        for name, given in (("token_budget", budgets), ("image_sizes", sizes), ("tilings", tiled)):
            if len(given) != len(crops):
                raise ValueError(f"{name} is given for {len(given)} of {len(crops)} images")
        layouts = [
            ImageLayout(tuple(next(grids) for _ in range(count)), size, budget, tiling)
            for count, size, budget, tiling in zip(crops, sizes, budgets, tiled, strict=True)
        ]
        instruction = None
        if request.instruction:
            if instruction_ids is None or instruction_mask is None:
                raise ValueError(f"connector {self.config.connector!r} reads the instruction: pass instruction_ids")
            instruction = Instruction(instruction_ids, instruction_mask.bool())
        dtype = self.connector_dtype
        device = input_ids.device
        visual = VisualInput(
            maps=tuple(_cast(features, dtype, device) for features in image_features),
            image_of_crop=torch.tensor([image for image, count in enumerate(crops) for _ in range(count)]).to(
                device, non_blocking=True
            ),
            sample_of_image=torch.zeros(len(crops), dtype=torch.long, device=device),
            layouts=tuple(layouts),
            instruction=instruction,
        )
        slots = [self.connector.num_tokens(layout) for layout in visual.layouts]
        samples = [[] for _ in num_slots] if idle else assign_images(slots, num_slots)
        owners = [sample for sample, images in enumerate(samples) for _ in images] or [0] * len(slots)
        visual.sample_of_image = torch.tensor(owners, device=input_ids.device)
        context = arrange(self.connector(visual), samples, slots)
        if has_axes(self.language.config) and not idle:
            grids = [token_grids(self.connector, layout) for layout in visual.layouts]
            by_sample = [[grid for image in images for grid in grids[image]] for images in samples]
            context.offsets = grid_offsets(by_sample).to(input_ids.device)
        return context

    def take_images(self, kwargs: dict[str, Any], pixel_values: Tensor | None, input_ids: Tensor) -> dict[str, Any]:
        """The inputs of the images of a prompt, taken out of a call's keywords; none where no image is passed."""
        images = {"pixel_values": pixel_values, **{key: kwargs.pop(key) for key in IMAGE_INPUTS if key in kwargs}}
        return {} if images["pixel_values"] is None and images.get("image_features") is None else images

    @property
    def connector_dtype(self) -> torch.dtype:
        """The connector's own, or the LLM's where it has no parameters."""
        return next(iter(self.connector.parameters()), next(self.language.parameters())).dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        pixel_values: Tensor | None = None,
        visual: VisualContext | None = None,
        labels: Tensor | None = None,
        blocks: Tensor | None = None,
        layout: BatchLayout | None = None,
        packing: bool = False,
        idle_images: dict[str, Any] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where `labels` are given.

        Args:
            pixel_values: and whatever else `encode_images` takes (`IMAGE_INPUTS`), or
            visual: what it gave; pass that again at each cached step.
            labels: (batch, length), -100 where there is no target. The loss is the sum over targets divided by
                `num_items_in_batch`, or by their own number. Logits then are (1, targets, vocab_size): those of
                supervised positions, sample after sample.
            blocks: (batch, length), tokens of one block see one another, -1: none; instead of `config.bidirectional`.
            layout: of this batch, where it is known on the host, so that nothing waits for the device.
            idle_images: what `encode_images` takes for images that no sample sees: where a batch has none, so that
                processes that share a step run the same modules.
            packing: the LLM computes no padding (`vlmzoo.language.packing.packs` prepares it).

        Raises:
            ValueError: images and slots do not fit, or this LLM cannot be packed.
        """
        images = self.take_images(kwargs, pixel_values, input_ids)
        if layout is None and labels is not None:
            layout = BatchLayout.of_tensors(input_ids, labels, self.config.image_token_id)
        if visual is None and images:
            visual = self.encode_images(input_ids, **images, num_slots=layout.slots if layout else None)
        elif visual is None and idle_images is not None:
            visual = self.encode_images(input_ids, **idle_images, idle=True)
        blocks = kwargs.pop("blocks", blocks)  # where `take_images` made them
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        is_image = input_ids == self.config.image_token_id
        embeds = self.language.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        padded_right, visible = layout is not None and layout.lengths is not None, None
        if visual is None:
            if any(layout.slots) if layout else is_image.any():
                raise ValueError(f"input_ids hold {int(is_image.sum())} image slots, but no image was passed")
            call = InLLMCall(self.in_llm_layers, LayerContext(None, None, torch.full_like(input_ids, -1)), {})
        else:
            slot = visual.slot_of_token(is_image)
            embeds, unfilled = splice(embeds, visual, is_image, slot)
            shown = hide_unfilled(attention_mask, unfilled, cached, visual)
            if shown is not attention_mask:
                padded_right, attention_mask, visible = False, shown, shown
            if visual.unfilled_prompt is not None and visual.unfilled_prompt.any():
                position_ids = None  # counted anew below, without the hidden slots
            call = self._in_llm(visual, is_image, slot, keep=bool(use_cache) and not torch.is_grad_enabled())
        if cached == 0:  # what is decoded follows one by one
            if blocks is None and self.config.bidirectional == "prefix":
                blocks = prefix_blocks(input_ids, labels, IGNORE)
            elif blocks is None and self.config.bidirectional == "image":
                blocks = call.context.image_of_token.masked_fill(~is_image, -1)
        else:
            blocks = None
        if padded_right and not packing and blocks is None:
            attention_mask = None  # what fills a row up stands behind all that is read
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions(attention_mask, input_ids.shape[1])
        if visual is not None and visual.offsets is not None:
            if position_ids is None:
                position_ids = torch.arange(cached, cached + input_ids.shape[1], device=input_ids.device)[None]
            if position_ids.dim() == 2:
                position_ids = on_grids(position_ids, visual.offsets, visual.slot_of_token(is_image), is_image)
        if packing:
            if blocks is not None:
                raise ValueError("packing: this LLM reads its prompt in both directions; expected packing: false")
            if padded_right and layout is not None and layout.lengths is not None:
                packed = Packing.of_lengths(layout.lengths, input_ids.shape[1], input_ids.device)
            else:
                packed = Packing.of_mask(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            embeds, position_ids, attention_mask = packed.pack(embeds), packed.pack_positions(position_ids), None
            call.packing = packed
            call.additions = {index: packed.pack(values) for index, values in call.additions.items()}
            kwargs |= packed.arguments()
        elif blocks is not None:
            arguments = attention_mask, past_key_values, position_ids, blocks
            attention_mask = block_masks(self.language.config.get_text_config(), embeds, *arguments)
        targets = None
        if labels is not None and layout is not None:
            use_cache = bool(use_cache)  # a cache is the LLM's default, and of no use in training
            targets = layout.targets.to(input_ids.device, non_blocking=True)
            seen = targets if visible is None else last_visible(visible, targets)
            call.rows = seen if call.packing is None else call.packing.places(seen)
        if call.places() or call.rows is not None:
            kwargs[ARGUMENT] = call
        output = self.language(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        check_reached(call, self.language)
        loss, logits = None, output.logits
        if call.rows is not None and logits.shape[:2].numel() != len(call.rows):  # its layers are handed no arguments
            logits = take_rows(logits, call.rows)
        if labels is not None and targets is not None:
            loss = _loss(logits, labels.flatten()[targets + 1], num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _in_llm(self, visual: VisualContext, is_image: Tensor, slot: Tensor, keep: bool) -> InLLMCall:
        if keep and visual.cache is None:
            visual.cache = {}
        image = visual.image_of_slot.gather(1, slot.clamp(min=0)).masked_fill(slot < 0, -1)
        context = LayerContext(visual.memory, visual.memory_mask, image, visual.cache if keep else None)
        if any(layer.reads_slots for layers in self.in_llm_layers.values() for layer in layers):
            context.token_of_slot = token_of_slot(visual, is_image, slot)
        additions = {
            index: gather_slots(values, slot).masked_fill(~is_image[..., None], 0)
            for index, values in visual.additions.items()
        }
        return InLLMCall(self.in_llm_layers, context, additions)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        """The prompts and what follows them, as transformers' `generate`: pad prompts on the left.

        Args:
            pixel_values: and whatever else `encode_images` takes (`IMAGE_INPUTS`).
        """
        if images := self.take_images(kwargs, pixel_values, input_ids):
            kwargs["visual"] = self.encode_images(input_ids, **images)
        if self.config.image_token_id < self.text_spec.vocab_size:
            kwargs.setdefault("suppress_tokens", [self.config.image_token_id])
        return super().generate(input_ids, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
        if kwargs.get("visual") is not None and expand_size > 1:
            kwargs["visual"] = kwargs["visual"].expand(expand_size)
        expand = super()._expand_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        return expand(expand_size=expand_size, **kwargs)


def _pairs(sizes: Tensor | None) -> list[tuple[int, int]] | None:
    return None if sizes is None else [(height, width) for height, width in sizes.tolist()]


def _cast(features: FeatureMap, dtype: torch.dtype, device: torch.device) -> FeatureMap:
    def to(value: Tensor | None) -> Any:
        return None if value is None else value.to(device=device, dtype=dtype)

    return FeatureMap(
        to(features.values), features.grids, features.mask.to(device), to(features.cls), to(features.cls_attention)
    )


def _loss(logits: Tensor, labels: Tensor, num_items: int | Tensor | None) -> Tensor:
    total = summed_cross_entropy(logits.flatten(0, 1), labels)
    return total / (num_items if num_items is not None else len(labels))


AutoConfig.register("vlmzoo", VisionLanguageConfig)
AutoModelForImageTextToText.register(VisionLanguageConfig, VisionLanguageModel)
