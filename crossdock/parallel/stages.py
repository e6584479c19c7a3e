"""Pipeline stages: a model cut by its blocks, of which a rank keeps some and runs one stage at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from crossdock.experts import UnpackedExperts
from crossdock.moe import MOE_LAYER_PLACES, moe_layer_places, moe_layers
from crossdock.parallel.blocks import block_lists
from crossdock.parallel.mesh import Meshes, PipelineSchedule

__all__ = ["Stages", "apply_pp", "cut_blocks", "stages_of", "stages_per_rank"]

_STAGES = "crossdock_pipeline_stages"

_PER_RANK: dict[PipelineSchedule, tuple[int, int | None, int]] = {
    "gpipe": (1, 1, 1),
    "1f1b": (1, 1, 1),
    "interleaved_1f1b": (2, None, 2),
    "zero_bubble": (1, None, 1),
    "zbv": (2, 2, 2),
}
"""The fewest and most stages of a rank, and how many it has unless told."""


def stages_per_rank(schedule: PipelineSchedule, wanted: int = -1) -> int:
    """How many stages a rank has; -1 leaves it to the schedule.

    Raises:
        ValueError: with what would do, where the schedule cannot run so many.
    """
    least, most, usual = _PER_RANK[schedule]
    if wanted == -1:
        return usual
    if wanted < least or (most is not None and wanted > most):
        valid = f"{least}" if least == most else f"at least {least}"
        raise ValueError(f"must be {valid} with the schedule {schedule}, or -1")
    return wanted


class Stages:
    """What a rank has of a pipeline. The model that `apply_pp` has cut holds it (`stages_of`).

    Attributes:
        blocks: of every stage, which of the model's blocks.
        own: this rank's stages, in order.
        places: of every stage, its rank along `pp`.
        ranks: all ranks of the same stages as this one, by their number in the default group.
        ends: names of embedding, norm and head in the model.
        elsewhere: what other stages hold, by name, on the meta device.
        received: what the stage that runs was given by the one before; `None` for the first.
    """

    def __init__(
        self, blocks: list[range], places: list[int], place: int, ranks: list[int], ends: Sequence[str]
    ) -> None:
        self.blocks, self.places, self.ranks, self.ends = blocks, places, ranks, ends
        self.own = [stage for stage, at in enumerate(places) if at == place]
        self.elsewhere: dict[str, nn.Module] = {}
        self.received: Tensor | None = None
        self._running: int | None = None

    @property
    def has_first(self) -> bool:
        return self.own[0] == 0

    @property
    def has_last(self) -> bool:
        return self.own[-1] == len(self.blocks) - 1

    @property
    def runs_last(self) -> bool:
        return self._running == len(self.blocks) - 1

    @contextmanager
    def running(self, stage: int, received: Tensor | None) -> Iterator[None]:
        """Within it, the model computes `stage` alone, beginning with `received` `[B, S, H]`."""
        self._running, self.received = stage, received
        try:
            yield
        finally:
            self._running = self.received = None

    def modules_of(self, model: nn.Module, stage: int) -> list[nn.Module]:
        """What holds the parameters of one of this rank's stages, in `model`."""
        found = [block for name, block in block_lists(model)[0].named_children() if int(name) in self.blocks[stage]]
        ends = [model.get_submodule(name) for name in self.ends]
        return found + (ends[:1] if stage == 0 else []) + (ends[1:] if stage == len(self.blocks) - 1 else [])

    def running_blocks(self) -> range:
        if self._running is None:
            raise RuntimeError("this rank has a part of the model, as stages of a pipeline: a Pipeline runs them")
        return self.blocks[self._running]


def stages_of(model: nn.Module) -> Stages | None:
    """The stages that `apply_pp` has cut `model` into; `None` for a whole one."""
    return getattr(model, _STAGES, None)


