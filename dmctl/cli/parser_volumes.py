"""The commands on volumes: making and removing them, running, copying, watching."""

from __future__ import annotations

from bitmapd.control.states import check_codes
from dmctl.cli.options import (
    FILE,
    VOLUME,
    Commands,
    add_command,
    add_name,
    add_names,
    add_patience,
    add_timeout,
    add_yes,
    completed,
    count,
    duration,
    typed,
)

CHECK_CODES = f"exit status of status --check:\n{check_codes()}"


def add_volumes(commands: Commands) -> None:
    create = add_command(
        commands,
        "create",
        "create:create",
        "create a volume, without starting it",
        "Checks everything before it changes anything, and lists every reason against it."
        " Then it formats the record and writes the configuration. Starting the volume"
        " overwrites the secondary, unless --initial-sync says otherwise; one that"
        " was in sync with another primary may be the last good copy: then a question is asked."
        " Sizes are whole numbers with B KiB MiB GiB TiB or k m g t, durations such as 250ms 5s"
        " 2min 1h.",
    )
    add_name(create)
    for option, metavar, text in (
        ("--primary", "DEV", "block device or file with the data; a keeper has none"),
        ("--secondary", "TARGET", "block device, file, nbd://HOST[:PORT]/EXPORT, nbds://… (TLS),"
         " nbd+unix:///EXPORT?socket=PATH, or a receiver, which keeps consistent points:"
         " receiver+tls://HOST[:PORT]/NAME or receiver+unix:///NAME?socket=PATH; a keeper has"
         " none"),
        ("--record", "DEV", "block device or file for the record"),
    ):  # fmt: skip
        needed = option == "--record"
        completed(create.add_argument(option, metavar=metavar, required=needed, help=text), FILE)
    for option, metavar, text in (
        ("--attach", "auto|dm|nbd", "how hosts reach the volume: /dev/mapper/NAME, or an NBD"
         " export; auto is dm where the kernel has it and the primary is a block device, but nbd"
         " for one of two appliances, of which dm needs --serve on-promote, and with a receiver"),
        ("--listen", "URI", "where to export (default nbd+unix:///NAME?socket=RUN_DIR/NAME.nbd)"),
        ("--extent-size", "SIZE", "unit of the record (default 1MiB)"),
        ("--block-size", "SIZE", "unit of copying (default 64KiB; dm, secondary here: 256KiB)"),
        ("--record-limit", "SIZE", "how much a crash may make us copy (default: 4GiB, or all"
         " of a smaller volume; never less than 64 extents)"),
        ("--resync-target", "DURATION", "how long copying after a crash may take, instead of"
         " --record-limit"),
        ("--era-interval", "DURATION", "how often writes are handed to the copier (default 1s, with"
         " dm 5s)"),
        ("--initial-sync", "full|checksum|skip", "copy everything, copy what differs, or trust"
         " that both are equal; skip is refused where samples differ (default full)"),
        ("--predictor", "NAME", "policy for what the record names (default superset)"),
        ("--copy-rate", "RATE", "upper bound for copying, such as 100MiB/s (default none)"),
        ("--late-writes", "DURATION", "for how long a server may go on to carry out what a lost"
         " connection had sent (default 10min); see 'What may land late' in docs/recovery.md"),
        ("--tls-certificates", "DIR", "folder with certificates for nbds://"),
        ("--metrics-listen", "ADDRESS", "serve metrics at unix:PATH or 127.0.0.1:PORT"),
        ("--node", "1|2", "one of two appliances: create the volume on either, with its number and"
         " a record of its own; primary and secondary are the same"),
        ("--partner", "URI", "where the other appliance is reached: tls://HOST[:PORT] or"
         " unix:///PATH"),
        ("--partner-listen", "URI", "where the other appliance reaches this one"),
        ("--partner-role", "pair|keeper", "what this node is to the other: one that serves hosts"
         " (default), or a keeper, node 2, which keeps the other's record and nothing else"),
        ("--size", "SIZE", "of a keeper: how large the volume is that the other node has"),
        ("--record-on", "both|partner", "what a write to a new place waits for: this node's"
         " record and the partner (default), or the partner alone, quicker where the record"
         " is slow; if both nodes then lose power, everything is compared"),
        ("--partner-ack", "memory|stored", "when the partner counts as having recorded a place:"
         " once it is in its memory (default), or in its stored record"),
        ("--record-fallback", "true|false", "whether the partner's copy of this node's record"
         " counts while the record itself cannot be written; else writes to new places fail"
         " (default true)"),
        ("--partner-record", "DEV", "the other's record device as seen from here: a takeover by a"
         " node that has not met the other reads it, and need not compare everything"),
        ("--on-cut", "wait|go-on", "what a write to a place of nobody's does while the link is"
         " lost; go-on at one node at most: the other compares everything when it takes over"
         " (default wait)"),
        ("--partner-name", "NAME", "the name in the other's certificate (default: the host of"
         " --partner)"),
        ("--partner-fingerprint", "SHA-256", "of the other's certificate, if no other may do"),
        ("--partner-certificates", "DIR", "folder that 'dmctl partner-keys' has made"),
        ("--partner-timeout", "DURATION", "how long a silent partner counts as there (default 2s)"),
        ("--partner-wait", "DURATION", "how long 'dmctl start' waits for it (default 10s)"),
        ("--serve", "always|on-promote", "let hosts in by itself (default), or by 'dmctl takeover'"
         " only, for a cluster manager"),
        ("--fence-command", "PATH", "program that makes certain that the other can write no more,"
         " by the convention of fence agents; see docs/failover.md"),
        ("--fence-options", "KEY=VALUE …", "what it is told besides, in one word"),
        ("--fence-delay", "DURATION", "how long the link is lost before an automatic takeover"
         " (default 1s at node 1, 6s at node 2)"),
        ("--fence-timeout", "DURATION", "when it is killed, and nothing is proven (default 60s)"),
        ("--takeover", "manual|auto", "whether this node runs it by itself, once a host here waits"
         " for the other (default manual)"),
        ("--cut-patience", "DURATION", "how long a host's request waits for a partner that is not"
         " there, before it ends with an error (default: for ever); with a receiver, how long a"
         " write waits for a read, before the point is given up (default 50ms)"),
        ("--point-interval", "DURATION", "with a receiver: how often the volume is cut (default"
         " 30s)"),
        ("--spool-limit", "SIZE", "with a receiver: memory for what was read for a point and not"
         " sent (default 256MiB)"),
        ("--spool", "DIR", "with a receiver: where a file takes what is beyond that"),
        ("--spool-file-limit", "SIZE", "how large it may become (default 4GiB)"),
        ("--compress", "auto|off", "with a receiver: compress what is sent where that pays (default"
         " auto)"),
        ("--start-alone", "yes|no", "with a receiver: let hosts in at a start before it has said"
         " that it was not promoted (default yes)"),
        ("--group", "NAME", "with a receiver: cut it together with the other volumes of this name,"
         " at one instant; their receivers have the same --group"),
    ):  # fmt: skip
        create.add_argument(option, metavar=metavar, help=text)
    create.add_argument(
        "--allow-plaintext-loopback",
        action="store_true",
        default=None,
        help="export without TLS on a loopback address",
    )
    create.add_argument(
        "--fence-aborts-io",
        action="store_true",
        default=None,
        help="the fence command also ends what the other has on its way to the storage",
    )
    create.add_argument(
        "--join",
        action="store_true",
        help="this is node 1 of a pair that exists, and its record is lost: what differs is fetched"
        " from the partner at the first start; the node that was node 1 must never run again",
    )
    create.add_argument("--dry-run", action="store_true", help="print the plan, change nothing")
    create.add_argument(
        "--force",
        action="store_true",
        help="overwrite a record that belongs to another volume or is not clean, and what else was"
        " found on record or secondary; it does not answer the question about a good copy",
    )
    add_yes(create)

    start = add_command(
        commands,
        "start",
        "lifecycle:start",
        "start volumes",
        "Returns when hosts can use them; copying goes on. A started volume is left alone.",
    )
    add_names(start)
    start.add_argument(
        "--resync-all",
        action="store_true",
        help="record everything first, so that all of it is compared and copied if it differs: for"
        " a primary that was written while the volume was stopped",
    )
    start.add_argument(
        "--force",
        action="store_true",
        help="of a volume with a receiver: let hosts in although that was promoted or, with"
        " start_alone = no, was not heard. What they write is a second history (state split-brain)"
        " until 'dmctl failback' overwrites it",
    )
    add_timeout(start, "give up after this time with status 40 (default 2min)", 120.0)
    stop = add_command(
        commands,
        "stop",
        "lifecycle:stop",
        "stop volumes cleanly",
        "Finishes requests, copies what is left and marks the record clean. A stopped"
        " volume is left alone. If the secondary is away or the volume is paused, what is left"
        " stays in the record.",
    )
    add_names(stop)
    stop.add_argument("--now", action="store_true", help="leave what is not copied in the record")
    stop.add_argument(
        "--kill",
        action="store_true",
        help="end a process that does not answer, or has not stopped within --timeout, as a crash"
        " would (SIGKILL): nothing is lost, and what its record names is copied after the next"
        " start",
    )
    add_timeout(
        stop,
        "give up waiting after this time with status 40; the stop goes on (default: no bound while"
        " the process is at work; one that does not answer is given up after 15s)",
    )

    resize = add_command(
        commands,
        "resize",
        "copying:resize",
        "take up a new size of primary and secondary, while running",
        "Of two appliances either node takes the command, and both grow, or neither. If it was cut"
        " off, give it again. A receiver is asked first: it extends a file, and a device has to be"
        " large enough; points of before keep their size.",
    )
    add_name(resize)
    plan = add_command(
        commands,
        "plan",
        "plan:show",
        "print what the kernel has of a volume, and the commands to what is wanted",
        "For volumes that are attached with device-mapper. Nothing is changed; 'dmctl start' and"
        " 'dmctl stop' do the same steps.",
    )
    add_name(plan)
    plan.add_argument("--remove", action="store_true", help="plan the way down instead of up")
    remove = add_command(
        commands,
        "remove",
        "lifecycle:remove",
        "forget a stopped volume",
        "Removes its configuration; never touches primary or secondary.",
    )
    add_name(remove)
    remove.add_argument(
        "--wipe-record", action="store_true", help="also make the record unrecognisable"
    )
    add_yes(remove)


