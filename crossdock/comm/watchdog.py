"""Ends a run whose ranks wait for one another in vain, with a report of who waits for whom, and where that one is.

A thread on every rank tells the others through the store, every second or so, where its main thread is. The collectives
themselves are noted by torch's flight recorder, so that the main thread pays nothing for them. The first rank to find
one that takes too long asks all to answer, makes the report of what they say, and all end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from crossdock.comm import recorder
from crossdock.comm.hang_report import Answer, Post, Report, Silent, Wait, compose
from crossdock.comm.place import Place
from crossdock.comm.work_profile import Straggler, WorkProfile, find_straggler, is_waiting

__all__ = ["GRACE_SECONDS", "WATCHDOG_EXIT_CODE", "Watchdog"]

GRACE_SECONDS = 60
"""A process group's own time-out must be longer than the watchdog's by so much: else its error comes first."""
WATCHDOG_EXIT_CODE = 76
"""Of a rank that a watchdog ends."""

# Between samples of where the main thread is.
_SAMPLE_SECONDS = 0.2
_LOOK_SECONDS = 1.0
# The store answers some ten thousand requests per second; all ranks together may ask for a small part of them.
_LOOKS_PER_SECOND = 250
# Enough samples to tell ranks apart, however short steps are.
_STRAGGLER_SECONDS = 3.0
_ANSWER_SECONDS = 5.0
_END_SECONDS = 60.0
_SETTLE_SECONDS = 0.2
_KEYS = "crossdock-watchdog"


class Watchdog:
    """Watches this rank's main thread, from a thread of its own. Needs the default process group, with a store.

    Args:
        place: that the main thread writes.
        timeout: seconds that a collective may take. In a group with a longer time-out of its own, it may take that
            much less `GRACE_SECONDS`.
        straggler_interval: steps between looks for the slowest rank, which the first rank takes; 0: none.
        report: is called with the report, on the one rank that made it, in the watchdog's thread.
        ending: is called on every rank before the watchdog ends it, with what ranks have told (`tell`).

    Attributes:
        profile: how long the main thread worked, by phase.
        stragglers: the slowest rank at each look that nobody has taken yet; on the first rank alone.
    """

    def __init__(
        self,
        place: Place,
        timeout: float,
        *,
        straggler_interval: int = 0,
        report: Callable[[Report], None],
        ending: Callable[[list[str]], None] = lambda told: None,
    ) -> None:
        self.place, self.timeout = place, timeout
        self.profile = WorkProfile()
        self.stragglers: deque[Straggler] = deque()
        self._straggler_interval = straggler_interval if dist.get_rank() == 0 else 0
        self._report, self._ending = report, ending
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._interval = max(_LOOK_SECONDS, self._world_size / _LOOKS_PER_SECOND)
        # A connection of its own: another thread's request may wait for minutes in one that is shared.
        shared: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(_KEYS, shared.clone())
        self._main = threading.main_thread().ident
        self._born = _born(os.getpid())
        self._wake, self._stopped, self._explained = threading.Event(), threading.Event(), threading.Event()
        self._lost: str | None = None
        self._made: Report | None = None
        self._waiting: dict[object, float] = {}
        self._limits: dict[str, float] = {}
        self._thread: threading.Thread | None = None
        self._thread_seconds = 0.0
        # The posts at the last look for stragglers, how many steps had begun, and when it was.
        self._looked: dict[int, Post] = {}
        self._looked_at, self._looked_when = 0, time.monotonic()

    @property
    def seconds_spent(self) -> float:
        """Of the main thread, and of a processor in this thread."""
        return self.place.seconds + self._thread_seconds

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="crossdock-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank waits for nobody any more."""
        self._stopped.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(self._interval + _LOOK_SECONDS)

    def tell(self, text: str) -> None:
        """Let all ranks know of something, such as a failure, that must outlast this process."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"told/{self._store.add('told', 1)}", text)

    def told(self) -> list[str]:
        """What any rank has told, in order."""
        with contextlib.suppress(RuntimeError):
            keys = [f"told/{number + 1}" for number in range(self._store.add("told", 0))]
            return [self._store.get(key).decode() for key in keys if self._store.check([key])]
        return []

    def explain(self, what: str) -> Report | None:
        """Have all ranks answer after an error of a connection, and end those that still wait.

        Call it in the main thread, which then may end as it likes; this rank's watchdog has stopped.

        Args:
            what: has happened, one clause.

        Returns:
            The report, on the rank that has made it.
        """
        if self._thread is None or not self._thread.is_alive():
            return None
        self._lost = what
        self._wake.set()
        self._explained.wait(self._interval + _ANSWER_SECONDS + _END_SECONDS)
        self._stopped.set()
        return self._made

    def _run(self) -> None:
        last_sample = last_look = time.monotonic()
        while True:
            self._wake.wait(_SAMPLE_SECONDS)
            self._wake.clear()
            if self._stopped.is_set():
                return
            now = time.monotonic()
            frame = self._main_frame()
            if frame is not None:
                self.profile.add(self.place, frame, now - last_sample)
            last_sample = now
            if self._lost is not None or now - last_look >= self._interval:
                # A machine that slept has not waited.
                if self._look(min(now - last_look, 2 * self._interval)):
                    self._explained.set()
                    return
                last_look = now
            self._thread_seconds = time.thread_time()

    def _main_frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main or 0)

    def _look(self, seconds: float) -> bool:
        """Tell where this rank is, answer if any rank has asked, ask if this one waits in vain: true where all ends."""
        reason = ("lost", self._lost) if self._lost is not None else self._expired(seconds)
        try:
            self._store.set(f"post/{self._rank}", json.dumps(self._post()._asdict()))
            if self._store.check(["asked"]):
                self._answer()
            elif reason is None:
                self._look_for_straggler()
                return False
            elif self._store.add("claim", 1) == 1:
                self._store.set("asked", "")
                self._compose(*reason)
            else:
                return False  # another one asks at this moment
        except RuntimeError:
            # Whoever hosted the store is gone, and with it what the ranks could have said.
            if reason is None:
                return False
            own = self._own_answer()
            self._finish(compose(*reason, {self._rank: own}, {}, now=time.time()))
        return True

    def _expired(self, seconds: float) -> tuple[str, str] | None:
        """What has not completed in time; `seconds` have passed since the last look."""
        waiting: dict[object, float] = {}
        for group, count in recorder.counts().items():
            if count.completed < count.started:
                key = group, count.completed
                waiting[key] = self._waiting.get(key, -seconds) + seconds
                if waiting[key] > self.timeout and waiting[key] > self._limit(group) and self._is_ours(group):
                    return "timeout", f"a collective did not complete within {self._limit(group):g} s"
        frame = self._main_frame()
        if not waiting and frame is not None and is_waiting(frame):
            key = id(frame), frame.f_lasti, frame.f_code, self.place.spot()
            waiting[key] = self._waiting.get(key, -seconds) + seconds
            if waiting[key] > self.timeout:
                return "timeout", f"a send or receive did not complete within {self.timeout:g} s"
        self._waiting = waiting
        return None

    def _is_ours(self, group: str) -> bool:
        """Whether torch knows a group by name: those of torchft, which come and go, have none and watch themselves.

        What they broke off may stay incomplete by its count for ever: it ends in any order.
        """
        names = {str(name) for name in dist.distributed_c10d._world.pg_names.values()}
        return any(each.group in names for each in recorder.unfinished() if each.recorder_id == group)

    def _limit(self, group: str) -> float:
        """Seconds that a collective of a group may take."""
        if group not in self._limits:
            timeouts = [each.timeout for each in recorder.unfinished() if each.recorder_id == group]
            self._limits[group] = max([self.timeout, *(seconds - GRACE_SECONDS for seconds in timeouts)])
        return self._limits[group]

    def _post(self) -> Post:
        return Post(
            self._rank,
            socket.gethostname(),
            os.getpid(),
            self._born,
            time.time(),
            self.place.spot(),
            recorder.started(),
            self.place.steps,
            dict(self.profile.seconds),
        )

    def _own_answer(self) -> Answer:
        groups = list(dist.distributed_c10d._world.pg_names.items())
        members = {str(name): dist.get_process_group_ranks(group) for group, name in groups}
        waits = [
            Wait(each.group, each.number, each.name, each.sizes, members.get(each.group, []))
            for each in recorder.unfinished()
        ]
        frame = self._main_frame()
        if self._lost is None and not waits and frame is not None and is_waiting(frame):
            waits = [Wait.point_to_point()]
        return Answer(self._post(), waits, "".join(traceback.format_stack(frame)))

    def _answer(self) -> None:
        """Answer the rank that has asked; end when it has its report."""
        self._store.set(f"answer/{self._rank}", self._own_answer().to_json())
        silent: dict[str, Any] = {}
        with contextlib.suppress(RuntimeError):  # the rank that asked may be gone by now
            self._store.wait(["end"], timedelta(seconds=_ANSWER_SECONDS + self._interval + _END_SECONDS))
            silent = json.loads(self._store.get("end"))
        self._end([Post.of(post) for post in silent.values()])

    def _compose(self, kind: str, what: str) -> None:
        """Ask all ranks; make the report of their answers; then all end."""
        answers = {self._rank: self._own_answer()}
        outstanding = set(range(self._world_size)) - {self._rank}
        posts: dict[int, Post] = {}
        states: dict[int, str] = {}
        deadline = time.monotonic() + _ANSWER_SECONDS + self._interval
        while outstanding and time.monotonic() < deadline:
            for rank in sorted(outstanding):
                if self._store.check([f"answer/{rank}"]):
                    answers[rank] = Answer.from_json(self._store.get(f"answer/{rank}"))
                    outstanding.discard(rank)
            posts = self._posts(outstanding)
            states = {rank: _state(post) for rank, post in posts.items()}
            if all(states.get(rank) for rank in outstanding):
                break  # their processes cannot answer
            time.sleep(_SETTLE_SECONDS)
        silent = {rank: Silent(posts.get(rank), states.get(rank, "")) for rank in outstanding}
        slowest = self._slowest({rank: answer.post for rank, answer in answers.items()})
        report = compose(kind, what, answers, silent, now=time.time(), slowest=slowest)
        self._finish(report, silent)

    def _finish(self, report: Report, silent: dict[int, Silent] | None = None) -> None:
        self._made = report
        self._report(report)
        dead = {rank: post for rank, (post, _) in (silent or {}).items() if post is not None}
        with contextlib.suppress(RuntimeError):
            self._store.set("end", json.dumps({rank: post._asdict() for rank, post in dead.items()}))
        self._end(dead.values())

    def _end(self, silent: Iterable[Post]) -> None:
        """End this process, and those of this machine that do not answer, which nobody else might end."""
        self._ending(self.told())
        sys.stdout.flush()
        sys.stderr.flush()
        # All others have read of the end by then: no rank sees another one leave.
        time.sleep(_SETTLE_SECONDS)
        for post in silent:
            if post.host == socket.gethostname() and _born(post.pid) == post.born:
                with contextlib.suppress(OSError):
                    os.kill(post.pid, signal.SIGKILL)
        if self._lost is None:
            os._exit(WATCHDOG_EXIT_CODE)

    def _posts(self, ranks: Iterable[int]) -> dict[int, Post]:
        """The last posts of those that have made one."""
        there = list(ranks)
        if there and not self._store.check([f"post/{rank}" for rank in there]):
            there = [rank for rank in there if self._store.check([f"post/{rank}"])]
        texts = self._store.multi_get([f"post/{rank}" for rank in there]) if there else []
        return {rank: Post.of(json.loads(text)) for rank, text in zip(there, texts, strict=True)}

    def _look_for_straggler(self) -> None:
        """From what ranks have posted: no rank waits for it."""
        if not self._straggler_interval or self.place.steps - self._looked_at < self._straggler_interval:
            return
        if time.monotonic() - self._looked_when < _STRAGGLER_SECONDS:
            return
        posts = self._posts(range(self._world_size))
        slowest = find_straggler(self._work_since(posts))
        self._looked, self._looked_at, self._looked_when = posts, self.place.steps, time.monotonic()
        if slowest is not None:
            self.stragglers.append(slowest)

    def _slowest(self, posts: dict[int, Post]) -> str:
        slowest = find_straggler(self._work_since(posts))
        return str(slowest) if slowest is not None and slowest.ratio > 1 else ""

    def _work_since(self, posts: dict[int, Post]) -> dict[int, dict[str, float]]:
        """Seconds per step by phase since the last look for stragglers, of ranks that have made steps since."""
        work = {}
        for rank, post in posts.items():
            before = self._looked.get(rank)
            steps = post.steps - (before.steps if before is not None else 0)
            if steps > 0:
                done = {"start": post.work.get("start", 0.0)} if before is None else before.work
                work[rank] = {name: (spent - done.get(name, 0.0)) / steps for name, spent in post.work.items()}
        return work


def _state(post: Post) -> str:
    """Of a process of this machine: `gone`, `stopped` or, where nothing is known against it, empty."""
    if post.host != socket.gethostname():
        return ""
    stat = _stat(post.pid)
    if stat is None or _born(post.pid) != post.born:
        return "gone" if Path("/proc/self/stat").exists() else ""
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(stat[0], "")


def _born(pid: int) -> int:
    """When a process began, in clock ticks since the machine did; 0 where there is no such process, or no Linux."""
    stat = _stat(pid)
    return 0 if stat is None else int(stat[19])


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, the first of which is the state."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
