"""The one parser tree: every command, option and help text.

Commands name the function that runs them as `module:function`, so that building the parser imports
none of them.  Man pages and shell completion are made from this tree.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bitmapd import __version__
from bitmapd.config.kinds import from_unit_instance
from bitmapd.control.states import check_codes
from bitmapd.errors import UsageError
from bitmapd.units import parse_duration, parse_rate, parse_size
from dmctl.cli.output import Output

EXIT_CODES = """\
exit status:
  0 done or nothing to do      1 failed                    2 usage or configuration
  10 not found                 11 exists already           12 busy
  13 no space                  14 wrong state              15 secondary or partner unreachable
  16 split brain               20 record damaged           21 format too new
  22 record of another volume  30 permission               40 time-out
  100 degraded                 101 not in sync, or differences found
  128+N ended by signal N
Of several volumes the lowest status that is not 0 counts.
"""

CHECK_CODES = f"exit status of status --check:\n{check_codes()}"

FILE = {"bash": "_shtab_compgen_files", "zsh": "_files"}
VOLUME = {"bash": "_dmctl_volumes", "zsh": "_dmctl_volumes"}
FOLDER = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}

# Functions of the shells that offer the configured volumes.
_LIST = """\
  local file
  for file in "${DMCTL_CONFIG_DIR:-/etc/dmctl}"/volumes/*.toml; do
    file="${file##*/}"
"""
_VOLUMES = {
    "bash": f"""\
_dmctl_volumes() {{
{_LIST}    compgen -W "${{file%.toml}}" -- "$1"
  done
}}
""",
    "zsh": f"""\
