"""Events of two appliances (pure; see `control.catalogue`)."""

from __future__ import annotations

from bitmapd.control.eventkinds import EventKind, Level

ROWS = (
    EventKind(
        "partner-up",
        Level.NOTICE,
        ("was",),
        "the two appliances have exchanged their records; `was` is the state before",
        "nothing",
    ),
    EventKind(
        "partner-down",
        Level.WARNING,
        ("message",),
        "the partner cannot be reached, or went away; hosts go on where this node has the right to",
        "look at the partner and the network between; if it is dead for certain *Takeover*",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "partner-refused",
        Level.ERROR,
        ("code", "message"),
        "the partner ended the connection and says why",
        "what the message says; a difference of the configurations is the usual reason",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "partner-protocol-error",
        Level.ERROR,
        ("code", "message"),
        "the partner sent something wrong, or nothing in time: the connection was ended, and no"
        " record has changed",
        "what the message says; report it if both run the same version",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "records-exchanged",
        Level.NOTICE,
        ("own_extents", "partner_extents", "dirty_extents"),
        "each node knows what the other may write; `dirty_extents` were taken over",
        "nothing",
    ),
    EventKind(
        "record-fallback",
        Level.WARNING,
        ("message",),
        "this node's record cannot be written, and the partner's copy of it counts in its place; if"
        " the partner is lost, too, writes to new places wait",
        "mend the record's device, or replace it: see [failover.md](failover.md)",
        limited=True,
    ),
    EventKind(
        "partner-record-read",
        Level.NOTICE,
        ("device", "extents"),
        "a takeover by a node that has not met the other: the other's record at `device` names"
        " `extents`, and with what this node's names they are copied; nothing is compared",
        "nothing",
    ),
    EventKind(
        "partner-record-unusable",
        Level.WARNING,
        ("device", "message"),
        "a takeover by a node that has not met the other: the other's record cannot be read, or"
        " does not say all, so everything is compared",
        "look at `partner_record` if that was not to be expected",
    ),
    EventKind(
        "partner-record-failing",
        Level.WARNING,
        (),
        "the partner cannot write its record",
        "`dmctl events` at the partner says why; do not stop this node before that is mended",
    ),
    EventKind(
        "partner-record-ok",
        Level.NOTICE,
        (),
        "the partner's record can be written again",
        "nothing",
    ),
    EventKind(
        "gone-on",
        Level.WARNING,
        (),
        "the link is lost, and hosts take new places all the same (`on_cut = go-on`): the partner"
        " does not know of them, and compares everything if it takes over",
        "mend the link",
    ),
    EventKind(
        "record-destaged",
        Level.NOTICE,
        (),
        "all that was recorded at the partner only is in this node's record, too: a power cut of"
        " both nodes leads to no comparison any more",
        "nothing",
    ),
    EventKind(
        "requests-waiting",
        Level.WARNING,
        ("requests", "message"),
        "requests of hosts have waited for the partner for 5 s",
        "look at the partner; if it is dead for certain *Takeover*",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "takeover",
        Level.WARNING,
        ("proof", "extents", "compares_everything"),
        "this node serves alone: the partner can write no more, by `proof`; `extents` of it were"
        " taken over and are copied",
        "start the partner when it is well again",
    ),
    EventKind(
        "takeover-failed",
        Level.ERROR,
        ("message",),
        "that this node goes on alone could not be recorded, so it does not",
        "mend the record device, then `dmctl takeover` again",
        is_error=True,
    ),
    EventKind(
        "fence-started",
        Level.WARNING,
        ("command", "plug"),
        "`command` is run, to make certain that the other node, which it calls `plug`, can write no"
        " more",
        "nothing; `fenced` or `fence-failed` says what came of it",
    ),
    EventKind(
        "fenced",
        Level.WARNING,
        ("seconds", "message"),
        "the fence command has ended with 0: the other node can write no more, and this one serves"
        " alone once what was on its way to the primary cannot land any more",
        "find out why the other node was lost",
    ),
    EventKind(
        "fence-failed",
        Level.ERROR,
        ("message",),
        "the fence command has proven nothing, so hosts go on to wait; `message` has its status and"
        " the end of what it printed",
        "mend it; or make certain by hand, then `dmctl takeover NAME --fenced`",
        is_error=True,
    ),
    EventKind(
        "outdated",
        Level.CRITICAL,
        ("message",),
        "the partner was given the proof that this node is dead, and took over, or the storage"
        " refuses this node by a reservation: hosts get errors, and the process starts anew",
        "find out why the proof was false, or why this node was cut off; after a reservation the"
        " fence agent's `on` lets it in again",
        is_error=True,
    ),
    EventKind(
        "split-brain",
        Level.CRITICAL,
        ("message",),
        "both nodes have written without the other: hosts' writes and copying have stopped on both",
        "*Split brain*",
        is_error=True,
    ),
    EventKind(
        "split-brain-ended",
        Level.WARNING,
        (),
        "the other node has begun anew and owns nothing: this one goes on, and compares everything",
        "check the file systems on the volume: two nodes have written them without one another",
    ),
)
