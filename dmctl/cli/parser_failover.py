"""The commands that change which side, or which appliance, hosts use."""

from __future__ import annotations

import argparse

from bitmapd.units import parse_size
from dmctl.cli.options import (
    FILE,
    Commands,
    add_command,
    add_name,
    add_names,
    add_timeout,
    add_yes,
    completed,
    count,
    duration,
    typed,
)

MOST_TRIPS = 1000


def round_trips(text: str) -> int:
    """How many, for argparse."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_TRIPS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST_TRIPS}")
    return int(text)


def add_failover(commands: Commands) -> None:
    takeover = add_command(
        commands,
        "takeover",
        "failover:takeover",
        "serve a volume of two appliances here, instead of at the partner",
        "While the partner is there it stops its hosts and gives everything: status 12 if hosts are"
        " connected to it, unless --force is given. They are let in there again by a takeover at"
        " that node. With device-mapper this node makes the volume's device, and the partner has"
        " removed its own by then."
        " If the partner is gone, hosts wait for places that it may have written. A"
        " silent partner may be alive and writing, so a time-out is no proof. --fenced is your word"
        " that it can write neither primary nor secondary any more: it was switched off, or cut off"
        " from the storage. The end of its process is no such proof if it is attached with"
        " device-mapper, for its kernel goes on writing. Then everything that was its own is taken"
        " over: just what its record names is copied; or everything is compared, if this node"
        " has not met it since it started."
        " Without it the volume's fence_command is run, and its success is the proof."
        " Ends with status 15 without a proof, 14 where there is nothing to take over, 12 while the"
        " nodes exchange their records.",
    )
    add_name(takeover)
    takeover.add_argument(
        "--fenced", action="store_true", help="the partner can write no more: your word for it"
    )
    takeover.add_argument(
        "--force", action="store_true", help="also if hosts are connected at the partner"
    )
    takeover.add_argument(
        "--beside",
        action="store_true",
        help="let hosts in here, too: a partner that is there goes on with its own; not with"
        " device-mapper",
    )
    takeover.add_argument(
        "--wait", type=duration, metavar="DURATION", help="if the partner is not there, wait for it"
    )
    demote = add_command(
        commands,
        "demote",
        "failover:demote",
        "let hosts in no more at this node, or this site, and give everything to the other one",
        "Of two appliances: the volume goes on running here, and copies what it has left. Hosts are"
        " let in again by 'dmctl takeover' at this node, or with serve = always by its next start."
        " With device-mapper the volume's device is removed."
        " Without a partner what is this node's own stays in its record. Ends with status 12 if"
        " hosts are connected, unless --force is given; 14 for a volume of a single appliance."
        " Of a volume with a receiver: sends what is left, waits until the receiver has it in its"
        " image, and stops the volume; a start is refused from then on. It is the first half of"
        " 'dmctl switchover', which goes on with it; 'dmctl promote' at either site lets hosts in"
        " there. An old primary that is stopped is only marked, so that it never serves by itself:"
        " 14 if its record names what the receiver may lack, unless --force is given or the other"
        " site was promoted.",
    )
    add_name(demote)
    demote.add_argument("--force", action="store_true", help="also if hosts are connected")
    add_timeout(demote, "of sites: let hosts in again after this time (default 2min)", 120.0)
    point = add_command(
        commands,
        "point",
        "point:point",
        "cut a volume with a receiver now, apart from its interval",
        "Returns when the point is cut and read: what hosts write from then on is not in it, and it"
        " does not depend on them any more. So 'fsfreeze -f DIR; dmctl point NAME --label L;"
        " fsfreeze -u DIR' makes one that a file system has no need to repair. Ends with status 15"
        " if the receiver is away, 14 without a receiver, 1 if the point was given up.",
    )
    add_name(point)
    point.add_argument("--label", metavar="L", help="what the receiver shows it as")
    point.add_argument(
        "--wait", action="store_true", help="return when the receiver has it durably"
    )
    partner = add_command(
        commands,
        "partner",
        "failover:partner",
        "show what two appliances are to one another",
        "Shows the link, the state, which extents either node may write, and what waits. Exit"
        " status: 0 paired, 100 cut or alone, 15 waiting for the partner, 16 split brain. With"
        " --dissolve this node goes on as a single appliance: 14 unless it is alone, since only"
        " then it knows all that the partner has written. Its hosts have to connect again. With"
        " --rejoin, at one node of a split brain, its process begins anew and owns nothing; the"
        " other goes on, and compares everything: 14 in any other state.",
    )
    add_name(partner)
    act = partner.add_mutually_exclusive_group()
    act.add_argument(
        "--ping",
        type=round_trips,
        metavar="N",
        help="show the least, the mean and the most of N round trips instead; 15 without a link",
    )
    act.add_argument(
        "--lead",
        action="store_true",
        help="have this node take what belongs to nobody, until the other one does by this or by a"
        " takeover, or this process ends; then it is node 1",
    )
    act.add_argument("--dissolve", action="store_true", help="do without the partner, for good")
    act.add_argument("--rejoin", action="store_true", help="end a split brain at this node")
    partner.add_argument("--yes", action="store_true", help="do not ask")


def add_receivers(commands: Commands) -> None:
    receive = add_command(
        commands,
        "receive",
        "receive:receive",
        "make a receiver of consistent points, without starting it",
        "A receiver keeps a copy of a volume at another site that is, at any moment, what the"
        " volume was at one instant. It takes what the volume's bitmapd sends into the journal, and"
        " writes whole points to the image. Both are block devices or files that exist; the image"
        " at least as large as the volume, the journal at least 64 MiB, better a tenth of the"
        " image. Everything is checked before anything is changed. 'dmctl start', 'stop',"
        " 'status', 'events' and 'remove' work on it as on a volume, and 'dmctl wait NAME --for"
        " point' returns when it has one.",
    )
    add_name(receive)
    for option, metavar, text in (
        ("--image", "DEV|FILE", "what the points are put in"),
        ("--journal", "DEV|FILE", "where they wait for that; its content is overwritten"),
    ):
        completed(receive.add_argument(option, metavar=metavar, required=True, help=text), FILE)
    receive.add_argument(
        "--listen",
        metavar="URI",
        required=True,
        help="where the sender comes in: receiver+tls://HOST[:PORT]/NAME or"
        " receiver+unix:///NAME?socket=PATH",
    )
    for option, metavar, text in (
        ("--certificates", "DIR", "folder that 'dmctl partner-keys' has made; with receiver+tls"),
        ("--sender-name", "NAME", "the name in the sender's certificate; with receiver+tls"),
        ("--sender-fingerprint", "SHA-256", "of the sender's certificate, if no other may do"),
        ("--metrics-listen", "ADDRESS", "serve metrics at unix:PATH or 127.0.0.1:PORT"),
    ):
        receive.add_argument(option, metavar=metavar, help=text)
    receive.add_argument(
        "--retain",
        metavar="RULES",
        help="which older points stay, such as '24 x 1h, 14 x 1d'; the image has to be a file that"
        " can be cloned, unless --point-hook is given",
    )
    receive.add_argument(
        "--catch-up",
        metavar="keep|clone|in-place",
        help="what becomes of the last point when more has changed than fits into the journal"
        " (default: keep)",
    )
    receive.add_argument(
        "--group",
        metavar="NAME",
        help="that of its volume: its members are promoted to one point",
    )
    completed(
        receive.add_argument(
            "--point-hook", metavar="PROGRAM", help="what keeps points instead of clones"
        ),
        FILE,
    )
    receive.add_argument("--dry-run", action="store_true", help="print the plan, change nothing")
    receive.add_argument(
        "--force",
        action="store_true",
        help="overwrite what was found on image and journal",
    )
    points = add_command(
        commands,
        "points",
        "points:points",
        "show the points that a receiver holds",
        "Number, time of the cut, state and label of each point that can be produced: 'applied' is"
        " in the image, 'committed' in the journal, of a 'kept' one there is a copy. Of a receiver"
        " that does not run its journal is read. --drop ends with status 10 if there is no such"
        " point, 14 if the receiver does not run.",
    )
    add_name(points)
    points.add_argument(
        "--drop", type=typed(count), metavar="P", help="do without this kept point from now on"
    )


def _add_drill(commands: Commands) -> None:
    drill = add_command(
        commands,
        "test-failover",
        "drill:test_failover",
        "look at the point that a receiver's image has, while it goes on receiving",
        "Exports it over NBD, to be read, mounted and written. What is written there goes to an"
        " overlay and is thrown away. Points are received, committed and applied meanwhile: what"
        " they overwrite in the image is copied to the overlay before. If that is full the view"
        " ends, its clients are cut off, and the receiver goes on; a client who finds no room gets"
        " ENOSPC. Nothing of it outlives the receiver's process. Ends with status 12 if there is a"
        " view already, 14 without a whole point, or with another one than --point.",
    )
    add_name(drill)
    drill.add_argument(
        "--listen",
        metavar="URI",
        help="where clients connect (default: nbd+unix:///NAME?socket=RUN_DIR/NAME.view)",
    )
    drill.add_argument(
        "--view-limit",
        type=typed(parse_size),
        metavar="SIZE",
        help="how large the overlay may become (default: view_limit of its file, else 1GiB)",
    )
    completed(
        drill.add_argument(
            "--overlay",
            metavar="DIR",
            help="folder for the overlay, a file without a name (default CONFIG_DIR/state)",
        ),
        FILE,
    )
    drill.add_argument(
        "--point",
        type=typed(count),
        metavar="P",
        help="the point that is meant: refused unless the image has it",
    )
    drill.add_argument("--end", action="store_true", help="end it, and throw the overlay away")


def add_roles(commands: Commands) -> None:
    _add_drill(commands)
    promote = add_command(
        commands,
        "promote",
        "promote:promote",
        "make a receiver the volume, since the other site is lost or stopped",
        "Puts the newest committed point into the image, and serves it over NBD, a volume like any"
        " other, with a record of its own: what is written from then on is named there, for the way"
        " back. Ends with status 14, and changes nothing, while the sender is connected or if the"
        " image is not a whole point, unless --force is given. With --point or --label an older"
        " point that is kept: what changed since is named in the record, so that failback finds it."
        " Receivers of a group are promoted together, by --group or all of their names, to the"
        " newest point that all have, or the one with --label: one of them alone ends with status"
        " 14, unless --force is given."
        " If it is cut short the same command goes on. At a site that was demoted: lets hosts in"
        " there again, once the other one has said that it was not promoted, or with --force; see"
        " 'The other site is lost' in"
        " docs/recovery.md.",
    )
    add_names(promote, all_option=False)
    promote.add_argument(
        "--group",
        metavar="GROUP",
        help="all receivers of this group, to the newest point that all of them have",
    )
    which = promote.add_mutually_exclusive_group()
    which.add_argument(
        "--point",
        type=typed(count),
        metavar="P",
        help="the point that is meant: the newest one, or one that is kept",
    )
    which.add_argument("--label", metavar="L", help="the same by the label of a point")
    completed(
        promote.add_argument(
            "--record",
            metavar="DEV",
            help="block device or file for the record (default: that of the receiver's"
            " configuration, else a file in CONFIG_DIR/state)",
        ),
        FILE,
    )
    promote.add_argument(
        "--force",
        action="store_true",
        help="also while the sender is connected, or with an image that may be damaged",
    )
    add_timeout(promote, "give up the start after this time with status 40 (default 2min)", 120.0)
    failback = add_command(
        commands,
        "failback",
        "failback:failback",
        "make an old primary the receiver of the site that was promoted in its place",
        "Of a stopped volume. Asks the other site, and is refused unless that has the newer data: a"
        " split brain ends with status 16, an other site that does not answer with 15. Only what"
        " differs is copied: what either record names. What was written here and never left is"
        " overwritten, which is asked for first. The first point makes this site consistent; then"
        " 'dmctl switchover' there exchanges the places.",
    )
    add_name(failback)
    completed(
        failback.add_argument(
            "--save",
            metavar="FILE",
            help="keep what may never have left this site in a sparse file of the volume's size",
        ),
        FILE,
    )
    completed(
        failback.add_argument(
            "--journal",
            metavar="DEV",
            help="block device or file to receive points in (default: that of the configuration)",
        ),
        FILE,
    )
    failback.add_argument(
        "--force", action="store_true", help="overwrite what was found on the journal"
    )
    add_yes(failback)
    add_timeout(failback, "give up the start after this time with status 40 (default 2min)", 120.0)
    switchover = add_command(
        commands,
        "switchover",
        "switchover:switchover",
        "exchange the places of a volume and its receiver: a planned move, which loses nothing",
        "At the volume, with both sites up. Hosts are cut off as by a stop; what is left is sent,"
        " and when the receiver has all of it in its image this site is demoted, durably, and the"
        " other one promoted; this one becomes its receiver, with nothing to copy. If a step before"
        " the demotion fails, hosts are let in again. If the other site is lost behind it, neither"
        " serves: the same command goes on, and 'dmctl promote' at either site lets hosts in there."
        " Ends with status 15 if the other site is away, 40 if it takes too long.",
    )
    add_name(switchover)
    completed(
        switchover.add_argument(
            "--journal",
            metavar="DEV",
            help="block device or file to receive points in (default: that of the configuration)",
        ),
        FILE,
    )
    switchover.add_argument(
        "--force", action="store_true", help="overwrite what was found on the journal"
    )
    add_timeout(switchover, "give up a step after this time (default 2min)", 120.0)
