"""Events of points and the way between two sites (pure; see `control.catalogue`)."""

from __future__ import annotations

from bitmapd.control.eventkinds import EventKind, Level

ROWS = (
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
        ("point", "reason", "label"),
        "the cut of this point was given up, and nothing that was sent is lost: `slow`: a host had"
        " waited for `cut_patience`; `spool`: it was full; `read-error`, `flush-error`: of the"
        " primary; `link`: the receiver had lost some of it; `journal`: it has no room for"
        " the rest, so the point is sent anew; `group`: another volume of its group was not cut;"
        " `asked`: by a pause or a stop. The next point does not have its `label`",
        "nothing, if it is rare; else see why the primary is slow, or give the spool more room",
        limited=True,
    ),
    EventKind(
        "spool-error",
        Level.ERROR,
        ("blocks", "message"),
        "the spool's file cannot be read or written, or is full; memory alone has to do for a"
        " minute, and until the next start if the file could not be made. `blocks` were in it and"
        " are read anew; if a cut was open it is given up",
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
)
