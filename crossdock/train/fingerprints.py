"""Ranks that would not do the same are found before they wait for one another: by config, code, model and step."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import crossdock
from crossdock.comm import Place
from crossdock.comm.hang_report import in_ranges
from crossdock.config import Config
from crossdock.parallel import plain_name
from crossdock.train.together import TrainingStopped

__all__ = [
    "RanksDiffer",
    "StepFingerprint",
    "check_same_code_and_config",
    "check_same_model",
    "hash_of_run",
    "source_hash",
]

# As small that the squares of all ranks' words have an exact sum in float64, of 8,192 ranks.
_WORD_BITS = 20
_SHOWN = 8


class RanksDiffer(TrainingStopped):
    """Ranks of one run are not of one mind; the message says in what, and which ranks."""


def source_hash() -> str:
    """Of crossdock's source files, names and contents, in 16 hexadecimal digits."""
    folder = Path(crossdock.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_same_code_and_config(config: Config, code: str | None = None) -> None:
    """Before anything that depends on them. Collective.

    Args:
        config: as this rank has read it; folders of its machine may differ.
        code: hash of the sources; this process's by default.

    Raises:
        RanksDiffer: on all ranks.
    """
    _check_same(_run_facts(config, code), "")


def hash_of_run(config: Config) -> str:
    """Of what `check_same_code_and_config` compares, for ranks that are in no process group together."""
    return hashlib.sha256(repr(_run_facts(config, None)).encode()).hexdigest()


def _run_facts(config: Config, code: str | None) -> dict[str, str]:
    facts = {
        "crossdock": crossdock.__version__,
        "crossdock's source files": code or source_hash(),
        "torch": torch.__version__,
        "number of ranks": str(dist.get_world_size()),
    }
    for section, values in asdict(config).items():
        facts |= {f"config: {section}.{name}": repr(value) for name, value in values.items()}
    for name in ("job.dump_folder", "fault_tolerance.snapshot_folder"):
        del facts[f"config: {name}"]
    return facts


def check_same_model(model: nn.Module, step: int, samples: int, stage: int) -> None:
    """Once parameters have their layout, before the first step. Collective.

    Args:
        model: this rank's part; its parameters' shapes are those of the whole.
        step, samples: done so far.
        stage: of the pipeline; other stages have other parameters.

    Raises:
        RanksDiffer: on all ranks.
    """
    facts = {"steps done": str(step), "samples read": str(samples)}
    for name, parameter in model.named_parameters():
        shape = "x".join(map(str, parameter.shape))
        kind = f"{str(parameter.dtype).removeprefix('torch.')} {shape or 'scalar'}"
        facts[f"parameter {plain_name(name)}"] = kind if parameter.requires_grad else f"{kind}, frozen"
    _check_same(facts, f"pipeline stage {stage}")


def _check_same(facts: Mapping[str, str], kind: str) -> None:
    """Compare facts among the ranks of a kind: hashes first, the facts themselves where those differ. Collective."""
    own = kind, hashlib.sha256("\0".join(f"{name}={value}" for name, value in facts.items()).encode()).hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    of_kinds = [kind for kind, _ in everyone]
    if len(set(everyone)) == len(set(of_kinds)):
        return
    dist.all_gather_object(everyone, dict(facts))
    differences = [
        difference
        for each in sorted(set(of_kinds))
        for difference in _differences({rank: everyone[rank] for rank, of in enumerate(of_kinds) if of == each})
    ]
    more = f"\nand {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    raise RanksDiffer("the ranks of this run differ\n" + "\n".join(differences[:_SHOWN]) + more)


def _differences(facts: Mapping[int, Mapping[str, str]]) -> list[str]:
    """`config: training.seq_len is 256 on ranks 0-2, 128 on rank 3`."""
    names = dict.fromkeys(name for of_rank in facts.values() for name in of_rank)
    found = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in facts.items():
            ranks.setdefault(of_rank.get(name, "missing"), []).append(rank)
        if len(ranks) > 1:
            by_number = sorted(ranks.items(), key=lambda entry: -len(entry[1]))
            found.append(f"{name} is " + ", ".join(f"{value} on {in_ranges(on)}" for value, on in by_number))
    return found


class StepFingerprint:
    """Finds ranks at another step or place in the data, by two numbers that ride on a sum that every step has anyway.

    With `x` a small whole number that says where a rank is, `R sum(x^2) = (sum x)^2` over `R` ranks exactly where all
    `x` are the same (Cauchy-Schwarz).

    Args:
        place: takes the seconds spent here.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._own: tuple[int, ...] = ()
        self._names: Sequence[str] = ()

    def words(self, **facts: int) -> list[float]:
        """Two numbers to be summed over all ranks: of what must be the same on all, by name."""
        started = time.perf_counter()
        self._names, self._own = tuple(facts), tuple(facts.values())
        word = zlib.crc32(repr(self._own).encode()) % 2**_WORD_BITS
        self._place.seconds += time.perf_counter() - started
        return [float(word), float(word * word)]

    def check(self, sums: Sequence[float]) -> None:
        """Of the two numbers' sums. Collective among all ranks only where they differ.

        Raises:
            RanksDiffer: on all ranks.
        """
        started = time.perf_counter()
        total, squares = map(int, sums)
        same = dist.get_world_size() * squares == total * total
        self._place.seconds += time.perf_counter() - started
        if not same:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self._own)
            named = partial(zip, self._names, strict=True)
            facts = {rank: {name: str(value) for name, value in named(own)} for rank, own in enumerate(everyone)}
            raise RanksDiffer("the ranks of this run have come apart\n" + "\n".join(_differences(facts)))
