"""Events around a volume: kernel layers, clients, process, boot (pure; see `control.catalogue`)."""

from __future__ import annotations

from bitmapd.control.eventkinds import EventKind, Level

ROWS = (
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
)
