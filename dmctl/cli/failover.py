"""takeover, demote and partner: what a node of a pair is asked, and told.

A cluster asks each of its volumes every few seconds, and a failover waits for a dozen of these
commands one after the other: what only the rare ones need is imported by them.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from bitmapd.config import (
    Paths,
    ReceiverConfig,
    VolumeConfig,
    has_receiver,
    load_any,
    load_volume,
)
from bitmapd.control.client import SilentError
from bitmapd.errors import BusyError, TimeOutError, UnreachableError, WrongStateError
from dmctl.cli.context import Context
from dmctl.cli.copying import ask

TAKEOVER_TIMEOUT_S = 60.0
LAYERS_TIMEOUT_S = 60.0
FENCING = {
    "agent": "the fence command is at work",
    "late-writes": "done; what was on its way to the primary is waited for",
}
CONFLICTS = (
    "{own_extents} extents written alone here, {partner_extents} at the partner, {both_extents} at"
    " both"
)
# Exit status of `dmctl partner`, by state.
STATUS = {"paired": 0, "cut": 100, "alone": 100, "waiting": 15, "outdated": 1, "split-brain": 16}


def takeover(context: Context, args: Namespace) -> int:
    """Serve without the partner."""
    name, output = args.name, context.output
    words = {"fenced": args.fenced, "force": args.force, "beside": args.beside}
    config = load_volume(context.paths, name)
    within_s = _within_s(config)
    if config.fence_command is not None:
        within_s += config.fence_timeout_s + config.late_writes_s
    try:
        answer = ask(context, name, "takeover", words, within_s)
    except (BusyError, UnreachableError):
        if args.wait is None:
            raise
        _wait(context, name, args.wait)
        answer = ask(context, name, "takeover", words, within_s)
    partner = answer["partner"]
    if output.as_json:
        output.json("takeover", {"name": name, **answer})
        return 0
    if args.fenced and partner["kept"]:
        output.say("this relies on your word that the keeper's record as it is will not be used")
    elif args.fenced:
        output.say("this relies on your word that the partner can write neither side any more")
    if partner["state"] == "paired":
        there = "goes on as it was" if args.beside else "has stopped its hosts"
        output.say(f"volume '{name}' is served here; the partner {there}")
    elif partner["compared_extents_total"]:
        output.say(
            f"volume '{name}' is served here alone; nobody knows what the partner has written, so"
            " everything is compared"
        )
    else:
        output.say(
            f"volume '{name}' is served here alone; {partner['absorbed_extents_total']} extents"
            " were the partner's and are copied"
        )
    return 0


def _wait(context: Context, name: str, within_s: float) -> None:
    """Until the partner is there, which a takeover without a proof needs."""
    try:
        with context.control(name) as client:
            client.call("wait", {"for": "paired"}, within_s=within_s)
    except SilentError:
        raise
    except TimeOutError:
        raise TimeOutError(
            f"the partner of volume '{name}' did not come in time, and nothing proves that it can"
            " write no more",
            hint=f"if it is dead for certain: 'dmctl takeover {name} --fenced'",
        ) from None


def _within_s(config: VolumeConfig) -> float:
    """Hosts are sent away, or let in; the kernel's layers take their time, too."""
    return TAKEOVER_TIMEOUT_S + (LAYERS_TIMEOUT_S if config.attach == "dm" else 0.0)


def demote(context: Context, args: Namespace) -> int:
    """Let hosts in no more, and give everything to the partner."""
    name, output = args.name, context.output
    config = demotable(context.paths, name)
    if config is not None:
        from dmctl.cli.switchover import demote_site  # noqa: PLC0415  (imports nearly everything)

        return demote_site(context, config, args)
    within_s = _within_s(load_volume(context.paths, name))
    answer = ask(context, name, "demote", {"force": args.force}, within_s)
    if output.as_json:
        output.json("demote", {"name": name, **answer})
        return 0
    rest = "the partner has everything" if answer["given"] else "what it owns stays in its record"
    output.say(f"volume '{name}' lets no host in at this node; {rest}")
    return 0


def demotable(paths: Paths, name: str) -> VolumeConfig | None:
    """The volume, if it has a receiver."""
    config = load_any(paths, name)
    if isinstance(config, ReceiverConfig) or not has_receiver(config):
        return None
    return config


