"""The ways in which tokens travel that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crossdock.comm import UNTOUCHED, Wire
from crossdock.tools.bench.workload import Workload

__all__ = ["Case", "bench_cases"]


@dataclass(frozen=True)
class Case:
    """A way.

    Attributes:
        name: for people.
        what: it does, in a sentence.
        dispatcher: of ours, or `plain`.
        wire: what rows look like while they travel.
        chunks: in which a rank's tokens are sent.
        balanced: whether experts are placed, and have copies, by their loads.
    """

    name: str
    what: str
    dispatcher: Literal["plain", "alltoall", "hierarchical"] = "alltoall"
    wire: Wire = UNTOUCHED
    chunks: int = 1
    balanced: bool = False


_FP8 = Wire("fp8", both=True)


def bench_cases(workload: Workload) -> list[Case]:
    """A plain all-to-all, then each thing alone beside sending a token once, then all of them that there is reason for.

    Hierarchy needs several nodes of several ranks.
    """
    once = "each token once to every rank that has one of its experts"
    best = "hierarchical" if workload.has_levels else "alltoall"
    cases = [
        Case("plain all-to-all", "a copy of a token for each of its routes, as transformers' AllToAllEP", "plain"),
        Case("deduplicated", f"{once} (dispatcher alltoall)"),
        Case("+ hierarchy", "each token once to every such node, and on from there", "hierarchical"),
        Case(
            "+ fp8 wire", "deduplicated; rows travel in fp8 with scales, gradients too; it changes numbers", wire=_FP8
        ),
        Case(
            "+ overlap", "deduplicated; in two chunks, one of which travels while experts compute the other", chunks=2
        ),
        Case("+ balance", "deduplicated; experts are placed by their loads, with a copy per rank", balanced=True),
        Case("all together", "hierarchy where there are nodes, fp8, two chunks, balance", best, _FP8, 2, True),
    ]
    return [case for case in cases if workload.has_levels or case.name != "+ hierarchy"]
