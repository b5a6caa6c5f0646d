"""What an objective is built on: the base model of a run, its data and its processes, and how their parts are loaded."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogan.config import Config
from mogan.data.cache import Cache
from mogan.distributed import World
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.denoiser import Denoiser
from mogan.models.experts import boundary_of, experts, low_noise
from mogan.models.frame_sparse import mask_of, masked, read_mask
from mogan.models.lora import adapted
from mogan.models.states import attach_states, state_names, state_rows
from mogan.models.step_condition import tell_steps
from mogan.motion import estimators
from mogan.motion.flow import FlowEstimator, RaftFlow
from mogan.sharding import shard, split_tokens
from mogan.terms import Alarm


def wins_outright(remedy: str, pair: str = "real and generated") -> Alarm:
    """What to say of a discriminator whose ``gap``, the difference of its mean logits, leaves the student nothing to learn."""
    text = f"the discriminator wins outright: {pair} logits are {{now:.1f}} apart; {remedy}"
    return Alarm("gap", lambda first, now: now > 6.0, text)


@dataclass(frozen=True)
class Base:
    """The base model of a run and how its parts are loaded.

    Attributes:
        config: of the run; ``cache``: its clips; ``world``: its processes.
        folder: of the base model; ``start``: where the student starts; ``adapters_of``: the run whose adapters it goes on
            with, if any.
        geometry: of clips; ``latent_shape``: of their latents ``(C, F, H, W)``.
        dtype: networks compute in it.
        vae: frozen, on the device.
        encode: prompts to text, through the cache.
        prompts: a second cache, of the prompts that the student makes clips of; ``None``: the captions of ``cache``.
        frozen: a frozen transformer by folder and part, each loaded once; ``held``: its weights, which adapters learn beside.
    """

    config: Config
    cache: Cache
    world: World
    folder: Path
    start: Path
    adapters_of: Path | None
    geometry: wan.Geometry
    latent_shape: tuple[int, int, int, int]
    dtype: torch.dtype
    vae: Any
    encode: wan.TextEncoder
    frozen: Callable[[Path, str], Any]
    held: Callable[[Path, str], Any]
    prompts: Cache | None = None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.world.device

    @cached_property
    def student(self) -> Denoiser:
        """The network that learns; two experts if the config or the start says so; one that sees the past alone if the config
        does; with the attention that the start's folder says.
        """
        return self.started()

    def started(self) -> Denoiser:
        """One more network that learns and starts as the student.

        Raises:
            UserError: a causal network cannot start as the student: two experts, or frame-sparse attention.
        """
        boundary = boundary_of(self.start) if self.config.boundary is None else self.config.boundary
        if self.config.causal is not None:
            if boundary is not None:
                raise UserError(f"{self.start} has two experts, and a causal student is one: start from another model")
            if read_mask(self.start / "transformer") is not None:
                raise UserError(
                    f"{self.start} has frame-sparse attention (mogan tiles), which a causal student's chunks cannot keep: start from "
                    "the model that it was made of"
                )
            return CausalDenoiser(self._learner(self.start, "transformer"), self.dtype, self.config.causal)
        if boundary is not None and self.config.told:
            raise UserError(
                f"the student of {self.config.recipe} is conditioned on its number of steps, which no pipeline of two experts is: start "
                "from a model of one transformer"
            )
        parts = ["transformer", *([] if boundary is None else [low_noise(self.start)])]
        return self._together([self._masked(self._learner(self.start, part), part) for part in parts], boundary)

    def _masked(self, transformer: Any, part: str) -> Any:
        """A network of the start with its attention. Raises UserError where that cannot be trained so."""
        transformer = masked(transformer, self.start / part)
        if (mask := mask_of(transformer)) is None:
            return transformer
        mask.require(self.latent_shape[1])
        if self.world.sequence is not None:
            raise UserError(
                f"{self.start} sees clips by frames, which --context-parallel splits over processes: leave it out"
            )
        return transformer

    def denoiser(self, folder: Path, *parts: str, boundary: float | None = None) -> Denoiser:
        """A transformer that learns, or two experts: all its weights, or adapters over the frozen one."""
        return self._together([self._learner(folder, part) for part in parts], boundary)

    def follower(self, low: float, high: float) -> Denoiser:
        """A network that learns and starts as the base model, for levels from ``low`` to ``high``."""
        boundary = boundary_of(self.folder)
        return self.denoiser(self.folder, *experts(boundary, low, high), boundary=boundary)

    def teacher(self, low: float, high: float) -> Denoiser:
        """The frozen base model, for levels from ``low`` to ``high``."""
        boundary = boundary_of(self.folder)
        return self._together([self.frozen(self.folder, part) for part in experts(boundary, low, high)], boundary)

    def _together(self, transformers: list[Any], boundary: float | None) -> Denoiser:
        first, low = transformers if len(transformers) == 2 else (*transformers, None)
        return Denoiser(first, self.dtype, low, boundary, self.world.any)

    def _learner(self, folder: Path, part: str) -> Any:
        config = self.config
        if wan.is_told(folder, part) and not config.told:
            raise UserError(
                f"{folder}/{part} is told where its steps end, and {config.recipe} tells nothing: go on with the recipe that made "
                "it, or start from another model"
            )
        if config.lora is None:
            transformer = wan.load_transformer(folder, part)
            transformer = (tell_steps(transformer) if config.told else transformer).train()
        else:
            transformer = adapted(self.held(folder, part), config.lora, config.seed, config.told).train()
        if config.states and folder == self.start and part == "transformer":
            self._add_states(transformer, config.states)
        if config.checkpointing:
            transformer.enable_gradient_checkpointing()
        return spread(transformer, self.world, self.dtype, whole=config.lora is not None)

    def _add_states(self, transformer: Any, words: dict[str, str]) -> None:
        """Rows that learn and begin as the mean of their words' embedding, or as the start's own."""
        if not state_names(transformer):
            attach_states(transformer, {name: self.encode([said])[0].mean(0) for name, said in words.items()})
        elif state_names(transformer) == tuple(sorted(words)):
            attach_states(transformer, state_rows(transformer))  # with adapters the start's are shared, and frozen
        else:
            raise UserError(
                f"{self.start} knows the states {', '.join(state_names(transformer))}, and {self.config.recipe} teaches "
                f"{', '.join(sorted(words))}: take a recipe with the same, or remove its states.safetensors"
            )

    def no_text(self, prompt: str) -> Tensor:
        """The embedding ``(1, L, D)`` of an unconditional branch's prompt."""
        return stack_text(self.encode([prompt]), self.device)

    def flow(self, name: str, iterations: int) -> FlowEstimator:
        """A flow estimator, recomputed in the backward pass where the transformers are."""
        if self.world.main and name == "lab" and wan.defaults(self.folder).flow != "lab":
            print(
                f"{self.config.recipe} sees motion through the lab's flow network, which knows nothing but the lab's world, "
                f"and {self.folder} is not of the lab: a recipe for this model names RAFT weights, as mogan_wan_1_3b does",
                file=sys.stderr,
            )
        flow = estimators.load_flow(name, iterations, self.device)
        if isinstance(flow, RaftFlow):
            flow.checkpointing = self.config.checkpointing
            flow.pairs_per_chunk = 1 if self.config.offload else flow.pairs_per_chunk
        return flow


def spread(transformer: Any, world: World, dtype: torch.dtype, *, whole: bool = False) -> Any:
    """Over the processes, then to the device: a GPU never holds a whole network, unless it is ``whole`` on each, as those are
    that share their weights.
    """
    split_tokens(transformer, world)
    sharded = transformer if whole else shard(transformer, transformer.blocks, world, dtype, partial=True)
    return sharded.to(world.device)
