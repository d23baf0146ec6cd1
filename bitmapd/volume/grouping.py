"""The processes of a group find one another, and one of them leads (edge; `points.group` decides).

Who holds the lock on RUN_DIR/GROUP.group leads; the kernel gives it to another one when that
process ends.  The leader asks the others over their control sockets (verb `group`).

1. Members are the volumes of this host whose configuration names the group, running or not.
2. A cut is asked of all at once, and RELEASE or VOID follows at once.  Nobody is waited for longer
   than `patience_s`; a member that was not reached gives its own cut up by its own timer.
3. A leader that hangs keeps the group from being cut, as any member that hangs does, and no host
   waiting; the others say that they do not hear it.

A crash frees the lock.  What the leader had begun is ended by each member's timer, and by the next
leader.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from bitmapd.config import Paths, VolumeConfig, has_receiver, load_any, volume_names
from bitmapd.control.protocol import MAX_LINE_BYTES, Failure, Result, decode_answer, encode_request
from bitmapd.errors import BitmapdError, UsageError
from bitmapd.points.group import (
    FIRST,
    HEARD_S,
    NUMBER_BITS,
    UNHEARD,
    Act,
    Member,
    Order,
    Seen,
    decide,
)

LOOK_S: Final = 0.25
CONFIGURED_S: Final = 1.0  # between two looks for members that came or went
BUSY_S: Final = 0.02  # while a point of the group is on its way
ANSWER_S: Final = 1.0  # for what holds up no host


class _Other:
    """A connection to another member's control socket, made when it is needed."""

    def __init__(self, paths: Paths, name: str) -> None:
        self.name = name
        self._path = str(paths.control_socket(name))
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, args: dict[str, Any], within_s: float) -> dict[str, Any] | None:
        """None if it does not answer, or not in time."""
        try:
            async with asyncio.timeout(within_s):
                return await self._ask(args)
        except (TimeoutError, OSError, UsageError, asyncio.IncompleteReadError):
            self.close()  # an answer that comes yet would be taken for that of the next question
            return None

    async def _ask(self, args: dict[str, Any]) -> dict[str, Any] | None:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self._path, limit=MAX_LINE_BYTES)
        reader, writer = self._streams
        writer.write(encode_request("group", args))
        answer = decode_answer((await reader.readuntil(b"\n"))[:-1])
        if isinstance(answer, Failure) or not isinstance(answer, Result):
            self.close()
            return None
        return answer.value if isinstance(answer.value, dict) else None

    def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()