def add_boot(commands: Commands) -> None:
    assemble = add_command(
        commands,
        "assemble",
        "assemble:assemble",
        "start volumes whose media are there, and say what the others wait for",
        "A secondary that is reached through the network is not waited for. With --all only volumes"
        " with start_at_boot. Waiting is no error.",
    )
    add_names(assemble)
    assemble.add_argument(
        "--degraded", action="store_true", help="do not wait for a secondary on this machine"
    )
    assemble.add_argument(
        "--wait", action="store_true", help="end only when they are started, or cannot be"
    )
    add_patience(assemble)
    add_timeout(assemble, "give up a start after this time with status 40 (default 2min)", 120.0)
    monitor = add_command(
        commands,
        "monitor",
        "monitor:monitor",
        "start volumes by themselves when their media appear",
        "For machines without systemd, where bitmapd is also started again if it dies. Volumes with"
        " start_at_boot = false are left alone, and so are those that were stopped, until their"
        " primary or record has gone and come back.",
    )
    monitor.add_argument("--daemon", action="store_true", help="go into the background")
    add_patience(monitor)
    rules = add_command(
        commands,
        "udev-rules",
        "probe:udev_rules",
        "write the rules by which udev and systemd know the volumes in /etc/dmctl",
        "Commands that make, remove or promote a volume or a receiver do this too; it is needed"
        " after a configuration was changed by hand.",
    )
    rules.add_argument("--print", action="store_true", help="show the rules, change nothing")


