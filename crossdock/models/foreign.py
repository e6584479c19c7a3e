"""What others call a model's tensors in their folders of torch's distributed checkpoint."""

from __future__ import annotations

from collections.abc import Set
from itertools import product

from transformers import PreTrainedModel

from crossdock.checkpoint import (
    CheckpointError,
    Convention,
    DCPTensors,
    HFCheckpoint,
    Located,
    Part,
    Place,
    locate,
    our_rows,
)
from crossdock.models.family import Family
from crossdock.models.torchtitan import TORCHTITAN_FAMILIES, torchtitan_names

__all__ = ["foreign_weights"]

# What all names of a model begin with, where a folder holds more than the model, or a wrapper.
_PREFIXES = ("", "model.", "state_dict.", "app.model.", "state_dict.model.")
# What a folder may hold beside the model, where its names begin with nothing of their own.
_OTHERS = ("optim", "lr_scheduler", "scheduler", "dataloader", "train_state", "rng")
_SHOWN = 4


def foreign_weights(tensors: DCPTensors, model: PreTrainedModel, family: Family) -> HFCheckpoint:
    """A foreign folder as one of Hugging Face's format, checked against `model`; what is no weight of it is left out.

    Raises:
        CheckpointError: where no naming that is known fits, or tensors are missing, unexpected or misshapen.
    """
    names, keys = tensors.sizes.keys(), family.keys(model)
    best: tuple[float, str] = (-1.0, "")
    for (kind, convention), prefix in product(_conventions(family, names).items(), _PREFIXES):
        located = locate(model, keys, _prefixed(convention, prefix))
        wanted = {place.name for entry in located.values() for _, place in entry.places}
        if missing := sorted(wanted - names):
            share = 1 - len(missing) / len(wanted)
            lacks = f"{len(missing)} of its {len(wanted)} names are not there: {_some(missing)}"
            best = max(best, (share, f"{kind} fits best, and {lacks}"), key=lambda each: each[0])
            continue
        own = {name for name in names if name.startswith(prefix)} if prefix else {*names}
        rest = {name.removeprefix(prefix): name for name in own - wanted}
        others = {
            name: Located([(Part(name), Place(there))], 0)
            for name, there in rest.items()
            if name not in located and not name.startswith(_OTHERS)
        }
        tensors.as_hf(located | others).check(model, keys)
        return tensors.as_hf(located)
    raise CheckpointError(
        f"the names in {tensors.folder} are not those of {family.model_type}: {best[1]}. There are "
        f"{_some(sorted(names)) or 'no tensors'}"
    )


def _conventions(family: Family, names: Set[str]) -> dict[str, Convention]:
    """By what a message calls them."""

    def files(name: str, expert: int | None, part: Part) -> Place:
        return Place(part.name, part.expert)

    def modules(name: str, expert: int | None, part: Part) -> Place:
        if expert is None or part.expert is not None:
            return Place(part.name.replace(".block_sparse_moe.", ".mlp."), part.expert)
        module = name.rpartition(".")[0]
        if part.columns is None:
            return Place(f"{module}.down_proj", expert)
        return Place(f"{module}.gate_up_proj", expert, part.columns)

    def ours(name: str, expert: int | None, part: Part) -> Place:
        return Place(name, expert, as_ours=True)

    def torchtitan(name: str, expert: int | None, part: Part) -> Place:
        known = torchtitan_names(part.name) or (part.name,)
        there = (each for each in known if any(prefix + each in names for prefix in _PREFIXES))
        return Place(next(there, known[0]), expert)

    conventions = {
        "Hugging Face's naming": files,
        "transformers' naming in memory": modules,
        "crossdock's naming": ours,
        "crossdock's naming by expert": our_rows,
    }
    return conventions | ({"torchtitan's naming": torchtitan} if family.name in TORCHTITAN_FAMILIES else {})


def _prefixed(convention: Convention, prefix: str) -> Convention:
    def prefixed(name: str, expert: int | None, part: Part) -> Place:
        place = convention(name, expert, part)
        return place._replace(name=prefix + place.name)

    return prefixed


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