class Grouping:
    """See the module docstring."""

    def __init__(
        self,
        config: VolumeConfig,
        paths: Paths,
        member: Member,
        emit: Callable[..., None],
        changed: Callable[[], None],
    ) -> None:
        """`changed`: what is waited for is another thing now."""
        self._name, self._group = config.name, config.group
        self._paths = paths
        self.member = member
        self._emit, self._changed = emit, changed
        self._others: dict[str, _Other] = {}
        self._files: frozenset[tuple[object, ...]] = frozenset()  # as they were read last
        self._next_look_s = float("-inf")
        self._lock: int | None = None
        self._told = ""
        self._since_s = time.monotonic()
        self.leads = False

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                pace_s = LOOK_S
                if self.leads or self._take_lock():
                    self.leads = True
                    pace_s = await self._lead()
                self._tell_people(self.member.waits_for)
                await asyncio.sleep(pace_s)
        finally:
            for other in self._others.values():
                other.close()
            if self._lock is not None:
                os.close(self._lock)

    def _take_lock(self) -> bool:
        if self._lock is None:
            path = self._paths.run_dir / f"{self._group}.group"
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    # -- what the leader does ---------------------------------------------------------------
    async def _lead(self) -> float:
        """One look; when the next one is due, in seconds."""
        await self._look_for_members()
        members, absent = await self._states()
        decision = decide(members, absent)
        self.member.hear(decision.waits_for)
        for order in decision.orders:
            if order.act is Act.CUT:
                await self._cut(order)
            else:
                await self._tell(order)
        return BUSY_S if decision.is_busy else LOOK_S

    def _tell_people(self, waits_for: str) -> None:
        """The leader says what all wait for; the others, if that is the leader."""
        unheard = waits_for == UNHEARD and time.monotonic() >= self._since_s + HEARD_S
        told = waits_for if self.leads or unheard else ""
        if told != self._told:
            self._told = told
            self._changed()
            if told:
                self._emit("group-waits", group=self._group, message=told)

    async def _states(self) -> tuple[list[Seen], list[str]]:
        # The last word of the leader comes with its next question.
        question = {"do": "state", "waits_for": self.member.waits_for}
        answers = await self._ask_all(question, ANSWER_S)
        members, absent = [self.member.seen()], []
        for name, said in answers.items():
            try:
                members.append(Seen.of(name, said or {}))
            except (KeyError, TypeError, ValueError):
                absent.append(name)
        return members, absent

    async def _cut(self, order: Order) -> None:
        number = FIRST + random.getrandbits(NUMBER_BITS)
        wall_ns = time.time_ns()
        words = {"do": "cut", "number": number, "label": order.label, "wall_ns": wall_ns}
        within_s = self.member.patience_s
        asking = asyncio.ensure_future(self._ask_all(words, within_s))
        mine = self.member.obey(Order(Act.CUT, number, order.label), wall_ns)
        answers = await asking
        well = mine and all(said is not None and said.get("well") for said in answers.values())
        await self._tell(Order(Act.RELEASE if well else Act.VOID, number))

    async def _tell(self, order: Order) -> None:
        if self._name not in order.later:
            self.member.obey(order)
        words = {"do": order.act.value, "number": order.number}
        await self._ask_all(words, ANSWER_S, but=order.later)

    async def _ask_all(
        self, args: dict[str, Any], within_s: float, but: tuple[str, ...] = ()
    ) -> dict[str, dict[str, Any] | None]:
        others = [other for other in self._others.values() if other.name not in but]
        answers = await asyncio.gather(*(other.ask(args, within_s) for other in others))
        return {other.name: answer for other, answer in zip(others, answers, strict=True)}

    async def _look_for_members(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + CONFIGURED_S
        loop = asyncio.get_running_loop()
        files = await loop.run_in_executor(None, _files, self._paths)
        if files == self._files:
            return
        names = await loop.run_in_executor(None, _members, self._paths, str(self._group))
        self._files = files
        for name in set(self._others) - names:
            self._others.pop(name).close()
        for name in names - {self._name} - set(self._others):
            self._others[name] = _Other(self._paths, name)

    # -- what a member is asked ---------------------------------------------------------------
    def obey(self, args: dict[str, Any]) -> dict[str, Any]:
        """The verb `group`; UsageError for what is none."""
        word, member = args.get("do"), self.member
        if word == "state":
            member.hear(str(args.get("waits_for", "")))
            seen = member.seen()
            return {
                "is_ready": seen.is_ready,
                "obstacle": seen.obstacle,
                "is_due": seen.is_due,
                "label": seen.label,
                "stage": seen.stage.value,
                "number": seen.number,
                "committed": list(seen.committed),
                "applies": seen.applies,
                "unapplied": seen.unapplied,
                "is_still": seen.is_still,
                "away_s": seen.away_s,
            }
        try:
            act, number, wall_ns = Act(word), int(args["number"]), int(args.get("wall_ns", 0))
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{args!r} is nothing that a group can be asked") from None
        return {"well": member.obey(Order(act, number, str(args.get("label", ""))), wall_ns)}

    def figures(self) -> dict[str, Any]:
        """`points.group` of the status."""
        return {"name": self._group, "leads": self.leads} | self.member.figures()


def _files(paths: Paths) -> frozenset[tuple[object, ...]]:
    """What changes when a configuration does, also one that is written in place."""
    found: list[tuple[object, ...]] = []
    with os.scandir(paths.volumes_dir) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                seen = entry.stat()
                found.append((entry.name, seen.st_ino, seen.st_mtime_ns, seen.st_size))
    return frozenset(found)


def _members(paths: Paths, group: str) -> set[str]:
    return {config.name for config in _volumes(paths) if config.group == group}


def _volumes(paths: Paths) -> Iterable[VolumeConfig]:
    for name in volume_names(paths):
        # One that cannot be read cannot run, and whoever made it so is told by its start.
        with contextlib.suppress(BitmapdError):
            config = load_any(paths, name)
            if isinstance(config, VolumeConfig) and has_receiver(config):
                yield config