def add_copying(commands: Commands) -> None:
    resync = add_command(
        commands,
        "resync",
        "copying:resync",
        "have volumes that are not in sync copy what their record names",
        "Without names all running volumes; those that are stopped or paused are then passed over,"
        " and named unless their record is empty. Returns at once; safe to run at any moment and"
        " any number of times.",
    )
    add_names(resync)
    resync.add_argument(
        "--checksum", action="store_true", help="compare first, and copy only what differs"
    )
    verify = add_command(
        commands,
        "verify",
        "copying:verify",
        "compare primary and secondary while in use",
        "Differences that the record does not name are unexpected: they are listed, and the exit"
        " status is 101 unless all were repaired. A receiver sends sums of its image, and a"
        " repair comes with the next point.",
    )
    add_name(verify)
    verify.add_argument("--repair", action="store_true", help="copy what differs unexpectedly")
    pause = add_command(
        commands,
        "pause",
        "copying:pause",
        "copy nothing to the secondary, until 'dmctl resume'",
        "Hosts go on writing, and the record grows. Returns when nothing is under way to the"
        " secondary any more. The pause is kept in the record: it lasts over 'dmctl stop', crashes"
        " and reboots, and a stop then leaves in the record what is not copied.",
    )
    add_name(pause)
    resume = add_command(commands, "resume", "copying:resume", "go on copying after a pause")
    add_name(resume)
    change = add_command(
        commands,
        "set",
        "copying:change",
        "change settings of a running volume",
        "Keys: copy-rate, record-limit, resync-target, era-interval, predictor, late-writes; with a"
        " receiver point-interval, cut-patience, spool-limit and compress; and"
        " trace=FILE, which records the requests of hosts for 'dmctl simulate'; 'trace=' ends that."
        " The new values are also written to the volume's configuration."
        " node=1 partner=URI partner-listen=URI, and what else a pair needs, make a stopped volume"
        " node 1 of two appliances; node 2 is then created. record-on, partner-ack,"
        " record-fallback, partner-record and on-cut may be changed while the volume is stopped.",
    )
    add_name(change)
    change.add_argument("changes", metavar="KEY=VALUE", nargs="+", help="what to change")


