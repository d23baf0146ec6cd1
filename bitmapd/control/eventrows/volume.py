"""Events of a volume and its media: life, copying, record (pure; see `control.catalogue`)."""

from __future__ import annotations

from bitmapd.control.eventkinds import EventKind, Level

ROWS = (
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
)