def apply_pp(
    model: nn.Module, meshes: Meshes, schedule: PipelineSchedule = "1f1b", wanted_stages_per_rank: int = -1
) -> nn.Module:
    """Cut `model` into pipeline stages by its blocks, in place, and leave this rank its own. Before all else.

    Does nothing where `pp` is 1. Parameters keep their names. The first stage has the embedding, the last one the norm
    and the head; a stage's cost is what it multiplies for a token (`cut_blocks`). The stages go round the ranks, with
    the schedule `zbv` there and back. The model then runs as stages of a `Pipeline` alone.

    Args:
        model: of transformers, or made as those are: `get_input_embeddings()` and `get_output_embeddings()`, a model
            beneath that has one `nn.ModuleList` of blocks `[B, S, H] -> [B, S, H]` and one norm after them, and takes
            `input_ids` or `inputs_embeds`, both by name. On the meta device, or with values.
        meshes: from `ParallelDims.build_mesh`.
        schedule: see `Pipeline`.
        wanted_stages_per_rank: see `stages_per_rank`.

    Raises:
        ValueError: for a model that cannot be cut, or not into so many.
    """
    size = meshes.size("pp")
    if size == 1:
        return model
    parts = _Parts.of(model)
    if schedule in ("zero_bubble", "zbv") and any(isinstance(module, UnpackedExperts) for module in model.modules()):
        # torch's second part of the backward pass fails where a parameter is used twice, and these have a zero gradient
        # beside their own, for ranks without tokens.
        raise ValueError(
            f"the schedule {schedule} takes the backward pass in two, which experts that are modules do not; use 1f1b, "
            "interleaved_1f1b or gpipe"
        )
    per_rank = stages_per_rank(schedule, wanted_stages_per_rank)
    blocks = cut_blocks(model, size * per_rank)
    there, back = list(range(size)), list(range(size))[::-1]
    places = there + back if schedule == "zbv" else there * per_rank
    ranks = [dist.get_rank()] if meshes.stage is None else dist.get_process_group_ranks(meshes.stage)
    stages = Stages(blocks, places, meshes["pp"].get_local_rank(), ranks, parts.ends(model))
    setattr(model, _STAGES, stages)
    every = moe_layer_places(model)
    staged = StagedBlocks(parts.blocks, stages)
    for index in range(len(staged)):
        if not any(index in blocks[stage] for stage in stages.own):
            _leave(parts.base, f"{parts.names[0]}.{index}", model, stages)
    setattr(parts.base, parts.names[0], staged)
    if not stages.has_first:
        _leave(parts.base, parts.names[1], model, stages)
    for holder, name in ((parts.base, parts.names[2]), (model, parts.names[3])):
        if stages.has_last:
            _only_in_last(holder.get_submodule(name), stages)
        else:
            _leave(holder, name, model, stages)
    own = tuple(every.names.index(name) for name in moe_layers(model))
    setattr(model, MOE_LAYER_PLACES, every._replace(own=own))

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        stages.running_blocks()
        received = stages.received
        if received is None:
            return args, kwargs
        # The model makes masks and positions of this; what the stage was given is handed to its first block.
        shape = kwargs.pop("input_ids").shape
        return args, kwargs | {"inputs_embeds": received.new_zeros(()).expand(*shape, received.shape[-1])}

    model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    return model


class StagedBlocks(nn.ModuleList):
    """The blocks of a model, of which this rank has some, under their numbers.

    To the model's code it is the list of all of them; those that are not of the stage that runs pass on what they are
    given, and the one before its first gives what the stage has received.
    """

    def __init__(self, blocks: nn.ModuleList, stages: Stages) -> None:
        super().__init__()
        self._stages = stages
        self._skipped = [_Skipped(block) for block in blocks]
        for index, block in enumerate(blocks):
            if any(index in stages.blocks[stage] for stage in stages.own):
                self.add_module(str(index), block)

    def __len__(self) -> int:
        return len(self._skipped)

    def __getitem__(self, index: Any) -> Any:
        return self._sequence()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._sequence())

    def _sequence(self) -> list[Any]:
        running = self._stages.running_blocks()
        sequence: list[Any] = [
            self._modules[str(index)] if index in running else skipped for index, skipped in enumerate(self._skipped)
        ]
        if running.start:
            sequence[running.start - 1] = _Entry(self._skipped[running.start - 1], self._stages)
        return sequence

    __repr__ = nn.Module.__repr__


class _Skipped:
    """In the place of a block that does not run: what the model's code asks of a block, such as `attention_type`."""

    def __init__(self, block: Any) -> None:
        own = vars(block).items()
        self.__dict__.update({k: v for k, v in own if isinstance(v, str | int | float | None) and k[0] != "_"})

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Entry(_Skipped):
    """In the place of the block before a stage's first."""

    def __init__(self, skipped: _Skipped, stages: Stages) -> None:
        self.__dict__.update(vars(skipped))
        self._stages = stages

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self._stages.received is not None
        return self._stages.received