def add_watching(commands: Commands) -> None:
    status = add_command(
        commands,
        "status",
        "status:status",
        "show the state of volumes",
        epilog=CHECK_CODES,
    )
    add_names(status, all_option=False)
    status.add_argument("--check", action="store_true", help="turn the state into the exit status")
    status.add_argument(
        "--max-point-age",
        metavar="DURATION",
        type=typed(duration),
        help="with --check: status 101, too, if the newest point that a receiver has is older, or"
        " nobody knows of one",
    )
    wait = add_command(commands, "wait", "lifecycle:wait", "wait until a volume is in a state")
    add_name(wait)
    wait.add_argument(
        "--for",
        dest="state",
        required=True,
        choices=("in-sync", "started", "stopped", "paired", "alone", "point"),
        help="the state; paired and alone: what two appliances are to one another; point: the"
        " receiver has one; of a receiver only started, stopped and point",
    )
    wait.add_argument(
        "--newer-than",
        metavar="N",
        type=typed(count),
        help="with point: one of a larger number (default 0: any)",
    )
    add_timeout(wait, "give up after this time with status 40 (default: wait for ever)")
    events = add_command(
        commands,
        "events",
        "watch:events",
        "print what happened, and then what happens, one JSON object a line",
    )
    completed(
        events.add_argument(
            "name", metavar="NAME", nargs="?", help="one volume (default: all running)"
        ),
        VOLUME,
    )
    events.add_argument("--now", action="store_true", help="end with what has happened so far")
    events.add_argument(
        "--explain", action="store_true", help="print what each event means and what to do instead"
    )
