"""The commands that need no running volume: stored records, configuration, traces, keys."""

from __future__ import annotations

from pathlib import Path

from bitmapd.units import parse_rate, parse_size
from dmctl.cli.options import (
    FILE,
    FOLDER,
    Commands,
    add_command,
    add_device,
    add_name,
    add_names,
    completed,
    latency,
    sizes,
    typed,
)


def add_records(commands: Commands) -> None:
    record = commands.add_parser(
        "record", help="read a stored record", description="Read a stored record.",
        allow_abbrev=False,
    )  # fmt: skip
    actions = record.add_subparsers(metavar="COMMAND", dest="action", required=True)
    dump = add_command(actions, "dump", "record:dump", "show everything that a record says")
    add_device(dump, "device or file of the record")
    completed(dump.add_argument("--output", metavar="FILE", help="write JSON to a new file"), FILE)
    check = add_command(
        actions,
        "check",
        "record:check",
        "say what is wrong with a record",
        "Exit status 0 sound, 20 damaged, 21 of a newer format.",
    )
    add_device(check, "device or file of the record")
    repair = add_command(
        actions,
        "repair",
        "record:repair",
        "write a healed copy of a record elsewhere",
        "What cannot be read counts as to be copied. The record itself is not changed.",
    )
    add_device(repair, "device or file of the damaged record")
    completed(
        repair.add_argument(
            "--output", metavar="FILE", required=True, help="a new file, or an empty device"
        ),
        FILE,
    )
    replace = add_command(
        actions,
        "replace",
        "newrecord:replace",
        "give a node of a pair a new record",
        "For a record that is lost, of a volume that is stopped at this node. The new one names"
        " nothing: the partner, which has gone on, says what differs once the node is started. If"
        " both nodes were stopped everything is compared. A record that can be read is better moved"
        " with 'record repair', which keeps what it names.",
    )
    add_name(replace)
    add_device(replace, "device or file of the new record")
    replace.add_argument(
        "--force",
        action="store_true",
        help="overwrite what is on it: a record of another volume, or one that is not clean",
    )
    probe = add_command(
        commands,
        "probe",
        "probe:probe",
        "identify a record device",
        "Exit status 10 if there is no record on it.",
    )
    add_device(probe, "device or file to look at")
    probe.add_argument("--export", action="store_true", help="print KEY=value, for udev")


def add_configuration(commands: Commands) -> None:
    config = commands.add_parser(
        "config", help="show or check the configuration",
        description="Show or check the configuration.", allow_abbrev=False,
    )  # fmt: skip
    actions = config.add_subparsers(metavar="COMMAND", dest="action", required=True)
    show = add_command(actions, "show", "configuration:show", "show the merged configuration")
    add_names(show, all_option=False)
    show.add_argument("--explain", action="store_true", help="explain every key and its default")
    add_command(
        actions, "check", "configuration:check", "list all errors, each with its file and key"
    )


def add_simulate(commands: Commands) -> None:
    simulate = add_command(
        commands,
        "simulate",
        "simulate:simulate",
        "run record policies over block traces",
        "The writes of each trace are replayed against models of every kind of record; every"
        " combination of policy, limit, extent size and queue depth is run. Traces are CSV"
        " (time_s,op,offset_bytes,length_bytes; also what 'dmctl set NAME trace=FILE' records),"
        " blkparse text, vSCSI CSV, MSR Cambridge CSV or fio iologs, plain or gzip. Durations may"
        " be in us. With --recommend settings for a volume with this workload are printed instead.",
    )
    completed(simulate.add_argument("traces", metavar="TRACE", nargs="+", help="the traces"), FILE)
    for options, metavar, kind, text in (
        (("--policy",), "P", str, "superset (ours), predictor:NAME, drbd-al[:SLOTS], drbd-pmem,"
         " md-bitmap, md-llbitmap, dm-mirror, dm-era, lru, belady (default all)"),
        (("--record-limit", "--sizes"), "SIZE[,SIZE...]", typed(sizes),
         "what the record may name (default 64m,256m,1g)"),
        (("--extent-size",), "SIZE[,SIZE...]", typed(sizes),
         "of policies that have no size of their own (default 1m)"),
        (("--queue-depth",), "N", int, "writes in flight together (default 1 and 32)"),
        (("--plot",), "FILE", str, "draw the results into a .svg or .png file"),
    ):  # fmt: skip
        simulate.add_argument(*options, metavar=metavar, type=kind, action="append", help=text)
    for option, metavar, kind, text in (
        ("--format", "NAME", str, "csv, blkparse, vscsi, msr or fio (default: found out)"),
        ("--block-size", "SIZE", parse_size, "unit of copying (default 64k)"),
        ("--era-interval", "DURATION", latency, "the copy cycle (default 1s)"),
        ("--link-speed", "RATE", parse_rate, "of the link to the secondary (default 112m/s)"),
        ("--link-latency", "DURATION", latency, "round trip of the link (default 1ms)"),
        ("--record-latency", "DURATION", latency, "of one record update (default 100us)"),
        ("--resync-target", "DURATION", latency,
         "with --recommend: how long copying after a crash may take (default 1min)"),
    ):  # fmt: skip
        simulate.add_argument(option, metavar=metavar, type=typed(kind), help=text)
    simulate.add_argument(
        "--recommend", action="store_true", help="print settings for this workload, with reasons"
    )


def add_partner_keys(commands: Commands) -> None:
    keys = add_command(
        commands,
        "partner-keys",
        "partnerkeys:partner_keys",
        "make the certificates of a pair",
        "In DIR, which must not exist or be empty, there is a folder for each node with"
        " ca-cert.pem, node-cert.pem and node-key.pem. Copy each to its node, readable by root"
        " only, and name it as partner_certificates. The names are those by which the nodes reach"
        " one another, or the partner_name of the other. The certificates are good for ten years;"
        " the key of their authority is not kept. Needs the program openssl.",
    )
    completed(keys.add_argument("folder", metavar="DIR", type=Path, help="to be made"), FOLDER)
    keys.add_argument("--names", metavar="A,B", required=True, help="host names of the two nodes")
