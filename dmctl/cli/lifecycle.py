"""start, stop, wait, remove."""

from __future__ import annotations

import contextlib
import select
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from bitmapd.config import (
    ConfigError,
    Paths,
    ReceiverConfig,
    VolumeConfig,
    atomic_write,
    check_name,
    device_of,
    has_receiver,
    is_keeper,
    load_any,
    remove_volume,
)
from bitmapd.control.client import SilentError
from bitmapd.errors import BitmapdError, TimeOutError, UsageError, WrongStateError
from dmctl.cli.context import Context, StillWaitingError, each, selected
from dmctl.cli.copying import is_paused
from dmctl.cli.killing import (
    END_TIMEOUT_S,
    holder,
    kill,
    not_found,
    stays_stopped,
    waiting_hosts,
)
from dmctl.cli.processes import POLL_S, Watched, is_running, launch, start_lock

START_TIMEOUT_S = 120.0


@contextlib.contextmanager
def _forced(paths: Paths, config: ReceiverConfig | VolumeConfig) -> Iterator[None]:
    """The start within is one whatever became of the volume's receiver."""
    if isinstance(config, ReceiverConfig) or not has_receiver(config):
        raise WrongStateError(
            f"'{config.name}' is no volume with a receiver: its start cannot be forced",
            hint=f"dmctl start {config.name}",
        )
    path = paths.force_file(config.name)
    atomic_write(path, b"")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def start(context: Context, args: Namespace) -> int:
    if args.force and args.all:
        raise UsageError("--force is for volumes that are named")
    names = selected(context, args, default_all=False)
    return _start(context, names, args.timeout, distrusted=args.resync_all, forced=args.force)


def _start(
    context: Context,
    names: Sequence[str],
    timeout_s: float,
    *,
    distrusted: bool = False,
    forced: bool = False,
) -> int:
    def one(name: str) -> dict[str, Any]:
        load_any(context.paths, name)
        with start_lock(context.paths, name, timeout_s):
            config = load_any(context.paths, name)  # it may have been removed meanwhile
            result = "running"
            running = is_running(context.paths, name)
            if distrusted:
                if isinstance(config, ReceiverConfig):
                    raise WrongStateError(f"'{name}' is a receiver: it has no record")
                if is_keeper(config):
                    raise WrongStateError(f"'{name}' is a keeper here: it compares nothing")
                _distrust(context, config, running=running)
            if not running:
                with _forced(context.paths, config) if forced else contextlib.nullcontext():
                    launch(context.paths, name, timeout_s)
                result = "started"
        if isinstance(config, ReceiverConfig):
            already = " already" if result == "running" else ""
            context.output.say(f"receiver '{name}' runs{already}: {config.listen}")
            return {"result": result, "device": config.listen, "paused": False}
        if is_keeper(config):
            already = " already" if result == "running" else ""
            context.output.say(f"the keeper of '{name}' runs{already}")
            return {"result": result, "device": "", "paused": False}
        if config.node is not None:
            _wait_for_partner(context, config)
        already = " already" if result == "running" else ""
        if config.serve != "always" and result == "started":
            context.output.say(f"hosts are let in by 'dmctl takeover {name}'")
        paused = is_paused(context, name)
        stands = f"; copying is paused, 'dmctl resume {name}' ends that" if paused else ""
        context.output.say(f"volume '{name}' runs{already}: {device_of(config)}{stands}")
        return {"result": result, "device": device_of(config), "paused": paused}

    return each(context, "start", names, "start", one)


def _wait_for_partner(context: Context, config: VolumeConfig) -> None:
    """StillWaitingError if the volume is not served within `partner_wait`; the daemon waits on."""
    name = config.name
    try:
        with context.control(name) as client:
            client.call("wait", {"for": "started"}, within_s=max(config.partner_wait_s, 0.001))
    except SilentError:
        raise
    except TimeOutError:
        raise StillWaitingError(
            f"volume '{name}' runs, and waits for its partner at {config.partner}",
            hint=f"start the partner; if it is dead for certain: 'dmctl takeover {name} --fenced'",
        ) from None


def _distrust(context: Context, config: VolumeConfig, *, running: bool) -> None:
    if running:
        raise WrongStateError(
            f"volume '{config.name}' runs already; --resync-all is for one that is stopped",
            hint=f"'dmctl verify {config.name} --repair' compares everything while it runs",
        )
    from bitmapd.volume.session import distrust  # noqa: PLC0415  (rarely needed, imports the format)

    distrust(config, context.paths)
    context.output.say(f"volume '{config.name}': everything is compared, and copied if it differs")