def partner(context: Context, args: Namespace) -> int:
    """Show what the two nodes are to one another, or end that."""
    if args.dissolve:
        from dmctl.cli.dissolving import dissolve  # noqa: PLC0415  (imports the whole format)

        dissolve(context, args)
        return 0
    if args.ping is not None:
        ping(context, args)
        return 0
    if args.rejoin:
        return rejoin(context, args)
    figures: dict[str, Any] = ask(context, args.name, "partner", {"lead": args.lead})
    status = STATUS.get(figures["state"], 1)
    if context.output.as_json:
        context.output.json("partner", {"name": args.name, "partner": figures})
        return status
    for label, value in rows(figures):
        context.output.line(f"{label:<16} {value}")
    return status


def ping(context: Context, args: Namespace) -> None:
    """Round trips to the partner."""
    trips: list[float] = ask(context, args.name, "partner", {"ping": args.ping})
    least, mean, most = min(trips), sum(trips) / len(trips), max(trips)
    if context.output.as_json:
        found = {"min_seconds": least, "mean_seconds": mean, "max_seconds": most}
        context.output.json(
            "partner", {"name": args.name, "ping": {"round_trips_seconds": trips, **found}}
        )
        return
    least, mean, most = (value * 1000 for value in (least, mean, most))
    context.output.line(f"{len(trips)} there and back: {least:.3f}/{mean:.3f}/{most:.3f} ms")
    context.output.detail("the least, the mean and the most")


def rejoin(context: Context, args: Namespace) -> int:
    """End a split brain: this node begins anew, as one that owns nothing, and the other goes on."""
    name = args.name
    state = ask(context, name, "partner", {})["state"]
    if state != "split-brain":
        raise WrongStateError(
            f"volume '{name}' is in the state '{state}' here, and no split brain",
            hint=f"'dmctl partner {name}' shows what the nodes are to one another",
        )
    context.output.confirm(
        "hosts of this node are cut off, and the other node goes on; what either has written last"
        " to a place is there, and the file systems on the volume have to be checked",
        f"Begin anew with volume '{name}' at this node?",
        yes=args.yes,
    )
    from dmctl.cli.lifecycle import restart  # noqa: PLC0415  (once in the life of a volume)

    return restart(context, name)


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What people want to see of `partner`, a label and a value each."""
    peer = figures["peer"]
    link = figures["link"]
    if figures["rtt_seconds"] is not None and link == "up":
        link += f", {figures['rtt_seconds'] * 1000:.2f} ms there and back"
    if figures["last_error"] and figures["link"] != "up":
        link += f" ({figures['last_error']})"
    found = [
        ("node", str(figures["node"])),
        ("state", f"{figures['state']} for {figures['since']:.0f} s"),
        *((("role", role),) if (role := _role(figures)) else ()),
        ("hosts", _hosts(figures["serving"], peer)),
        ("link", link),
        ("lead", "this node" if figures["copier"] else "the partner"),
        ("term", str(figures["term"])),
        (
            "extents",
            f"{figures['own_extents']} here, {figures['partner_extents']} at the partner,"
            f" {figures['owed_extents']} on their way",
        ),
        (
            "waiting",
            f"{figures['waiting_requests']} requests of hosts, up to"
            f" {figures['oldest_wait_seconds']:.1f} s",
        ),
        (
            "messages",
            f"{figures['messages_total']} asked, {figures['handovers_total']} extents given",
        ),
    ]
    if figures["conflicts"] is not None:
        found.append(("conflicts", CONFLICTS.format(**figures["conflicts"])))
    if figures["hands_over"]:
        found.append(("secondary", "handed over: the partner copies what is written here"))
    if figures["fencing"] is not None:
        found.append(("fencing", FENCING[figures["fencing"]]))
    if figures["proof"] is not None:
        found.append(("proof", figures["proof"]))
    if peer is not None:
        found.append(
            (
                "partner",
                f"{peer['version']}, keeps the record"
                if peer["role"] == "keeper"
                else f"{peer['version']}, secondary {peer['secondary']}, {peer['dirty_bytes']}"
                f" bytes to copy, {peer['lag_seconds']:.1f} s behind",
            )
        )
    return found


def _role(figures: dict[str, Any]) -> str | None:
    """Which of the two is a keeper, if one is."""
    if figures["role"] == "keeper":
        return "keeper: the partner has the volume, this node its record"
    if figures["kept"]:
        return "the partner is a keeper of this node's record"
    return None


def _hosts(here: bool, peer: dict[str, Any] | None) -> str:
    """Where they are let in, as far as is known here."""
    there = peer is not None and peer["serves"]
    return {
        (True, True): "let in here and at the partner",
        (True, False): "let in here",
        (False, True): "let in at the partner",
        (False, False): "let in by 'dmctl takeover' only",
    }[here, there]
