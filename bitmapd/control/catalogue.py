"""The catalogue of events: every name that may be emitted, how loud it is, what it means (pure).

An event is looked up here wherever something depends on its name: the level in the log, whether
repetitions are held back, whether `status` shows it as `last_error`, `dmctl events --explain`,
docs/events.md and the man page.  So there is one place to add an event, and no list to forget.

1. Every name that the programs emit has a row, every row is emitted, and a row names all fields
   that come with its event.  A test walks the source for that.
2. What becomes `last_error` is at least a warning in the log; an event whose name ends in `-error`
   is an error.
3. An unknown name is emitted as an `UNKNOWN` notice: a mistake in a name must not stop a write.

Texts are Markdown; a chapter of docs/recovery.md is named *in italics*.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """Syslog's levels, as far as events have them."""

    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    NOTICE = 5


@dataclass(frozen=True, slots=True)
class EventKind:
    """One row.  `limited`: repetitions are held back.  `is_error`: becomes `last_error`."""

    name: str
    level: Level
    fields: tuple[str, ...]
    meaning: str
    advice: str
    limited: bool = False
    is_error: bool = False


UNKNOWN = EventKind("", Level.NOTICE, (), "no row of this catalogue", "report it")

_EVENTS = (
    EventKind(
        "started",
        Level.NOTICE,
        ("version", "compiled", "pid"),
        "the process serves the volume",
        "nothing",
    ),
    EventKind(
        "stopped",
        Level.NOTICE,
        ("clean", "record_extents", "paused"),
        "the process ends; `clean` means that the record is empty",
        "with `clean=false` the next start copies what is left, unless the volume is `paused`",
    ),
    EventKind(
        "paused",
        Level.NOTICE,
        ("message",),
        "nothing is copied until `resumed`; with `message` at a start that found the volume paused",
        "*Paused*",
    ),
    EventKind("resumed", Level.NOTICE, (), "a pause has ended: copying goes on", "nothing"),
    EventKind(
        "failed",
        Level.CRITICAL,
        ("code", "message", "hint"),
        "the process could not start, a stop failed, or something happened that it cannot go on"
        " after",
        "the hint",
    ),
    EventKind(
        "stop-refused",
        Level.WARNING,
        ("message",),
        "a host has the device open; the volume is served as before",
        "unmount it first",
    ),
    EventKind(
        "recovery-started",
        Level.NOTICE,
        ("reason", "extents", "bytes_total"),
        "what the record named: `clean` (nothing), `crash`, `initial` (the first copy, also one"
        " that goes on)",
        "nothing",
    ),
    EventKind(
        "recovery-finished",
        Level.NOTICE,
        ("reason", "extents", "bytes_total", "bytes_copied", "seconds"),
        "all of that is on the secondary",
        "nothing",
    ),
    EventKind(
        "in-sync",
        Level.NOTICE,
        (),
        "the last dirty block is durable on the secondary",
        "nothing",
    ),
    EventKind(
        "link-down",
        Level.WARNING,
        ("secondary", "message"),
        "the secondary failed, or was not there at the start",
        "*The secondary is away*",
        is_error=True,
    ),
    EventKind(
        "link-error",
        Level.WARNING,
        ("secondary", "message"),
        "it is still away, and this is the present reason, such as a wrong size",
        "*The secondary is away*, *The wrong secondary*",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "link-up",
        Level.NOTICE,
        ("secondary",),
        "copying goes on; what had been copied and not confirmed is copied again",
        "nothing",
    ),
    EventKind(
        "secondary-changed",
        Level.ERROR,
        ("secondary", "places", "message"),
        "a volume that was stopped cleanly has a secondary that differs from the primary, at"
        " `places` (offset and length in bytes) at least: it was written meanwhile, or has"
        " forgotten; the volume is paused, and everything is recorded",
        "*The secondary was changed*",
        is_error=True,
    ),
    EventKind(
        "secondary-forgot",
        Level.ERROR,
        ("secondary", "offset_bytes", "message"),
        "blocks that it had confirmed are not on the secondary that came back; everything is"
        " recorded, compared and copied where it differs",
        "*The secondary forgets*",
        is_error=True,
    ),
    EventKind(
        "primary-error",
        Level.ERROR,
        ("device", "offset_bytes", "length_bytes", "message"),
        "a host's request failed at the primary; the host got the error",
        "*The primary fails*",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "copy-error",
        Level.ERROR,
        ("device", "offset_bytes", "length_bytes", "message"),
        "the primary could not be read there, or (without an offset) could not be flushed",
        "*The primary fails*",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "secondary-error",
        Level.ERROR,
        ("secondary", "offset_bytes", "length_bytes", "message"),
        "the secondary refused a write there and goes on to answer; only that place is held back",
        "*The secondary refuses places*",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "record-error",
        Level.ERROR,
        ("device", "page", "message"),
        "the stored record could not be written",
        "*The record fails*",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "record-slow",
        Level.ERROR,
        ("device", "page", "message"),
        "a write to the stored record has had no answer for five seconds; reported once, until"
        " `record-ok`",
        "*The record fails*",
        is_error=True,
    ),
    EventKind(
        "record-ok",
        Level.NOTICE,
        ("device",),
        "the stored record is written again: nothing is overdue, and what had failed has been made"
        " good",
        "nothing",
        limited=True,
    ),
    EventKind(
        "record-damaged",
        Level.ERROR,
        ("device", "message"),
        "part of the stored record was unreadable at the start, or did not name what hosts write"
        ' directly; that counts as "may differ", is copied and written anew',
        "once: nothing. Again: replace the record device",
        is_error=True,
    ),
    EventKind(
        "verify-error",
        Level.ERROR,
        ("device", "offset_bytes", "length_bytes", "message"),
        "a `verify` could not read that place of one side; it went on behind it",
        "*The sides differ*",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "unexpected-difference",
        Level.ERROR,
        ("offset_bytes", "length_bytes", "message"),
        "a `verify` found a place where both sides differ and must not",
        "*The sides differ*",
        is_error=True,
    ),
    EventKind(
        "settings-changed",
        Level.NOTICE,
        (),
        "`dmctl set` or SIGHUP changed settings",
        "nothing",
    ),
    EventKind(
        "settings-refused",
        Level.WARNING,
        ("message",),
        "SIGHUP found a mistake in the configuration; the old settings stay in force",
        "`dmctl config check`",
    ),
    EventKind(
        "settings-ignored",
        Level.WARNING,
        ("keys", "message"),
        "the configuration has changes that a running volume, or any volume that exists, cannot"
        " take up; they have no effect",
        "set them back; most are taken up by `dmctl stop` and `start`, sizes of extents and blocks"
        " only by a new `dmctl create`",
    ),
    EventKind(
        "resized",
        Level.NOTICE,
        ("size_bytes",),
        "the volume has a new size",
        "announce it to the hosts",
    ),
    EventKind(
        "size-not-shown",
        Level.WARNING,
        ("message",),
        "the volume has grown, and hosts go on with /dev/mapper/NAME in its old size: writes could"
        " not be brought through bitmapd first",
        "what the message says, then `dmctl resize NAME` once more",
    ),
    EventKind(
        "not-sealed",
        Level.WARNING,
        ("device", "message"),
        "the stop could not note what the primary looks like, or the start could not compare it or"
        " finds no note (another host, a lost or full state directory): writes past the volume go"
        " unnoticed",
        "nothing, if nobody wrote to the primary while the volume was stopped; else `dmctl verify"
        " NAME`",
    ),
    EventKind(
        "sides-not-noted",
        Level.WARNING,
        ("file", "message"),
        "that both sides are in sync could not be noted on this host: messages about a replaced"
        " primary say less, and `create` does not ask",
        "room for the file in the configuration's folder",
        limited=True,
    ),
    EventKind(
        "medium-gone",
        Level.ERROR,
        ("device", "message"),
        "the file of a medium was deleted, moved or replaced while it is in use; the volume goes"
        " on with the one it has, and is `degraded`",
        "*A file is gone*, before anything else: do not stop the volume",
        is_error=True,
    ),
    EventKind(
        "medium-back",
        Level.NOTICE,
        ("device",),
        "the name leads to the file that is in use again",
        "nothing",
    ),
    EventKind(
        "state-unreadable",
        Level.WARNING,
        ("file", "message"),
        "the host's note of the newest record is damaged, or could not be written: an old record"
        " would not be recognised",
        "nothing, if the record device was not exchanged; else `dmctl verify NAME`",
    ),
    EventKind(
        "hints-not-saved",
        Level.WARNING,
        ("message",),
        "what the prediction policy has learnt could not be written to the record: the next session"
        " begins with less of it",
        "*The record fails*, if `record-error` comes too",
    ),
    EventKind(
        "trace-error",
        Level.ERROR,
        ("file", "message"),
        "the request log (`dmctl set NAME trace=FILE`) cannot be written and has ended",
        "room for it, another file",
        is_error=True,
    ),
    EventKind(
        "barrier-error",
        Level.ERROR,
        ("message",),
        "the kernel's table could not be changed, or its marks not be read; tried again, and"
        " nothing leaves the record until it succeeds",
        "again and again: `dmesg`, then stop and start",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "barrier-put-off",
        Level.NOTICE,
        ("message",),
        "dm-era is still at work on the marks of earlier eras, as on a large volume with a short"
        " `era-interval`; reported once, copying goes on a little later",
        "nothing; a longer `era-interval` saves the kernel work",
    ),
    EventKind(
        "lvm-error",
        Level.ERROR,
        ("message",),
        "LVM on this host has no filter, and takes a layer below the volume, or its primary, for"
        " the physical volume that is on the volume: what it writes is not mirrored",
        "`vgchange -an` the volume group, set the filter of docs/boot.md,"
        " `vgchange -ay`, then `dmctl verify NAME --repair`",
        is_error=True,
    ),
    EventKind(
        "counters-error",
        Level.ERROR,
        ("message",),
        "the kernel does not count writes of the volume's devices and cannot be made to, so direct"
        " writes cannot be seen: every era is taken as written, and the volume is never `in-sync`",
        'set `queue/iostats` of the volume\'s dm devices to 1, or use `attach = "nbd"`',
        is_error=True,
    ),
    EventKind(
        "counters-restored",
        Level.NOTICE,
        ("message",),
        "somebody (udev rules, tuned) had set `queue/iostats` of the volume's dm devices to 0; it"
        " is 1 again, and what was not counted is taken as written",
        "keep that tuning off device-mapper's devices",
        limited=True,
    ),
    EventKind(
        "era-damaged",
        Level.ERROR,
        ("message",),
        "dm-era's marks, which are in memory, cannot be read; all that is recorded is copied, in"
        " every era",
        "stop and start the volume, which makes new ones; suspect the machine's memory",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "gate-error",
        Level.ERROR,
        ("message",),
        "device-mapper: the kernel has lost its connection to bitmapd and cannot be connected"
        " again; tried again, and writes of hosts that are not direct wait meanwhile",
        "again and again: `dmesg`, then `dmctl stop` and `start`",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "helper-died",
        Level.WARNING,
        ("verb", "message"),
        "the process that changes the kernel's tables ended; another one takes over and resumes"
        " what is suspended",
        "nothing",
        limited=True,
    ),
    EventKind(
        "detach-error",
        Level.ERROR,
        ("message",),
        "layers of the volume are left in the kernel after a stop",
        "what the message says, then `dmctl start` and `stop`, which clean up",
        is_error=True,
    ),
    EventKind(
        "client-connected",
        Level.NOTICE,
        ("peer", "certificate"),
        "a host connected",
        "nothing",
        limited=True,
    ),
    EventKind(
        "client-disconnected",
        Level.NOTICE,
        ("peer",),
        "a host disconnected",
        "nothing",
        limited=True,
    ),
    EventKind(
        "client-dropped",
        Level.NOTICE,
        ("peer", "reason", "held_back"),
        "a client broke the protocol, had no valid certificate or was too slow; reported once a"
        " minute for each peer",
        "if the peer is one of yours: its certificate, its version",
    ),
    EventKind(
        "not-direct",
        Level.WARNING,
        ("device", "message"),
        "the file system under a medium has no direct I/O",
        "another file system, or accept what the message says",
    ),
    EventKind(
        "not-io-flusher",
        Level.WARNING,
        ("message",),
        "a protection against shortage of memory is missing",
        "*Shortage of memory*",
    ),
    EventKind(
        "may-be-killed",
        Level.WARNING,
        ("message",),
        "a protection against shortage of memory is missing",
        "*Shortage of memory*",
    ),
    EventKind(
        "memory-not-locked",
        Level.WARNING,
        ("message",),
        "a protection against shortage of memory is missing",
        "*Shortage of memory*",
    ),
    EventKind(
        "accepting-pauses",
        Level.WARNING,
        ("message",),
        "no descriptor or memory for another client of the control socket or of the metrics; tried"
        " again after a second",
        "*Shortage of memory*; the limits of the process",
        limited=True,
    ),
    EventKind(
        "waiting",
        Level.NOTICE,
        ("primary", "secondary", "record"),
        "`dmctl assemble` or `monitor` waits for these media; each field says why its medium is not"
        " there",
        "connect them",
    ),
    EventKind(
        "assembled",
        Level.NOTICE,
        ("without_secondary",),
        "`dmctl assemble` or `monitor` started the volume; the secondary was not there if it is"
        " named",
        "nothing; *The secondary is away*",
    ),
    EventKind(
        "not-assembled",
        Level.ERROR,
        ("code", "message", "again_in_s"),
        "the configuration or the start was refused; without `again_in_s` it is not tried again"
        " until a medium changes",
        "what the message says",
    ),
    EventKind(
        "died",
        Level.ERROR,
        ("again_in_s",),
        "bitmapd ended without a `dmctl stop`; `dmctl monitor` starts it again after that time",
        "look into its log",
    ),
    EventKind(
        "events-lost",
        Level.NOTICE,
        ("count",),
        "this reader of events was too slow",
        "nothing",
    ),
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
        "point-committed",
        Level.NOTICE,
        ("point",),
        "the receiver has this point durably; said by both ends",
        "nothing",
        limited=True,
    ),
    EventKind(
        "point-void",
        Level.WARNING,
        ("point", "reason"),
        "the cut of this point was given up, and nothing that was sent is lost: `slow`: a host had"
        " waited for `cut_patience`; `spool`: it was full; `read-error`, `flush-error`: of the"
        " primary; `link`: the receiver had lost some of it; `journal`: it has no room for"
        " the rest, so the point is sent anew; `group`: another volume of its group was not cut",
        "nothing, if it is rare; else see why the primary is slow, or give the spool more room",
        limited=True,
    ),
    EventKind(
        "spool-error",
        Level.ERROR,
        ("blocks", "message"),
        "the spool's file cannot be read or written, or is full; memory alone has to do for a"
        " minute. `blocks` were in it and are read anew; if a cut was open it is given up",
        "see to the disk of the folder that `spool` names",
        is_error=True,
        limited=True,
    ),
    EventKind(
        "cannot-keep-up",
        Level.WARNING,
        ("left_bytes", "bytes_per_second", "message"),
        "hosts write as fast as the link to the receiver carries, so no point is cut",
        "nothing, if the load passes; else a faster link, or a longer `point_interval`",
        limited=True,
    ),
    EventKind(
        "journal-full",
        Level.WARNING,
        ("message",),
        "the receiver's journal has no room for the rest of this point: the sender waits, hosts do"
        " not",
        "a larger journal; at the receiver see whether points are applied",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "catch-up-begun",
        Level.CRITICAL,
        ("point", "message"),
        "what has changed does not fit into the receiver's journal and goes into its image, which"
        " is between two points until this one is committed: the receiver's `catch_up` says so",
        "leave both running; until it ends 'dmctl promote' takes the copy of the last point, if"
        " there is one",
        is_error=True,
    ),
    EventKind(
        "catch-up-ended",
        Level.NOTICE,
        ("point",),
        "at a receiver: this point is in the image, which is consistent again",
        "nothing",
    ),
    EventKind(
        "group-waits",
        Level.WARNING,
        ("group", "message"),
        "the volumes of the group cannot be cut, and get no new points; empty: they can again",
        "start the volumes that the message names, or see why their receivers are away",
        limited=True,
    ),
    EventKind(
        "group-apart",
        Level.ERROR,
        ("point",),
        "at a receiver: so many points of a group wait that others lack that this one was applied"
        " to make place for the next; until all members have a newer point the group cannot be"
        " promoted to one",
        "see why the receivers of the others lose their points just before they are committed",
        is_error=True,
    ),
    EventKind(
        "start-forced",
        Level.CRITICAL,
        ("secondary", "message"),
        "hosts were let in by `start --force` although the receiver was promoted, or may have been:"
        " what they write here is a second history",
        "end it as soon as you can: `dmctl failback` here overwrites that, and saves it with"
        " `--save`",
        is_error=True,
    ),
    EventKind(
        "receiver-went-back",
        Level.CRITICAL,
        ("secondary", "committed", "theirs"),
        "the receiver has points up to `theirs` only, and had them up to `committed`: its media"
        " were restored from a copy, or exchanged.  Nothing is sent to it",
        "give it its media back, or make the receiver anew",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "receiver-refused",
        Level.CRITICAL,
        ("secondary", "message"),
        "the receiver is not the one that this volume has to follow, and nothing is sent to it",
        "find out which end has the right data",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "journal-note",
        Level.NOTICE,
        ("message",),
        "at the start of a receiver: what the scan of its journal has noticed, such as a commit"
        " page whose write was cut short",
        "nothing, after a crash; else look for the journal's medium in dmesg",
    ),
    EventKind(
        "sender-connected",
        Level.NOTICE,
        ("peer",),
        "at a receiver: its sender is there and is followed",
        "nothing",
    ),
    EventKind(
        "sender-lost",
        Level.WARNING,
        ("message",),
        "at a receiver: the connection of its sender has ended; what it holds stays as it is",
        "nothing, if the sender comes again; else look at it, and at the network",
        limited=True,
    ),
    EventKind(
        "sender-refused",
        Level.WARNING,
        ("message",),
        "at a receiver: somebody came in whom it does not follow, or could not come in; nothing was"
        " changed",
        "the message says what does not fit",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "image-error",
        Level.ERROR,
        ("message",),
        "the receiver's image has refused something; it is tried again",
        "look at the image's disk",
        limited=True,
        is_error=True,
    ),
    EventKind(
        "point-kept",
        Level.NOTICE,
        ("point", "label"),
        "at a receiver: a copy of this point was made, so it stays when newer ones come",
        "nothing",
    ),
    EventKind(
        "point-not-kept",
        Level.ERROR,
        ("point", "reason"),
        "at a receiver: this point had to stay, for its label, by `retain` or by `catch_up`, and no"
        " copy of it could be made; points go on, but that one does not which needs the copy",
        "see the reason: room beside the image, `point_hook`, or too many points that are kept",
        is_error=True,
    ),
    EventKind(
        "point-dropped",
        Level.NOTICE,
        ("point",),
        "at a receiver: this point is kept no longer, by `retain` or by command",
        "nothing",
    ),
    EventKind(
        "point-not-dropped",
        Level.WARNING,
        ("point", "reason"),
        "at a receiver: the copy of a point that is kept no longer cannot be taken away; the next"
        " start tries it again",
        "see the reason",
    ),
    EventKind(
        "point-damaged",
        Level.ERROR,
        ("blocks",),
        "so many blocks of a committed point cannot be read from the journal any more: the sender"
        " is asked for them, and nothing of the point is applied before",
        "look at the journal's disk",
        is_error=True,
    ),
    EventKind(
        "taken-over",
        Level.NOTICE,
        ("point", "term"),
        "of a receiver: its volume was handed over to it by `dmctl switchover`; its process begins"
        " anew as that of the volume",
        "nothing",
    ),
    EventKind(
        "handover-error",
        Level.ERROR,
        ("message",),
        "of a receiver: its volume was to be handed over to it, and it could not take it; it is the"
        " receiver that it was",
        "mend what the message names, then `dmctl switchover` at the other site once more",
        is_error=True,
    ),
    EventKind(
        "demoted",
        Level.NOTICE,
        ("term",),
        "the volume has given everything to its receiver, and lets no host in any more",
        "`dmctl switchover` hands it over; `dmctl promote` at either site lets hosts in there",
    ),
    EventKind(
        "view-opened",
        Level.NOTICE,
        ("point", "device"),
        "of a receiver: `dmctl test-failover` exports this point; later ones are applied meanwhile",
        "nothing",
    ),
    EventKind(
        "view-closed",
        Level.NOTICE,
        ("point",),
        "the view of this point has ended, and what was written to it is gone",
        "nothing",
    ),
    EventKind(
        "view-full",
        Level.WARNING,
        ("point", "limit_bytes", "message"),
        "what the view of a point needs to stay there is more than its limit: the view has ended,"
        " and points are applied as before",
        "begin another one with a larger `--view-limit`",
    ),
    EventKind(
        "view-error",
        Level.ERROR,
        ("point", "message"),
        "the overlay or the image could not be read or written for the view of a point, or took too"
        " long: the view has ended, and points are applied as before",
        "look at both media, and begin another one",
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

EVENTS = {event.name: event for event in _EVENTS}


def lookup(name: str) -> EventKind:
    return EVENTS.get(name, UNKNOWN)


def markdown() -> str:
    """docs/events.md."""
    rows = "".join(
        f"| `{event.name}` | {event.level.name.lower()}{_marks(event)} |"
        f" {', '.join(f'`{field}`' for field in event.fields)} | {event.meaning} |"
        f" {event.advice} |\n"
        for event in EVENTS.values()
    )
    return (
        "# Events\n\n"
        "<!-- Made from bitmapd/control/catalogue.py by `make docs`; edit it there. -->\n\n"
        "`dmctl events NAME` shows what happened since the start, then what comes; `--now` ends"
        " after the\npast ones, `--explain` prints this table. Each has `at`, `volume`, `event` and"
        " the fields below. 1000\nare kept: after that the oldest of the most frequent kind goes"
        " first.\n\n"
        "† repetitions are let through five times in ten seconds; the next one says in"
        " `suppressed` how many\nwere held back. ‡ `dmctl status` shows the latest of these in"
        " `last_error`. Chapters *in italics* are\nthose of [recovery.md](recovery.md).\n\n"
        "| event | level | fields | meaning | what to do |\n"
        "| --- | --- | --- | --- | --- |\n"
        f"{rows}"
    )


def _marks(event: EventKind) -> str:
    return " †" * event.limited + " ‡" * event.is_error