def stop(context: Context, args: Namespace) -> int:
    names = selected(context, args, default_all=False)

    def one(name: str) -> dict[str, Any]:
        try:
            answer = _stop(context, name, args.timeout, now=args.now, bar=len(names) == 1)
        except WrongStateError:
            if is_running(context.paths, name):
                raise
            config = _must_exist(context, name)
            if config is not None and (killed := _without_socket(context, config, args)):
                return killed
            context.output.say(f"volume '{name}' is stopped already")
            return dict.fromkeys(("clean", "record_extents", "paused")) | {"result": "not running"}
        except TimeOutError as error:
            if not args.kill:
                raise
            return _kill(context, load_any(context.paths, name), args, error)
        left = answer.get("record_extents")
        rest = "" if answer.get("clean") else f"; {left} extents are left in its record"
        if isinstance(config := _must_exist(context, name), ReceiverConfig):
            kept = "" if answer.get("clean") else "; what its journal has is applied after a start"
            context.output.say(f"receiver '{config.name}' is stopped{kept}")
            return {"result": "stopped", **answer}
        if config is not None and is_keeper(config):
            context.output.say(
                f"the keeper of '{name}' is stopped; its record names {left} extents"
            )
            return {"result": "stopped", **answer}
        if answer.get("paused"):
            rest += f"; it stays paused, until 'dmctl resume {name}' after the next start"
        context.output.say(f"volume '{name}' is stopped{rest}")
        return {"result": "stopped", **answer}

    return each(context, "stop", names, "stop", one)


def stop_now(context: Context, name: str, timeout_s: float, *, now: bool = True) -> None:
    """Stop a volume or a receiver at once, or when nothing is left to copy, and wait for the end of
    its process."""
    _stop(context, name, timeout_s, now=now, bar=False)


def restart(context: Context, name: str) -> int:
    """Stop a volume at once, and start it again with nothing but what its record says."""
    stop_now(context, name, START_TIMEOUT_S)
    return _start(context, [name], START_TIMEOUT_S)


def _stop(
    context: Context, name: str, timeout_s: float | None, *, now: bool, bar: bool
) -> dict[str, Any]:
    """Ask for the stop, and wait for the end of the process."""
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    most = 0
    shown = context.output.progress(f"stopping {name}") if bar else contextlib.nullcontext(None)
    with (
        context.control(name) as client,
        contextlib.closing(Watched(client)) as process,
        shown as share,
    ):

        def told(event: dict[str, Any]) -> None:
            nonlocal most
            dirty = int(event.get("dirty_bytes") or 0)
            most = max(most, dirty)
            if share is not None:
                share(1 - dirty / most if most else 1.0)

        try:
            answer = client.call("stop", {"now": now}, within_s=timeout_s, on_event=told)
        except SilentError:
            raise
        except TimeOutError as error:
            if deadline_s is None or time.monotonic() < deadline_s:
                stays_stopped(context.paths, name)  # it has given up, and ends as by a crash
                raise
            raise TimeOutError(
                f"volume '{name}' did not stop in time; it goes on stopping",
                hint=f"'dmctl stop {name} --now' leaves what is not copied in the record",
            ) from error
        if not process.wait(END_TIMEOUT_S if deadline_s is None else _left_s(deadline_s)):
            raise TimeOutError(
                f"volume '{name}' has stopped, and its process has not ended",
                hint="see 'The process hangs' in docs/recovery.md",
            )
    return dict(answer)


def _without_socket(
    context: Context, config: VolumeConfig | ReceiverConfig, args: Namespace
) -> dict[str, Any] | None:
    """Of a volume whose control socket nobody answers at; None if really nobody serves it."""
    with holder(context.paths, config) as found:
        if found is None:
            return None
    error = SilentError(
        f"process {found.pid} holds the record of volume '{config.name}' and does not listen: it"
        " starts, ends, or hangs",
        hint=f"wait for it, or end it: 'dmctl stop {config.name} --kill'",
    )
    if not args.kill:
        raise error
    return _kill(context, config, args, error)


def _kill(
    context: Context,
    config: VolumeConfig | ReceiverConfig,
    args: Namespace,
    reason: TimeOutError,
) -> dict[str, Any]:
    from dmctl.cli.record import recorded_extents  # noqa: PLC0415  (imports the whole format)

    context.output.say(reason.message)
    with holder(context.paths, config) as found:
        if found is None:
            raise not_found(config.name)
        kill(context.paths, config, found, args.timeout)
    if isinstance(config, ReceiverConfig):
        context.output.say(
            f"receiver '{config.name}' is stopped as by a crash: process {found.pid} was killed"
        )
        return {"result": "killed", "clean": False, "record_extents": None, "paused": None}
    left = recorded_extents(config)
    context.output.say(
        f"volume '{config.name}' is stopped as by a crash: process {found.pid} was killed; its"
        f" record names {left} extents{waiting_hosts(config)}"
    )
    return {"result": "killed", "clean": False, "record_extents": left, "paused": None}


def _must_exist(context: Context, name: str) -> VolumeConfig | ReceiverConfig | None:
    # A mistake in its configuration is no reason not to say that it is stopped.
    with contextlib.suppress(ConfigError):
        return load_any(context.paths, name)
    return None


