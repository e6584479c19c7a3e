"""What ranks say of themselves when a collective hangs, and the report that one of them makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

from crossdock.comm.place import Spot

__all__ = ["Answer", "Post", "Report", "Silent", "Wait", "compose", "in_ranges"]

# A report is for a person: so many collectives, stacks and whereabouts of single ranks at most.
_SHOWN = 4
_POINT_TO_POINT = ""


class Post(NamedTuple):
    """What a rank says of itself every second or so.

    Attributes:
        rank: over all machines.
        host: name of its machine.
        pid: of its process.
        born: when the process started, in the machine's clock ticks: a number may be given to another process later.
        time: of this post, seconds since 1970.
        spot: where the main thread was.
        started: how many collectives it has started, by the name of the group.
        steps: that the process has begun.
        work: seconds that it has worked so far, without waiting for others, by phase.
    """

    rank: int
    host: str
    pid: int
    born: int
    time: float
    spot: Spot
    started: dict[str, int]
    steps: int
    work: dict[str, float]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Post:
        return cls(**{**fields, "spot": Spot(*fields["spot"])})


class Wait(NamedTuple):
    """What a rank waits in: a collective, or with `name` empty, a send or receive.

    Attributes:
        group: name of the group.
        number: of the group's collectives, from 1.
        name: of the collective.
        sizes: of its inputs on this rank.
        ranks: of the group.
    """

    group: str
    number: int
    name: str
    sizes: list[list[int]]
    ranks: list[int]

    @classmethod
    def point_to_point(cls) -> Wait:
        return cls("", 0, _POINT_TO_POINT, [], [])


class Answer(NamedTuple):
    """What a rank says of itself when it is asked.

    Attributes:
        post: as ever.
        waits: in which it is; the oldest first.
        stack: of Python, the innermost call last.
    """

    post: Post
    waits: list[Wait]
    stack: str

    def to_json(self) -> str:
        return json.dumps({"post": self.post._asdict(), "waits": self.waits, "stack": self.stack})

    @classmethod
    def from_json(cls, text: str | bytes) -> Answer:
        fields = json.loads(text)
        return cls(Post.of(fields["post"]), [Wait(*wait) for wait in fields["waits"]], fields["stack"])


class Silent(NamedTuple):
    """A rank that did not answer.

    Attributes:
        post: its last one; `None` where it never said anything.
        state: of its process as far as this machine can tell: `gone`, `stopped` or empty.
    """

    post: Post | None
    state: str


class Report(NamedTuple):
    """Why ranks hang, for a person.

    Attributes:
        kind: `timeout`: a collective did not complete; `lost`: a connection to another rank is gone.
        headline: one sentence.
        text: all of it, with the headline.
        rank: that the others wait for, if it is one.
        spot: where that was.
    """

    kind: str
    headline: str
    text: str
    rank: int | None
    spot: str


def in_ranges(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(runs) > 1 or any(len(run) > 1 for run in runs) else ''} {words}"


def compose(
    kind: str, what: str, answers: Mapping[int, Answer], silent: Mapping[int, Silent], *, now: float, slowest: str = ""
) -> Report:
    """The report.

    Args:
        kind: see `Report`.
        what: has happened, one clause.
        answers: of the ranks that answered.
        silent: all other ranks.
        now: seconds since 1970.
        slowest: the present straggler, for people; empty for none.
    """
    held = _held_up(answers)
    blocks = [_Hang.of(group, number, answers, silent) for group, number in held]
    # Those that wait for ranks which wait for nobody come first: the others are consequences.
    origins = [[rank for rank in hang.absent if not answers[rank].waits] for hang in blocks]
    origins = [own + hang.unknown + hang.within for own, hang in zip(origins, blocks, strict=True)]
    blocks = [hang for _, hang in sorted(zip(origins, blocks, strict=True), key=lambda pair: not pair[0])]
    missing = list(dict.fromkeys([*silent, *chain.from_iterable(origins)]))
    headline = _headline(what, missing, silent)
    lines = [headline]
    for hang in blocks[:_SHOWN]:
        lines += [f"  {line}" for line in hang.lines(answers)]
    if len(blocks) > _SHOWN:
        lines.append(f"  and {len(blocks) - _SHOWN} more collectives that are held up")
    exchanging = [rank for rank, answer in answers.items() if any(not wait.name for wait in answer.waits)]
    if exchanging:
        lines.append(f"  {in_ranges(exchanging)} in a send or receive, in {_spots(exchanging, answers)}")
    shown = missing or _one_of_each(blocks[0].names) if blocks else missing
    for rank in shown[:_SHOWN]:
        lines += [f"  {line}" for line in _whereabouts(rank, answers, silent, now)]
    if len(shown) > _SHOWN:
        lines.append(f"  likewise {in_ranges(shown[_SHOWN:])}")
    if slowest:
        lines.append(f"  before that: {slowest}")
    first = missing[0] if missing else None
    return Report(kind, headline, "\n".join(lines), first, _spot_of(first, answers, silent))


class _Hang(NamedTuple):
    """One collective that does not complete.

    Attributes:
        ranks: of its group.
        number: of the group's collectives.
        names: by rank that waits in it, what that rank takes it for.
        absent: ranks that have not arrived.
        unknown: ranks that did not answer, and are not known to have arrived.
        within: ranks that did not answer, and had arrived.
        passed: ranks that are done with it.
    """

    ranks: list[int]
    number: int
    names: dict[int, str]
    absent: list[int]
    unknown: list[int]
    within: list[int]
    passed: list[int]

    @classmethod
    def of(cls, group: str, number: int, answers: Mapping[int, Answer], silent: Mapping[int, Silent]) -> _Hang:
        waits = {
            rank: wait
            for rank, answer in answers.items()
            for wait in answer.waits
            if (wait.group, wait.number) == (group, number)
        }
        # Sizes of an all-to-all differ between ranks as they should.
        names = {
            rank: wait.name if "all_to_all" in wait.name or not wait.sizes else f"{wait.name} of {wait.sizes[0]}"
            for rank, wait in waits.items()
        }
        ranks = next(iter(waits.values())).ranks
        others: dict[tuple[bool, bool], list[int]] = {}
        for rank in ranks:
            if rank not in waits:
                key = rank in answers, _started(rank, group, answers, silent) >= number
                others.setdefault(key, []).append(rank)
        answered = ((True, False), (False, False), (False, True), (True, True))
        return cls(ranks, number, names, *(others.get(key, []) for key in answered))

    def lines(self, answers: Mapping[int, Answer]) -> list[str]:
        names = sorted(set(self.names.values()))
        kinds = names if len(names) > 1 and not all("all_gather" in name for name in names) else names[:1]
        arrived = list(self.names)
        lines = [
            f"{' / '.join(kinds)}, number {self.number} among {in_ranges(self.ranks)}, in {_spots(arrived, answers)}"
        ]
        if len(kinds) > 1:
            told = "; ".join(f"{in_ranges(r for r, n in self.names.items() if n == name)}: {name}" for name in kinds)
            lines.append(f"  these do not go together: {told}")
        lines.append(f"  arrived: {in_ranges(arrived)}")
        for said, ranks in (
            ("not arrived", self.absent),
            ("not known to have arrived", self.unknown),
            ("arrived, and does not answer", self.within),
            ("done with it", self.passed),
        ):
            if ranks:
                lines.append(f"  {said}: {in_ranges(ranks)}")
        if len(arrived) == len(self.ranks) and len(kinds) == 1:
            lines.append("  all ranks are there: the network between them, or a device, does not answer")
        return lines


def _held_up(answers: Mapping[int, Answer]) -> list[tuple[str, int]]:
    found = [(wait.group, wait.number) for answer in answers.values() for wait in answer.waits if wait.name]
    return list(dict.fromkeys(found))


def _started(rank: int, group: str, answers: Mapping[int, Answer], silent: Mapping[int, Silent]) -> int:
    post = answers[rank].post if rank in answers else silent[rank].post if rank in silent else None
    return 0 if post is None else post.started.get(group, 0)


def _one_of_each(names: Mapping[int, str]) -> list[int]:
    return list({name: rank for rank, name in reversed(list(names.items()))}.values())


def _headline(what: str, missing: list[int], silent: Mapping[int, Silent]) -> str:
    gone = [rank for rank in missing if rank in silent]
    stopped = [rank for rank in gone if silent[rank].state == "stopped"]
    dead = [rank for rank in gone if silent[rank].state == "gone"]
    if stopped:
        return f"{what}: {in_ranges(stopped)} stopped (a signal, SIGSTOP)"
    if dead:
        return f"{what}: {in_ranges(dead)} gone"
    if gone:
        return f"{what}: {in_ranges(gone)} did not answer"
    return f"{what}: {in_ranges(missing)} did not take part" if missing else what


def _spots(ranks: Iterable[int], answers: Mapping[int, Answer]) -> str:
    """Where ranks are: the place of most of them."""
    spots = [str(answers[rank].post.spot) for rank in ranks]
    return max(dict.fromkeys(spots), key=spots.count)


def _spot_of(rank: int | None, answers: Mapping[int, Answer], silent: Mapping[int, Silent]) -> str:
    if rank is None:
        return ""
    post = answers[rank].post if rank in answers else silent[rank].post
    return "" if post is None else str(post.spot)


def _whereabouts(rank: int, answers: Mapping[int, Answer], silent: Mapping[int, Silent], now: float) -> list[str]:
    if rank in answers:
        answer = answers[rank]
        where = f"rank {rank} (machine {answer.post.host}, process {answer.post.pid}) is in {answer.post.spot}:"
        return [where, *(f"  {line}" for line in answer.stack.splitlines())]
    post, state = silent[rank]
    if post is None:
        return [f"rank {rank} did not answer, and was never heard of"]
    state = {"gone": "its process is gone", "stopped": "its process is stopped"}.get(state, "it did not answer")
    ago = f"{max(now - post.time, 0):.1f} s ago"
    return [f"rank {rank} (machine {post.host}, process {post.pid}): {state}; last heard of {ago}, in {post.spot}"]