_dmctl_volumes() {{
{_LIST}    compadd -- "${{file%.toml}}"
  done
}}
""",
}

Commands = Any  # argparse keeps the type of a subparsers action to itself


class Parser(argparse.ArgumentParser):
    """Errors are raised instead of printed, so that --json covers them too."""

    def error(self, message: str) -> NoReturn:
        hint = f"see '{self.prog} --help'"
        for action in self._subparsers._group_actions if self._subparsers else []:
            if message.startswith("argument COMMAND: invalid choice") and action.choices:
                word = message.split("'")[1]
                near = difflib.get_close_matches(word, list(action.choices), n=1)
                message = f"there is no command '{word}'"
                hint = f"did you mean '{near[0]}'? {hint}" if near else hint
        raise UsageError(message, hint)

    def _print_message(self, message: str, file: Any = None) -> None:
        """--help and --version: what argparse does with a stream that fails is its own affair."""
        Output(os.environ).text(message)


class PrintCompletion(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        import shtab  # noqa: PLC0415  (slow to import, needed here only)

        script = shtab.complete(parser, str(values), preamble=_VOLUMES[str(values)])
        Output(os.environ).text(script)
        parser.exit()


def duration(text: str) -> float:
    return parse_duration(text)


def latency(text: str) -> float:
    """A duration that may also be in microseconds."""
    number = text.strip().removesuffix("us").strip()
    if text.strip().endswith("us") and number.isascii() and number.isdigit():
        return int(number) / 1e6
    return parse_duration(text)


def sizes(text: str) -> list[int]:
    """Sizes with commas between them."""
    return [parse_size(word) for word in text.split(",")]


def _global_options(parser: argparse.ArgumentParser, *, again: bool) -> None:
    """The options that every command takes; `again` on a command, where they have no defaults so
    as not to undo what was said before the command."""

    def default(value: Any) -> Any:
        return argparse.SUPPRESS if again else value

    group = parser.add_argument_group("global options")
    _completed(
        group.add_argument(
            "--config-dir",
            metavar="DIR",
            default=default(None),
            help="configuration (default $DMCTL_CONFIG_DIR or /etc/dmctl)",
        ),
        FOLDER,
    )
    _completed(
        group.add_argument(
            "--run-dir",
            metavar="DIR",
            default=default(None),
            help="sockets and pid files (default $DMCTL_RUN_DIR or /run/dmctl)",
        ),
        FOLDER,
    )
    group.add_argument(
        "--json", action="store_true", default=default(False), help="print JSON on stdout"
    )
    group.add_argument(
        "-q", "--quiet", action="count", default=default(0), help="say nothing but errors"
    )
    group.add_argument("-v", "--verbose", action="count", default=default(0), help="say more")
    group.add_argument(
        "--debug",
        action="store_true",
        default=default(False),
        help="show where in the program an error arose",
    )


def _completed(action: argparse.Action, how: dict[str, str]) -> None:
    action.complete = how  # type: ignore[attr-defined]  # what shtab looks for


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dmctl",
        description="Asynchronous mirrors of block devices: create, run, watch and repair them.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _global_options(parser, again=False)
    parser.add_argument("--version", action="version", version=f"dmctl {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh"),
        help="print a completion script for the shell",
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    _volumes(commands)
    _boot(commands)
    _copying(commands)
    _watching(commands)
    _records(commands)
    _configuration(commands)
    _simulate(commands)
    _partner_keys(commands)
    _later(commands)
    return parser


def _command(
    commands: Commands, name: str, run: str, text: str, more: str = "", epilog: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.{' ' if more else ''}{more}",
        epilog=epilog,
        formatter_class=(
            argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter
        ),
        allow_abbrev=False,
    )
    _global_options(parser, again=True)
    parser.set_defaults(run=run)
    return parser


def _name(parser: argparse.ArgumentParser) -> None:
    _completed(
        parser.add_argument("name", metavar="NAME", type=from_unit_instance, help="the volume"),
        VOLUME,
    )


def _names(parser: argparse.ArgumentParser, *, all_option: bool = True) -> None:
    _completed(
        parser.add_argument(
            "names", metavar="NAME", nargs="*", type=from_unit_instance, help="the volumes"
        ),
        VOLUME,
    )
    if all_option:
        parser.add_argument("--all", action="store_true", help="every configured volume")


def _yes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="answer the question with yes")


def _device(parser: argparse.ArgumentParser, text: str) -> None:
    _completed(parser.add_argument("device", metavar="DEV", help=text), FILE)


def _timeout(parser: argparse.ArgumentParser, text: str, default: float | None = None) -> None:
    parser.add_argument("--timeout", metavar="DURATION", type=_type(duration), default=default,
                        help=text)  # fmt: skip


def _type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of ours for argparse, which wants to name the option in the message itself."""

    def typed(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            hint = f" ({error.hint})" if error.hint else ""
            raise argparse.ArgumentTypeError(f"{error.message}{hint}") from None

    return typed


def _volumes(commands: Commands) -> None:
    create = _command(
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
    _name(create)
    for option, metavar, text in (
        ("--primary", "DEV", "block device or file with the data"),
        ("--secondary", "TARGET", "block device, file, nbd://HOST[:PORT]/EXPORT, nbds://… (TLS) or"
         " nbd+unix:///EXPORT?socket=PATH"),
        ("--record", "DEV", "block device or file for the record"),
    ):  # fmt: skip
        _completed(create.add_argument(option, metavar=metavar, required=True, help=text), FILE)
    for option, metavar, text in (
        ("--attach", "auto|dm|nbd", "how hosts reach the volume: /dev/mapper/NAME, or an NBD"
         " export; auto is dm where the kernel has it and the primary is a block device"),
        ("--listen", "URI", "where to export (default nbd+unix:///NAME?socket=RUN_DIR/NAME.nbd)"),
        ("--extent-size", "SIZE", "unit of the record (default 1MiB)"),
        ("--block-size", "SIZE", "unit of copying (default 64KiB)"),
        ("--record-limit", "SIZE", "how much a crash may make us copy (default: 1GiB or a tenth of"
         " the volume, whichever is smaller; never less than 64 extents)"),
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
    ):  # fmt: skip
        create.add_argument(option, metavar=metavar, help=text)
    create.add_argument(
        "--allow-plaintext-loopback",
        action="store_true",
        default=None,
        help="export without TLS on a loopback address",
    )
    create.add_argument("--dry-run", action="store_true", help="print the plan, change nothing")
    create.add_argument(
        "--force",
        action="store_true",
        help="overwrite a record that belongs to another volume or is not clean, and what else was"
        " found on record or secondary; it does not answer the question about a good copy",
    )
    _yes(create)

    start = _command(
        commands,
        "start",
        "lifecycle:start",
        "start volumes",
        "Returns when hosts can use them; copying goes on. A started volume is left alone.",
    )
    _names(start)
    start.add_argument(
        "--resync-all",
        action="store_true",
        help="record everything first, so that all of it is compared and copied if it differs: for"
        " a primary that was written while the volume was stopped",
    )
    _timeout(start, "give up after this time with status 40 (default 2min)", 120.0)
    stop = _command(
        commands,
        "stop",
        "lifecycle:stop",
        "stop volumes cleanly",
        "Finishes requests, copies what is left and marks the record clean. A stopped"
        " volume is left alone. If the secondary is away or the volume is paused, what is left"
        " stays in the record.",
    )
    _names(stop)
    stop.add_argument("--now", action="store_true", help="leave what is not copied in the record")
    stop.add_argument(
        "--kill",
        action="store_true",
        help="end a process that does not answer, or has not stopped within --timeout, as a crash"
        " would (SIGKILL): nothing is lost, and what its record names is copied after the next"
        " start",
    )
    _timeout(
        stop,
        "give up waiting after this time with status 40; the stop goes on (default: no bound while"
        " the process is at work; one that does not answer is given up after 15s)",
    )

    resize = _command(
        commands,
        "resize",
        "copying:resize",
        "take up a new size of primary and secondary, while running",
    )
    _name(resize)
    plan = _command(
        commands,
        "plan",
        "plan:show",
        "print what the kernel has of a volume, and the commands to what is wanted",
        "For volumes that are attached with device-mapper. Nothing is changed; 'dmctl start' and"
        " 'dmctl stop' do the same steps.",
    )
    _name(plan)
    plan.add_argument("--remove", action="store_true", help="plan the way down instead of up")
    remove = _command(
        commands,
        "remove",
        "lifecycle:remove",
        "forget a stopped volume",
        "Removes its configuration; never touches primary or secondary.",
    )
    _name(remove)
    remove.add_argument(
        "--wipe-record", action="store_true", help="also make the record unrecognisable"
    )
    _yes(remove)


def _boot(commands: Commands) -> None:
    assemble = _command(
        commands,
        "assemble",
        "assemble:assemble",
        "start volumes whose media are there, and say what the others wait for",
        "A secondary that is reached through the network is not waited for. With --all only volumes"
        " with start_at_boot. Waiting is no error.",
    )
    _names(assemble)
    assemble.add_argument(
        "--degraded", action="store_true", help="do not wait for a secondary on this machine"
    )
    assemble.add_argument(
        "--wait", action="store_true", help="end only when they are started, or cannot be"
    )
    _patience(assemble)
    _timeout(assemble, "give up a start after this time with status 40 (default 2min)", 120.0)
    monitor = _command(
        commands,
        "monitor",
        "monitor:monitor",
        "start volumes by themselves when their media appear",
        "For machines without systemd, where bitmapd is also started again if it dies. Volumes with"
        " start_at_boot = false are left alone, and so are those that were stopped, until their"
        " primary or record has gone and come back.",
    )
    monitor.add_argument("--daemon", action="store_true", help="go into the background")
    _patience(monitor)
    rules = _command(
        commands,
        "udev-rules",
        "probe:udev_rules",
        "write the rules by which udev and systemd know the volumes in /etc/dmctl",
        "'dmctl create' and 'dmctl remove' do this too; it is needed after a configuration was"
        " changed by hand.",
    )
    rules.add_argument("--print", action="store_true", help="show the rules, change nothing")


def _patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--patience", metavar="DURATION", type=_type(duration), default=30.0,
                        help="how long to wait for a secondary on this machine when all else is"
                        " there (default 30s)")  # fmt: skip


def _copying(commands: Commands) -> None:
    resync = _command(
        commands,
        "resync",
        "copying:resync",
        "have volumes that are not in sync copy what their record names",
        "Without names all running volumes; those that are stopped or paused are then passed over,"
        " and named unless their record is empty. Returns at once; safe to run at any moment and"
        " any number of times.",
    )
    _names(resync)
    resync.add_argument(
        "--checksum", action="store_true", help="compare first, and copy only what differs"
    )
    verify = _command(
        commands,
        "verify",
        "copying:verify",
        "compare primary and secondary while in use",
        "Differences that the record does not name are unexpected: they are listed, and the exit"
        " status is 101 unless all were repaired.",
    )
    _name(verify)
    verify.add_argument("--repair", action="store_true", help="copy what differs unexpectedly")
    pause = _command(
        commands,
        "pause",
        "copying:pause",
        "copy nothing to the secondary, until 'dmctl resume'",
        "Hosts go on writing, and the record grows. Returns when nothing is under way to the"
        " secondary any more. The pause is kept in the record: it lasts over 'dmctl stop', crashes"
        " and reboots, and a stop then leaves in the record what is not copied.",
    )
    _name(pause)
    resume = _command(commands, "resume", "copying:resume", "go on copying after a pause")
    _name(resume)
    change = _command(
        commands,
        "set",
        "copying:change",
        "change settings of a running volume",
        "Keys: copy-rate, record-limit, resync-target, era-interval, predictor, late-writes, and"
        " trace=FILE, which records the requests of hosts for 'dmctl simulate'; 'trace=' ends that."
        " The new values are also written to the volume's configuration.",
    )
    _name(change)
    change.add_argument("changes", metavar="KEY=VALUE", nargs="+", help="what to change")


def _watching(commands: Commands) -> None:
    status = _command(
        commands,
        "status",
        "status:status",
        "show the state of volumes",
        epilog=CHECK_CODES,
    )
    _names(status, all_option=False)
    status.add_argument("--check", action="store_true", help="turn the state into the exit status")
    wait = _command(commands, "wait", "lifecycle:wait", "wait until a volume is in a state")
    _name(wait)
    wait.add_argument(
        "--for",
        dest="state",
        required=True,
        choices=("in-sync", "started", "stopped"),
        help="the state",
    )
    _timeout(wait, "give up after this time with status 40")
    events = _command(
        commands,
        "events",
        "watch:events",
        "print what happened, and then what happens, one JSON object a line",
    )
    _completed(
        events.add_argument(
            "name", metavar="NAME", nargs="?", help="one volume (default: all running)"
        ),
        VOLUME,
    )
    events.add_argument("--now", action="store_true", help="end with what has happened so far")
    events.add_argument(
        "--explain", action="store_true", help="print what each event means and what to do instead"
    )


def _records(commands: Commands) -> None:
    record = commands.add_parser(
        "record", help="read a stored record", description="Read a stored record.",
        allow_abbrev=False,
    )  # fmt: skip
    actions = record.add_subparsers(metavar="COMMAND", dest="action", required=True)
    dump = _command(actions, "dump", "record:dump", "show everything that a record says")
    _device(dump, "device or file of the record")
    _completed(dump.add_argument("--output", metavar="FILE", help="write JSON to a new file"), FILE)
    check = _command(
        actions,
        "check",
        "record:check",
        "say what is wrong with a record",
        "Exit status 0 sound, 20 damaged, 21 of a newer format.",
    )
    _device(check, "device or file of the record")
    repair = _command(
        actions,
        "repair",
        "record:repair",
        "write a healed copy of a record elsewhere",
        "What cannot be read counts as to be copied. The record itself is not changed.",
    )
    _device(repair, "device or file of the damaged record")
    _completed(
        repair.add_argument(
            "--output", metavar="FILE", required=True, help="a new file, or an empty device"
        ),
        FILE,
    )
    probe = _command(
        commands,
        "probe",
        "probe:probe",
        "identify a record device",
        "Exit status 10 if there is no record on it.",
    )
    _device(probe, "device or file to look at")
    probe.add_argument("--export", action="store_true", help="print KEY=value, for udev")


def _configuration(commands: Commands) -> None:
    config = commands.add_parser(
        "config", help="show or check the configuration",
        description="Show or check the configuration.", allow_abbrev=False,
    )  # fmt: skip
    actions = config.add_subparsers(metavar="COMMAND", dest="action", required=True)
    show = _command(actions, "show", "configuration:show", "show the merged configuration")
    _names(show, all_option=False)
    show.add_argument("--explain", action="store_true", help="explain every key and its default")
    _command(actions, "check", "configuration:check", "list all errors, each with its file and key")


def _partner_keys(commands: Commands) -> None:
    keys = _command(
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
    _completed(keys.add_argument("folder", metavar="DIR", type=Path, help="to be made"), FOLDER)
    keys.add_argument("--names", metavar="A,B", required=True, help="host names of the two nodes")


def _later(commands: Commands) -> None:
    for name, text, feature in (
        ("promote", "use the secondary in place of a lost primary", "failover"),
        ("demote", "give the secondary back its place", "failover"),
        ("failback", "copy back what changed, and use the primary again", "failover"),
        ("takeover", "take a volume over from the partner", "partner"),
        ("partner", "show the link to the partner", "partner"),
    ):
        parser = _command(
            commands,
            name,
            "later:refuse",
            f"{text} (comes with the {feature} feature)",
            "This build does not have it yet: the command changes nothing and ends with status 14.",
        )
        parser.set_defaults(feature=f"the {feature} feature")
        _name(parser)


def _simulate(commands: Commands) -> None:
    simulate = _command(
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
    _completed(simulate.add_argument("traces", metavar="TRACE", nargs="+", help="the traces"), FILE)
    for options, metavar, kind, text in (
        (("--policy",), "P", str, "superset (ours), predictor:NAME, drbd-al[:SLOTS], drbd-pmem,"
         " md-bitmap, md-llbitmap, dm-mirror, dm-era, lru, belady (default all)"),
        (("--record-limit", "--sizes"), "SIZE[,SIZE...]", _type(sizes),
         "what the record may name (default 64m,256m,1g)"),
        (("--extent-size",), "SIZE[,SIZE...]", _type(sizes),
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
        simulate.add_argument(option, metavar=metavar, type=_type(kind), help=text)
    simulate.add_argument(
        "--recommend", action="store_true", help="print settings for this workload, with reasons"
    )
