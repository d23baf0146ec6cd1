"""promote: the receiver becomes the volume, where the other site is lost.

1. A sender that is there is not left behind unless it was forced: its hosts would go on without
   anybody who receives what they write.
2. Whatever a crash leaves, the same command again goes on from there.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from bitmapd.config import Paths, ReceiverConfig, load_any
from bitmapd.control.events import iso_time
from bitmapd.errors import WrongStateError
from bitmapd.volume.promoting import Media, Which, default_record, exchange, promote_now
from dmctl.cli.context import Context
from dmctl.cli.copying import ask
from dmctl.cli.lifecycle import stop_now
from dmctl.cli.probe import keep_rules
from dmctl.cli.processes import is_running, launch, start_lock
from dmctl.cli.switchover import demoted_volume, take_back

STOP_TIMEOUT_S = 60.0


def promote(context: Context, args: Namespace) -> int:
    name, output, paths = args.name, context.output, context.paths
    demoted = demoted_volume(paths, name)
    if demoted is not None:
        return take_back(context, demoted, args)
    config = receiver(paths, name)
    with start_lock(paths, name):
        if is_running(paths, name):
            _refuse_a_sender(context, name, force=args.force)
            stop_now(context, name, STOP_TIMEOUT_S)
        record = args.record or config.promoted_record or default_record(paths, name)
        media = Media(name, config.image, config.journal, record, config.listen)
        which = Which(args.point, args.label)
        done = promote_now(media, config, force=args.force, which=which)
        exchange(paths, config, done, record)
        keep_rules(context)
        launch(paths, name, args.timeout)
    status = ask(context, name, "status", {})
    body = {
        "name": name,
        "point": done.point,
        "at": iso_time(done.wall_ns / 1e9) if done.wall_ns else None,
        "consistent": done.obstacle is None,
        "term": done.line.term,
        "record": record,
        "device": status["device"],
    }
    if output.as_json:
        output.json("promote", body)
        return 0
    if done.obstacle is not None:
        output.say(f"this relies on your word: {done.obstacle.value}")
    of = f"point {done.point} of {body['at']}" if body["at"] else f"point {done.point}"
    output.say(f"volume '{name}' is served here with {of}: {status['device']}")
    output.say(f"what is written from now on is recorded on {record}, for the way back")
    return 0


def receiver(paths: Paths, name: str) -> ReceiverConfig:
    """WrongStateError for a volume."""
    config = load_any(paths, name)
    if isinstance(config, ReceiverConfig):
        return config
    how = "was promoted already" if config.receiver_dials else "is a volume, and no receiver"
    raise WrongStateError(
        f"'{name}' {how}: there is nothing to promote", hint=f"dmctl start {name}"
    )


def _refuse_a_sender(context: Context, name: str, *, force: bool) -> None:
    figures: dict[str, Any] = ask(context, name, "status", {})["receiver"]
    if figures["connected"] and not force:
        raise WrongStateError(
            f"the sender of '{name}' is connected: its volume is in use, and would be left without"
            " a receiver",
            hint=f"stop the volume first; 'dmctl promote {name} --force' takes its place"
            " all the same, and what its hosts write from then on is a second history",
        )