class _Elsewhere(nn.Module):
    """In the place of a module that another stage has: gives what it is given."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _whole(x)


class _Parts(NamedTuple):
    """Where a model has what is cut.

    Attributes:
        base: the module that holds blocks, embedding and norm.
        blocks: in order.
        names: of blocks, embedding and norm in `base`, and of the head in the model.
    """

    base: nn.Module
    blocks: nn.ModuleList
    names: tuple[str, str, str, str]

    @classmethod
    def of(cls, model: Any) -> _Parts:
        found = block_lists(model)
        if len(found) != 1 or not hasattr(model, "get_input_embeddings"):
            raise ValueError(f"{type(model).__name__} has {len(found)} lists of blocks; pipeline stages need one")
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        base = next(module for module in model.modules() if found[0] in module.children())
        of_model, of_base = (
            {module: name for name, module in each.named_children() if next(module.parameters(), None) is not None}
            for each in (model, base)
        )
        norms = [module for module in of_base if "norm" in type(module).__name__.lower()]
        if set(of_base) != {found[0], embedding, *norms} or len(norms) != 1 or set(of_model) != {base, head}:
            names = ", ".join([*of_model.values(), *of_base.values()])
            raise ValueError(
                f"{type(model).__name__} has {names}; pipeline stages need an embedding, blocks, a norm and a head"
            )
        if embedding.weight is head.weight:
            raise ValueError("the embedding is the head, too (tie_word_embeddings), and they are of two stages")
        return cls(base, found[0], (of_base[found[0]], of_base[embedding], of_base[norms[0]], of_model[head]))

    def ends(self, model: nn.Module) -> list[str]:
        """Names of embedding, norm and head in the whole model."""
        _, embedding, norm, head = self.names
        return [*(_name_of(self.base, model) + name for name in (embedding, norm)), head]


def cut_blocks(model: nn.Module, num_stages: int) -> list[range]:
    """The blocks of each stage, such that the costliest stage costs least.

    A block, and the head, costs the elements of the matrices that a token is multiplied with, of experts those of its
    top-k; the embedding a row. What attention does over positions does not count: that is about the same in all blocks.

    Raises:
        ValueError: for fewer blocks than stages.
    """
    parts = _Parts.of(model)
    if len(parts.blocks) < num_stages:
        raise ValueError(f"{len(parts.blocks)} blocks cannot be {num_stages} pipeline stages")
    costs = [_products(block) for block in parts.blocks]
    costs[0] += next(parts.base.get_submodule(parts.names[1]).parameters()).shape[-1]
    costs[-1] += _products(model.get_submodule(parts.names[3]))
    return _balanced(costs, num_stages)


def _products(module: nn.Module) -> int:
    layers = moe_layers(module).values()
    experts = {parameter for layer in layers for parameter in layer.experts.parameters()}
    total = sum(p.numel() for p in module.parameters() if p.ndim > 1 and p not in experts)
    for layer in layers:
        # Ours lie together, each a matrix of a parameter.
        dims = 3 if layer.experts.slot_parameters() else 2
        every = sum(p.numel() for p in layer.experts.parameters() if p.ndim == dims)
        total += every * layer.top_k // layer.num_experts
    return total


def _balanced(costs: Sequence[int], num_stages: int) -> list[range]:
    """Consecutive parts, none empty, of which the largest sum is least; of several such cuts an even one."""

    @cache
    def best(first: int, stages: int) -> tuple[int, int, tuple[int, ...]]:
        """Largest sum, sum of squares, and ends of `stages` parts of what begins with `first`."""
        if stages == 1:
            total = sum(costs[first:])
            return total, total**2, (len(costs),)
        choices = []
        for end in range(first + 1, len(costs) - stages + 2):
            own = sum(costs[first:end])
            largest, squares, ends = best(end, stages - 1)
            choices.append((max(own, largest), squares + own**2, (end, *ends)))
        return min(choices)

    ends = best(0, num_stages)[2]
    return [range(first, end) for first, end in zip((0, *ends), ends, strict=False)]


def _leave(holder: nn.Module, name: str, model: nn.Module, stages: Stages) -> None:
    """Take a module off, to be remembered without its values."""
    module = holder.get_submodule(name)
    stages.elsewhere[_name_of(holder, model) + name] = module.to("meta")
    if "." not in name:
        setattr(holder, name, _Elsewhere())


def _name_of(module: nn.Module, model: nn.Module) -> str:
    """A prefix of names."""
    return next(f"{name}." if name else "" for name, each in model.named_modules() if each is module)


def _whole(x: Tensor) -> Tensor:
    """`x`; but where it is all of another tensor, as transformers hands the head a slice of all positions, that one.

    torch's schedules cannot free views, nor FSDP hook them safely.
    """
    base = x._base
    is_all = base is not None and (x.shape, x.stride(), x.data_ptr()) == (base.shape, base.stride(), base.data_ptr())
    return base if is_all and base is not None else x


def _only_in_last(module: nn.Module, stages: Stages) -> None:
    forward = module.forward

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward(x, *args, **kwargs) if stages.runs_last else _whole(x)

    module.forward = run