def wait(context: Context, args: Namespace) -> int:
    if args.newer_than is not None and args.state != "point":
        raise UsageError("--newer-than goes with --for point")
    deadline_s = None if args.timeout is None else time.monotonic() + args.timeout
    _must_exist(context, args.name)
    words = {"for": args.state, "newer_than": args.newer_than or 0}
    waiters = {"started": _wait_started, "stopped": _wait_stopped}
    wait_for = waiters.get(args.state, partial(_wait_inside, words=words))
    if not wait_for(context, args.name, deadline_s):
        raise TimeOutError(f"volume '{args.name}' was not {args.state} in time")
    if context.output.as_json:
        context.output.json("wait", {"name": args.name, "state": args.state})
    return 0


def _left_s(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else max(0.001, deadline_s - time.monotonic())


def _wait_inside(
    context: Context, name: str, deadline_s: float | None, *, words: dict[str, Any]
) -> bool:
    """The process knows when it is in this state."""
    with context.control(name) as client:
        try:
            client.call("wait", words, within_s=_left_s(deadline_s))
        except SilentError:
            raise
        except TimeOutError:
            return False
        except BitmapdError:
            if is_running(context.paths, name):
                raise
            state = words["for"]
            raise WrongStateError(f"volume '{name}' was stopped before it was {state}") from None
    return True


def _wait_started(context: Context, name: str, deadline_s: float | None) -> bool:
    # No event tells that another process begins to listen on a socket.
    while not is_running(context.paths, name):
        if deadline_s is not None and time.monotonic() >= deadline_s:
            return False
        select.select([], [], [], POLL_S)
    return True


def _wait_stopped(context: Context, name: str, deadline_s: float | None) -> bool:
    try:
        client = context.control(name)
    except WrongStateError:
        return True
    with client, contextlib.closing(Watched(client)) as process:
        return process.wait(_left_s(deadline_s))


def remove(context: Context, args: Namespace) -> int:
    name = check_name(args.name)
    config: VolumeConfig | ReceiverConfig | None = None
    try:
        config = load_any(context.paths, name)
    except ConfigError:
        if args.wipe_record:
            raise  # nobody knows which record is meant
    _must_be_stopped(context, name)
    if isinstance(config, ReceiverConfig):
        return _remove_receiver(context, args, config)
    context.output.confirm(
        _loses(config, name, wipe=args.wipe_record), f"Remove volume '{name}'?", yes=args.yes
    )
    with start_lock(context.paths, name) as lock:
        _must_be_stopped(context, name)
        if config is not None and args.wipe_record:
            from dmctl.cli.record import wipe  # noqa: PLC0415  (imports the whole format)

            wipe(config)
        remove_volume(context.paths, name, config.uuid if config is not None else None)
        for leftover in (context.paths.error_file(name), context.paths.pid_file(name), lock):
            leftover.unlink(missing_ok=True)
    from dmctl.cli.probe import keep_rules  # noqa: PLC0415  (imports the whole format)

    keep_rules(context, config)
    if config is not None and is_keeper(config):
        context.output.say(f"the keeper of '{name}' is removed")
    else:
        context.output.say(f"volume '{name}' is removed; primary and secondary are as they were")
    if context.output.as_json:
        body = {"name": name, "result": "removed", "record_wiped": bool(args.wipe_record)}
        context.output.json("remove", body)
    return 0


def _remove_receiver(context: Context, args: Namespace, config: ReceiverConfig) -> int:
    name = config.name
    if args.wipe_record:
        raise UsageError(f"'{name}' is a receiver: --wipe-record is for volumes")
    context.output.confirm(
        f"the configuration of receiver '{name}' would be lost; its image and its journal stay",
        f"Remove receiver '{name}'?",
        yes=args.yes,
    )
    with start_lock(context.paths, name) as lock:
        _must_be_stopped(context, name)
        remove_volume(context.paths, name, None)
        for leftover in (context.paths.error_file(name), context.paths.pid_file(name), lock):
            leftover.unlink(missing_ok=True)
    from dmctl.cli.probe import keep_rules  # noqa: PLC0415  (imports the whole format)

    keep_rules(context, config)
    context.output.say(f"receiver '{name}' is removed; its image and its journal are as they were")
    if context.output.as_json:
        body = {"name": name, "result": "removed", "record_wiped": False}
        context.output.json("remove", body)
    return 0


def _must_be_stopped(context: Context, name: str) -> None:
    if is_running(context.paths, name):
        raise WrongStateError(f"volume '{name}' is running", hint=f"first: dmctl stop {name}")


def _loses(config: VolumeConfig | None, name: str, *, wipe: bool) -> str:
    what = f"the configuration of volume '{name}' would be lost"
    if config is None or not wipe:
        return what
    from dmctl.cli.record import recorded_extents  # noqa: PLC0415

    extents = recorded_extents(config)
    if extents is None:
        return f"{what}, and its record {config.record}"
    return (
        f"{what}, and its record {config.record}, which names {extents} extents that the secondary"
        " may lack"
    )
