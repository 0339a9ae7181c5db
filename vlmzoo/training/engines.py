"""How the processes of a run share its weights: one process, DDP, FSDP2 and ZeRO, with one interface."""

from __future__ import annotations

import copy
import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmzoo.config import Parallel, RunConfig, StageConfig
from vlmzoo.connector import VisualTokens
from vlmzoo.language.layers import decoder_layers
from vlmzoo.model import VisionLanguageModel
from vlmzoo.processor import Layouts
from vlmzoo.training import adapters, checkpoint
from vlmzoo.training.measures import fetched, part_norms
from vlmzoo.training.processes import Processes
from vlmzoo.training.recompute import elementwise_recomputed
from vlmzoo.training.stages import make_optimizer, trains


class Engine:
    """One process. An engine holds a stage from its first step to its last.

    Args:
        model: with the stage's parts to train, all else frozen.
        stages: of the run, up to the one that is trained.
    """

    def __init__(
        self, model: VisionLanguageModel, stages: Sequence[StageConfig], run: RunConfig, processes: Processes
    ) -> None:
        self.plain, self.stages, self.stage, self.run, self.processes = model, stages, stages[-1], run, processes
        self.model = self.share(model)
        self.module: Any = self.model  # what is called
        self.optimizer = make_optimizer(self.model, self.stage)
        self.begin()

    def share(self, model: VisionLanguageModel) -> VisionLanguageModel:
        """The model that is trained; a copy where its weights are taken apart."""
        return model

    def begin(self) -> None:
        """Whatever needs the optimizer."""

    def backward(self, batch: dict[str, Any], num_targets: float, *, last: bool) -> Tensor:
        """This batch's share of the step's loss, in double precision; its gradients are added to those so far."""
        with self.together(last):
            device = self.processes.device.type
            half = torch.autocast(device, torch.bfloat16, enabled=self.run.dtype == "bfloat16")
            with half, elementwise_recomputed():
                loss = self.module(**batch, num_items_in_batch=num_targets).loss
            if loss.requires_grad:  # not where all is frozen that text alone would reach
                self.differentiate(loss, last)
        return loss.detach().double()

    def together(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients stay with their process inside, but for a step's last batch."""
        return nullcontext()

    def differentiate(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def clear(self) -> None:
        """No gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, check: Callable[[float], None]) -> tuple[float, dict[str, float]]:
        """Clips the gradient over all parts and takes the step; its norm before, and that of each part that is known.

        What nothing reached has a gradient of 0.

        Args:
            check: raises where a norm, or the step's loss, cannot be trained on.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        limit = self.stage.clip if self.stage.clip is not None else float("inf")
        parts = part_norms(self.optimizer)
        norm, *norms = fetched([nn.utils.clip_grad_norm_(parameters, limit), *parts.values()])
        check(norm)
        self.optimizer.step()
        return norm, dict(zip(parts, norms, strict=True))

    def save(self, place: Path) -> None:
        """Writes this process's files of a checkpoint within the stage."""
        if self.processes.first:
            checkpoint.write_tensors(weights(self.plain, self.stages), place / checkpoint.WEIGHTS)
            checkpoint.write_state(self.optimizer.state_dict(), place / "optimizer.pt")

    def load(self, place: Path) -> None:
        """Goes on where `save` was called; the plain model had `checkpoint.WEIGHTS` before."""
        self.optimizer.load_state_dict(torch.load(place / "optimizer.pt", weights_only=True))

    def finish(self) -> None:
        """The stage is over: the plain model has what was trained, in every process."""

    def save_finished(self, place: Path) -> None:
        """The same of a checkpoint behind the stage, from which any number of processes could go on."""
        if self.processes.first:
            checkpoint.write_tensors(weights(self.plain, self.stages), place / checkpoint.WEIGHTS)


def weights(model: nn.Module, stages: Sequence[StageConfig]) -> dict[str, Tensor]:
    """All that these stages change of what a saved model holds; tied weights once."""
    parts = {part for stage in stages for part in stage.lr}
    merged = adapters.merged(stages)
    held = set(model.state_dict())

    def moved(name: str) -> bool:
        own = name.replace(adapters.BASE, "")
        return any(trains(stage, own) for stage in stages) or (merged and own.startswith("language."))

    parameters = {name: value for name, value in model.named_parameters() if moved(name)}
    buffers = {name: value for name, value in model.named_buffers() if name.split(".")[0] in parts and name in held}
    return parameters | buffers


class DDPEngine(Engine):
    """Every process holds all weights; gradients are summed."""

    def begin(self) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        options = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        cpu = self.processes.device.type == "cpu"
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[options])
        check_processes(self.accelerator.num_processes, self.processes)
        self.module = self.accelerator.prepare_model(self.model)
        if not isinstance(self.module, nn.parallel.DistributedDataParallel):
            raise ValueError("accelerate gave no DistributedDataParallel; its environment names another way to share")

    def together(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.module.no_sync()

    def differentiate(self, loss: Tensor, last: bool) -> None:
        (loss * self.processes.world).backward()  # DDP divides by it

    def finish(self) -> None:
        self.accelerator.free_memory()


class ShardedEngine(Engine, ABC):
    """Every process holds a part of each weight. The plain model stays whole, in host memory."""

    def share(self, model: VisionLanguageModel) -> VisionLanguageModel:
        shared = copy.deepcopy(model, {id(model.vision): model.vision} if not self.moves_vision else {})
        if not self.moves_vision:  # called as often as there are chunks of images, which differs between processes
            hidden = shared._modules.pop("vision")
            shared.__dict__["vision"] = hidden
        return shared

    @property
    def moves_vision(self) -> bool:
        return "vision" in self.stage.lr

    @property
    def trained(self) -> dict[str, Tensor]:
        """This process's parts of what the stage trains."""
        return weights(self.model, [self.stage])

    def save(self, place: Path) -> None:
        if self.processes.first:
            moving = self.trained.keys()
            still = {name: value for name, value in weights(self.plain, self.stages).items() if name not in moving}
            checkpoint.write_tensors(still, place / checkpoint.WEIGHTS)
        self.save_shard(place)

    @abstractmethod
    def save_shard(self, place: Path) -> None:
        """Writes this process's parts of what the stage trains, and of the optimizer's state."""

    def finish(self) -> None:
        held = weights(self.plain, [self.stage])
        with torch.no_grad():
            for name, value in self.trained.items():
                held[name].copy_(self.whole(value))

    @abstractmethod
    def whole(self, value: Tensor) -> Tensor:
        """A weight of which every process holds a part."""


class FSDP2Engine(ShardedEngine):
    """torch's `fully_shard`: weights are gathered layer by layer, gradients summed where they are kept."""

    def share(self, model: VisionLanguageModel) -> VisionLanguageModel:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        shared = super().share(model)
        mesh = init_device_mesh(self.processes.device.type, (self.processes.world,))
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.run.dtype == "bfloat16" else None
        units: list[tuple[nn.Module, dict[str, Any]]] = [
            (layer, {"mp_policy": half} if half else {}) for layer in decoder_layers(shared.language)
        ]
        units += [(layer, {}) for layers in shared.in_llm_layers.values() for layer in layers]
        # All else stays gathered until the backward pass: embeddings, head, connector, an encoder that is trained. They
        # are called as often as there are images, and what they return is no plain tensor that FSDP would look at.
        for module, options in [*units, (shared, {"reshard_after_forward": False})]:
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh, **options)
                unit: Any = module
                unit.set_gradient_divide_factor(1.0)  # the loss is divided once, by all targets
                unit.set_force_sum_reduction_for_comms(True)
        return shared

    def save_shard(self, place: Path) -> None:
        rank = self.processes.rank
        own = {name: _local(value) for name, value in self.trained.items()}
        checkpoint.write_tensors(own, place / f"model-{rank:05}.safetensors")
        state = self.optimizer.state_dict()
        state["state"] = {
            index: {key: _local(value) for key, value in held.items()} for index, held in state["state"].items()
        }
        checkpoint.write_state(state, place / f"optimizer-{rank:05}.pt")

    def load(self, place: Path) -> None:
        from torch.distributed.tensor import DTensor

        rank = self.processes.rank
        own = {name: _local(value) for name, value in self.trained.items()}
        checkpoint.copy_into(own, load_file(place / f"model-{rank:05}.safetensors"))
        state = torch.load(place / f"optimizer-{rank:05}.pt", weights_only=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, held in state["state"].items():
            like: Any = parameters[index]
            for key, value in held.items():
                if key != "step":
                    held[key] = DTensor.from_local(
                        value.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
                    )
        self.optimizer.load_state_dict(state)

    def whole(self, value: Tensor) -> Tensor:
        return cast(Any, value).full_tensor() if hasattr(value, "full_tensor") else value


def _local(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


class ZeROEngine(ShardedEngine):
    """DeepSpeed's ZeRO, stage 2 or 3, through accelerate."""

    def begin(self) -> None:
        import deepspeed  # noqa: F401  # absent, this is the line that says so
        from accelerate import Accelerator, DeepSpeedPlugin
        from accelerate.utils import InitProcessGroupKwargs

        stage = 3 if self.run.parallel == "zero3" else 2
        share = max(1, self.stage.batch_size // self.processes.world)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.stage.micro_batch_size or share,
            "gradient_accumulation_steps": -(-share // (self.stage.micro_batch_size or share)),
            "gradient_clipping": self.stage.clip or 0.0,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": False,
                "contiguous_gradients": True,
                "stage3_param_persistence_threshold": 0,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        backend = "nccl" if self.processes.device.type == "cuda" else "gloo"
        # Told that it is on a CPU, accelerate would silently take DDP.
        self.accelerator = Accelerator(
            mixed_precision="no",
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        )
        check_processes(self.accelerator.num_processes, self.processes)
        connector = self.model.connector
        if Layouts.of(self.plain).tiled:
            raise ValueError(
                f"parallel {self.run.parallel}: connector {self.run.connector.name!r} cuts images into tiles, and "
                f"DeepSpeed takes it that all processes compute the same; expected parallel: fsdp2 or ddp"
            )
        # DeepSpeed's hooks, between these two, look for tensors in a dictionary, but not in a class of ours.
        connector.register_forward_hook(lambda module, args, output: dict(vars(output)))
        self.module, self.optimizer = cast(Any, self.accelerator.prepare(self.model, self.optimizer))
        connector.register_forward_hook(lambda module, args, output: VisualTokens(**output))

    def differentiate(self, loss: Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * self.processes.world, scale_wrt_gas=False)  # DeepSpeed divides by it

    def clear(self) -> None:
        """DeepSpeed has done it."""

    def update(self, check: Callable[[float], None]) -> tuple[float, dict[str, float]]:
        check(0.0)  # the loss; the norm is known once the update is made, and then nothing of it is written
        self.module.step()
        norm = float(self.module.get_global_grad_norm())
        check(norm)
        return norm, {}  # the gradients of parts are not there any more

    def save_shard(self, place: Path) -> None:
        try:
            self.module.save_checkpoint(str(place), tag="zero", save_latest=False, exclude_frozen_parameters=True)
        except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
            raise checkpoint.TornError(errno.EIO, f"cannot be written ({error})", str(place)) from error

    def load(self, place: Path) -> None:
        # DeepSpeed unpickles: these are our own files, which have just been held to their hashes.
        self.module.load_checkpoint(str(place), tag="zero", load_module_strict=False)

    def finish(self) -> None:
        from accelerate.state import AcceleratorState

        super().finish()
        self.module.destroy()
        self.accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)  # the next stage brings a configuration of its own

    def whole(self, value: Tensor) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
            return value.detach().clone()


def check_processes(found: int, processes: Processes) -> None:
    """Raises where accelerate took us for another number of processes: they would train apart."""
    if found != processes.world:
        raise ValueError(f"accelerate sees {found} processes, torchrun started {processes.world}")


ENGINES: dict[Parallel, type[Engine]] = {
    "ddp": DDPEngine,
    "fsdp2": FSDP2Engine,
    "zero2": ZeROEngine,
    "zero3": ZeROEngine,
}


def make_engine(
    model: VisionLanguageModel, stages: Sequence[StageConfig], run: RunConfig, processes: Processes
) -> Engine:
    """What trains the last of these stages."""
    kind = Engine if processes.world == 1 else ENGINES[run.parallel]
    return kind(model, stages, run, processes)
