"""One volume's configuration, which is its own manual (pure)."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, get_type_hints
from uuid import UUID

from bitmapd.config import kinds
from bitmapd.config.kinds import Kind
from bitmapd.net.uri import is_receiver, is_remote

DEFAULT_RECORD_LIMIT_BYTES = 4 << 30  # docs/prediction.md, "The default limit"
MIN_RECORD_LIMIT_EXTENTS = 64
DEFAULT_CUT_PATIENCE_S = 0.05  # of a volume with a receiver
BLOCK_BYTES = 64 << 10
BLOCK_LOCAL_DM_BYTES = 256 << 10  # docs/decisions/0004, "Where the time of a broad load goes"
ERA_INTERVAL_NBD_S = 1.0
ERA_INTERVAL_DM_S = 5.0
LONGEST_ERA_DM_S = 20.0
FENCE_DELAYS_S = (1.0, 6.0)  # of node 1 and of node 2
KEEPER: Final = "keeper"  # `partner_role`


@dataclass(frozen=True, slots=True)
class Key:
    """What the manual says of one field: its name in TOML, kind, explanation, default.

    Without a default the key is required, unless `derived`: then it follows from the others.
    `shared` keys may stand in dmctl.toml; `live` ones may be changed with `dmctl set`, `idle` ones
    while the volume is stopped.
    """

    name: str
    kind: Kind
    doc: str
    default: str | bool | None = None
    derived: bool = False
    shared: bool = False
    live: bool = False
    idle: bool = False


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    """One volume, complete: no field is left to be looked up elsewhere."""

    name: str
    uuid: Annotated[
        UUID, Key("uuid", kinds.TEXT_UUID, "Identity of the volume; its record carries it too.")
    ]
    primary: Annotated[
        str, Key("primary", kinds.PATH, "Block device or file that the hosts' data live on.")
    ]
    secondary: Annotated[
        str,
        Key(
            "secondary",
            kinds.TARGET,
            "Where the copy is: block device, file, NBD export, or a receiver, which keeps"
            " consistent points (receiver+tls://HOST[:PORT]/NAME or receiver+unix:///NAME?socket=PATH).",
        ),
    ]
    record: Annotated[
        str, Key("record", kinds.PATH, "Block device or file of the stored record; fast, durable.")
    ]
    attach: Annotated[
        str,
        Key(
            "attach",
            kinds.ATTACH,
            "How hosts reach the volume: dm makes /dev/mapper/NAME, nbd an export; auto is dm where"
            " the kernel has it and the primary is a block device, but nbd for one of two"
            " appliances and with a receiver.",
            "auto",
            shared=True,
        ),
    ]
    listen: Annotated[
        str,
        Key(
            "listen",
            kinds.LISTEN,
            "Where the volume is exported; by default nbd+unix:///NAME?socket=RUN_DIR/NAME.nbd.",
            derived=True,
        ),
    ]
    extent_size_bytes: Annotated[
        int,
        Key(
            "extent_size",
            kinds.SIZE,
            "Unit of the record, a power of two; fixed when the volume is created.",
            "1MiB",
            shared=True,
        ),
    ]
    block_size_bytes: Annotated[
        int | None,
        Key(
            "block_size",
            kinds.or_word("auto", kinds.SIZE),
            "Unit of dirty tracking and copying, a power of two that divides the extent; fixed"
            " when the volume is created. auto: 64KiB; with device-mapper and a secondary on a"
            " disk of this machine 256KiB, since each block costs hosts more there than its copy.",
            "auto",
            shared=True,
        ),
    ]
    record_limit_bytes: Annotated[
        int | None,
        Key(
            "record_limit",
            kinds.or_word("auto", kinds.SIZE),
            "How much the record may name, and so how much a crash makes us copy; only clean"
            " extents are given up to keep to it. auto: 4GiB, or all of a smaller volume. Never"
            " less than 64 extents. Excludes resync_target.",
            "auto",
            shared=True,
            live=True,
        ),
    ]
    resync_target_s: Annotated[
        float | None,
        Key(
            "resync_target",
            kinds.or_word("none", kinds.DURATION),
            "How long the copying after a crash may take: sets the record limit from the measured"
            " speed of copying. Excludes record_limit.",
            "none",
            shared=True,
            live=True,
        ),
    ]
    era_interval_s: Annotated[
        float | None,
        Key(
            "era_interval",
            kinds.or_word("auto", kinds.INTERVAL),
            "How often written blocks are handed to the copier, 100ms to 10min. auto: 1s over nbd,"
            " 5s with device-mapper, where the end of an era makes writes wait for a moment; up to"
            " 20s there while many different blocks are written, for each waits once in an era, and"
            " the record is within its limit.",
            "auto",
            shared=True,
            live=True,
        ),
    ]
    initial_sync: Annotated[
        str,
        Key(
            "initial_sync",
            kinds.choice("full", "checksum", "skip"),
            "How the secondary is made equal at first: copy everything, copy what differs by"
            " checksum, or trust that it is equal.",
            "full",
            shared=True,
        ),
    ]
    predictor: Annotated[
        str,
        Key(
            "predictor",
            kinds.WORD,
            "Policy that says which extents enter the record together, and which leave it.",
            "superset",
            shared=True,
            live=True,
        ),
    ]
    copy_rate_bytes_per_s: Annotated[
        int | None,
        Key(
            "copy_rate",
            kinds.or_word("none", kinds.RATE),
            "Upper bound for copying, such as 100MiB/s.",
            "none",
            shared=True,
            live=True,
        ),
    ]
    late_writes_s: Annotated[
        float,
        Key(
            "late_writes",
            kinds.PATIENCE,
            "For how long a server, or a disk behind a network, may go on to carry out what a lost"
            " connection had sent. So long the places in question stay in the record, and then they"
            " are copied once more; 0s if it ends a connection before it answers the next one, as"
            " bitmapd's own export does.",
            "10min",
            shared=True,
            live=True,
        ),
    ]
    tls_certificates: Annotated[
        Path | None,
        Key(
            "tls_certificates",
            kinds.or_word("none", kinds.FOLDER),
            "Folder with ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem and"
            " client-key.pem, for nbds:// on either side.",
            "none",
            shared=True,
        ),
    ]
    allow_plaintext_loopback: Annotated[
        bool,
        Key(
            "allow_plaintext_loopback",
            kinds.BOOLEAN,
            "Whether the volume may be exported without TLS on a loopback address, where every"
            " local user can write to it.",
            False,
            shared=True,
        ),
    ]
    busy_poll: Annotated[
        bool,
        Key(
            "busy_poll",
            kinds.BOOLEAN,
            "Whether a client's connection is asked again and again for what comes next, and the"
            " disk for its answer, for up to 200 us and as long as that finds something. It saves a"
            " request the time of a wake-up; false leaves the processor to others.",
            True,
            shared=True,
        ),
    ]
    metrics_listen: Annotated[
        str | None,
        Key(
            "metrics_listen",
            kinds.or_word("none", kinds.METRICS),
            "Where metrics are served in Prometheus text format.",
            "none",
        ),
    ]
    node: Annotated[
        int | None,
        Key(
            "node",
            kinds.or_word("none", kinds.NODE),
            "Which of two appliances this is, 1 or 2; with partner and partner_listen.",
            "none",
        ),
    ]
    partner: Annotated[
        str | None,
        Key(
            "partner",
            kinds.or_word("none", kinds.PARTNER),
            "Where the other appliance is reached.",
            "none",
        ),
    ]
    partner_listen: Annotated[
        str | None,
        Key(
            "partner_listen",
            kinds.or_word("none", kinds.PARTNER),
            "Where the other appliance reaches this one.",
            "none",
        ),
    ]
    partner_role: Annotated[
        str,
        Key(
            "partner_role",
            kinds.PARTNER_ROLE,
            "What this node is to the other one: pair, one that serves hosts; or keeper, node 2,"
            " which has no primary and no secondary and keeps the other's record; fixed when the"
            " node is created.",
            "pair",
        ),
    ]
    record_on: Annotated[
        str,
        Key(
            "record_on",
            kinds.RECORD_ON,
            "What a write to a new place waits for: this node's record and the partner, or the"
            " partner alone, which is quicker where the record is slow; if both nodes then lose"
            " power, everything is compared. local is for a volume without a partner, and else the"
            " same as both.",
            "both",
            idle=True,
        ),
    ]
    partner_ack: Annotated[
        str,
        Key(
            "partner_ack",
            kinds.PARTNER_ACK,
            "When the partner counts as having recorded a place: as soon as it is in its memory, or"
            " in its stored record, too. With stored at either node it is so at both.",
            "memory",
            idle=True,
        ),
    ]
    record_fallback: Annotated[
        bool,
        Key(
            "record_fallback",
            kinds.SWITCH,
            "Whether the partner's copy of this node's record counts while the record itself cannot"
            " be written; else writes to new places fail then.",
            True,
            idle=True,
        ),
    ]
    on_cut: Annotated[
        str,
        Key(
            "on_cut",
            kinds.ON_CUT,
            "What a write to a place of nobody's does while the link is lost: it waits, or goes on;"
            " the latter at one node at most. The other node then compares everything when it"
            " takes over.",
            "wait",
            idle=True,
        ),
    ]
    partner_name: Annotated[
        str | None,
        Key(
            "partner_name",
            kinds.or_word("none", kinds.HOST_NAME),
            "The name in the other's certificate; by default the host of partner.",
            "none",
        ),
    ]
    partner_fingerprint: Annotated[
        str | None,
        Key(
            "partner_fingerprint",
            kinds.or_word("none", kinds.FINGERPRINT),
            "SHA-256 of the other's certificate, if no other one may do.",
            "none",
        ),
    ]
    partner_certificates: Annotated[
        Path | None,
        Key(
            "partner_certificates",
            kinds.or_word("none", kinds.FOLDER),
            "Folder with ca-cert.pem, node-cert.pem and node-key.pem, as 'dmctl partner-keys' makes"
            " it; by default that of tls_certificates.",
            "none",
        ),
    ]
    partner_timeout_s: Annotated[
        float,
        Key(
            "partner_timeout",
            kinds.DURATION,
            "After so long without a word of the other the link counts as lost; the larger one of"
            " both nodes' counts.",
            "2s",
        ),
    ]
    partner_record: Annotated[
        str | None,
        Key(
            "partner_record",
            kinds.or_word("none", kinds.PATH),
            "The other node's record device as seen from here. A takeover by a node that has not"
            " met the other reads it, and need not compare everything.",
            "none",
            idle=True,
        ),
    ]
    partner_wait_s: Annotated[
        float,
        Key(
            "partner_wait",
            kinds.PATIENCE,
            "How long 'dmctl start' waits for the other appliance; the daemon goes on waiting.",
            "10s",
        ),
    ]
    serve: Annotated[
        str,
        Key(
            "serve",
            kinds.SERVE,
            "When one of two appliances lets hosts in: as soon as it may serve them, or after"
            " 'dmctl takeover' only, which is for a cluster manager.",
            "always",
        ),
    ]
    fence_command: Annotated[
        str | None,
        Key(
            "fence_command",
            kinds.or_word("none", kinds.COMMAND),
            "Program that makes certain that the other appliance can write no more, by the"
            " convention of fence agents: action=off, plug=NODE and fence_options on standard"
            " input, a line each; it ends with 0 once that is so.",
            "none",
            shared=True,
            live=True,
        ),
    ]
    fence_options: Annotated[
        tuple[tuple[str, str], ...],
        Key(
            "fence_options",
            kinds.OPTIONS,
            "What fence_command is told besides, KEY=VALUE with spaces between, quoted as for a"
            " shell: 'ip=10.0.0.9 username=dmctl password_script=/etc/dmctl/bmc'. plug is by"
            " default partner_name, or the host of partner, or node1 or node2.",
            "none",
            shared=True,
            live=True,
        ),
    ]
    fence_delay_s: Annotated[
        float | None,
        Key(
            "fence_delay",
            kinds.or_word("auto", kinds.PATIENCE),
            "How long the link has been lost before an automatic takeover begins. auto: 1s at node"
            " 1 and 6s at node 2, so that two that live do not shoot at once; make the difference"
            " longer than fence_command takes.",
            "auto",
            shared=True,
            live=True,
        ),
    ]
    fence_timeout_s: Annotated[
        float,
        Key(
            "fence_timeout",
            kinds.DURATION,
            "After so long fence_command and what it has started are killed: nothing is proven.",
            "60s",
            shared=True,
            live=True,
        ),
    ]
    fence_aborts_io: Annotated[
        bool,
        Key(
            "fence_aborts_io",
            kinds.BOOLEAN,
            "Whether fence_command also ends what the other had on its way to primary and"
            " secondary, as a reservation that is preempted and aborted does. If not, a primary"
            " behind a network is not served alone before late_writes is over.",
            False,
            shared=True,
        ),
    ]
    takeover: Annotated[
        str,
        Key(
            "takeover",
            kinds.choice("manual", "auto"),
            "Whether this node takes over by itself: once the link is lost for fence_delay and a"
            " host here waits for the other, fence_command is run. manual: 'dmctl takeover' does.",
            "manual",
            shared=True,
            live=True,
        ),
    ]
    cut_patience_s: Annotated[
        float | None,
        Key(
            "cut_patience",
            kinds.or_word("none", kinds.DURATION),
            "How long a host's request waits for what it has no part in. In a pair: for a partner"
            " that is not there, before it ends with an error; none: until the partner is back, or"
            " taken over from. With a receiver: for the read before its write, before the point is"
            " given up and the write goes on; none: 50ms.",
            "none",
            shared=True,
            live=True,
        ),
    ]
    point_interval_s: Annotated[
        float,
        Key(
            "point_interval",
            kinds.POINT_INTERVAL,
            "How often a volume with a receiver is cut: the age of the content that the receiver"
            " can produce is at most twice that while the link keeps up.",
            "30s",
            shared=True,
            live=True,
        ),
    ]
    spool_limit_bytes: Annotated[
        int,
        Key(
            "spool_limit",
            kinds.SIZE,
            "Memory for what was read for a point and not sent to the receiver yet.",
            "256MiB",
            shared=True,
            live=True,
        ),
    ]
    spool: Annotated[
        str | None,
        Key(
            "spool",
            kinds.or_word("none", kinds.PATH),
            "Folder for a file without a name that takes what is beyond spool_limit, so that larger"
            " points cost hosts less. Its file system has to have O_TMPFILE, as ext4, XFS and btrfs"
            " do; it should not be on the disk of the primary.",
            "none",
            shared=True,
        ),
    ]
    spool_file_limit_bytes: Annotated[
        int,
        Key("spool_file_limit", kinds.SIZE, "How large that file may become.", "4GiB", shared=True),
    ]
    compress: Annotated[
        str,
        Key(
            "compress",
            kinds.choice("auto", "off"),
            "Whether what is sent to a receiver is compressed; auto: where that pays.",
            "auto",
            shared=True,
            live=True,
        ),
    ]
    start_alone: Annotated[
        str,
        Key(
            "start_alone",
            kinds.choice("yes", "no"),
            "Whether hosts are let in at a start before the receiver has said that it was not"
            " promoted meanwhile.",
            "yes",
            shared=True,
        ),
    ]
    group: Annotated[
        str | None,
        Key(
            "group",
            kinds.or_word("none", kinds.WORD),
            "Name of a group: the volumes of this host that have the same one are cut at one"
            " instant, and their receivers can be promoted to one point that all have. While one of"
            " them does not run, or its receiver is away, none of them is cut.",
            "none",
            idle=True,
        ),
    ]
    receiver_dials: Annotated[
        bool,
        Key(
            "receiver_dials",
            kinds.BOOLEAN,
            "Whether this volume listens at the address of secondary, and its receiver connects:"
            " so it is where the volume was promoted from a receiver that did.",
            False,
        ),
    ]
    journal: Annotated[
        str | None,
        Key(
            "journal",
            kinds.or_word("none", kinds.PATH),
            "Block device or file that this site's journal is on while it is the receiver, after"
            " 'dmctl failback'.",
            "none",
        ),
    ]
    trace: Annotated[
        str | None,
        Key(
            "trace",
            kinds.or_word("none", kinds.PATH),
            "File to which the requests that change the volume are recorded, for 'dmctl simulate'."
            " With device-mapper only those that reach the daemon are seen.",
            "none",
            live=True,
        ),
    ]
    start_at_boot: Annotated[
        bool,
        Key(
            "start_at_boot",
            kinds.BOOLEAN,
            "Whether the volume is started by itself when its media appear: at boot, or later.",
            True,
            shared=True,
        ),
    ]


@functools.cache
def keys() -> dict[str, Key]:
    """The manual: field name -> key, in order of the fields."""
    hints = get_type_hints(VolumeConfig, include_extras=True)
    return {
        field: hint.__metadata__[0]
        for field, hint in hints.items()
        if hasattr(hint, "__metadata__")
    }


def taken_up(running: VolumeConfig, read: VolumeConfig) -> tuple[VolumeConfig, list[str]]:
    """What a running volume goes on with, and the keys of changes that it does not take up."""
    live = {field: getattr(read, field) for field, key in keys().items() if key.live}
    ignored = [
        key.name
        for field, key in keys().items()
        if not key.live and getattr(read, field) != getattr(running, field)
    ]
    return dataclasses.replace(running, **live), ignored


def device_of(config: VolumeConfig) -> str:
    """What hosts use: a device node, or the URI of the export; nothing, of a keeper."""
    if is_keeper(config):
        return ""
    return f"/dev/mapper/{config.name}" if config.attach == "dm" else config.listen


def effective_block_size_bytes(config: VolumeConfig) -> int:
    """The block that `block_size` stands for when a volume is created (see its manual)."""
    if config.block_size_bytes is not None:
        return config.block_size_bytes
    # The nodes of a pair have the same block, whatever each of them is attached by.
    alone = config.partner is None and not is_keeper(config)
    is_local = alone and config.attach == "dm" and not is_remote(config.secondary)
    return min(BLOCK_LOCAL_DM_BYTES if is_local else BLOCK_BYTES, config.extent_size_bytes)


def effective_era_intervals_s(config: VolumeConfig) -> tuple[float, float]:
    """The shortest and the longest interval that `era_interval` stands for (see its manual)."""
    if config.era_interval_s is not None:
        return config.era_interval_s, config.era_interval_s
    if config.attach == "dm":
        return ERA_INTERVAL_DM_S, LONGEST_ERA_DM_S
    return ERA_INTERVAL_NBD_S, ERA_INTERVAL_NBD_S


def effective_fence_delay_s(config: VolumeConfig) -> float:
    """The delay that `fence_delay` stands for (see its manual)."""
    if config.fence_delay_s is None:
        return FENCE_DELAYS_S[config.node == 2]
    return config.fence_delay_s


def effective_cut_patience_s(config: VolumeConfig) -> float:
    """How long a write waits for a cut of a volume with a receiver (see `cut_patience`)."""
    return DEFAULT_CUT_PATIENCE_S if config.cut_patience_s is None else config.cut_patience_s


def is_keeper(config: VolumeConfig) -> bool:
    """Whether it keeps the record of another node: `primary` and `secondary` are empty then."""
    return config.partner_role == KEEPER


def has_receiver(config: VolumeConfig) -> bool:
    """Whether the secondary keeps consistent points."""
    return is_receiver(config.secondary)


def effective_record_limit_bytes(config: VolumeConfig, size_bytes: int) -> int:
    """The limit that `record_limit` stands for in a volume of that size (see its manual)."""
    wanted = config.record_limit_bytes
    if wanted is None:
        wanted = min(DEFAULT_RECORD_LIMIT_BYTES, size_bytes)
    return max(wanted, MIN_RECORD_LIMIT_EXTENTS * config.extent_size_bytes)
