"""A receiver's configuration, which is its own manual (pure).

It stands where those of volumes do, in `volumes/NAME.toml`, and says `role = "receiver"`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

from bitmapd.config import kinds
from bitmapd.config.problems import Problem, nearest
from bitmapd.config.volume import Key
from bitmapd.errors import UsageError
from bitmapd.net.uri import parse_receiver_uri

ROLE: Final = "receiver"


@dataclass(frozen=True, slots=True)
class ReceiverConfig:
    """One receiver, complete."""

    name: str
    role: Annotated[str, Key("role", kinds.choice(ROLE), "Tells a receiver from a volume.")]
    image: Annotated[
        str,
        Key("image", kinds.PATH, "Block device or file that the points of the volume are put in."),
    ]
    journal: Annotated[
        str,
        Key(
            "journal",
            kinds.PATH,
            "Block device or file where what was received waits until it is in the image; at least"
            " 64MiB, a tenth of the image is a good size.",
        ),
    ]
    listen: Annotated[
        str,
        Key(
            "listen",
            kinds.RECEIVER,
            "Where the sender comes in: receiver+tls://HOST[:PORT]/NAME or"
            " receiver+unix:///NAME?socket=PATH.",
        ),
    ]
    dials: Annotated[
        bool,
        Key(
            "dials",
            kinds.BOOLEAN,
            "Whether this receiver connects to its sender, at the address of listen: so it is where"
            " it was the volume before.",
            False,
        ),
    ]
    promoted_record: Annotated[
        str | None,
        Key(
            "record",
            kinds.or_word("none", kinds.PATH),
            "Block device or file for the record of the volume that 'dmctl promote' makes of this"
            " receiver.",
            "none",
        ),
    ]
    sender_name: Annotated[
        str | None,
        Key(
            "sender_name",
            kinds.or_word("none", kinds.HOST_NAME),
            "The name in the sender's certificate; needed with receiver+tls://.",
            "none",
        ),
    ]
    sender_fingerprint: Annotated[
        str | None,
        Key(
            "sender_fingerprint",
            kinds.or_word("none", kinds.FINGERPRINT),
            "SHA-256 of the sender's certificate, if no other one may do.",
            "none",
        ),
    ]
    certificates: Annotated[
        Path | None,
        Key(
            "certificates",
            kinds.or_word("none", kinds.FOLDER),
            "Folder with ca-cert.pem, node-cert.pem and node-key.pem, as 'dmctl partner-keys' makes"
            " it; needed with receiver+tls://.",
            "none",
        ),
    ]

    group: Annotated[
        str | None,
        Key(
            "group",
            kinds.or_word("none", kinds.WORD),
            "Name of the group of its volume: 'dmctl promote --group' takes the newest point that"
            " all receivers of this host with the same one have.",
            "none",
        ),
    ]
    retain: Annotated[
        tuple[tuple[int, float], ...] | None,
        Key(
            "retain",
            kinds.or_word("none", kinds.RETAIN),
            "Which older points stay: '24 x 1h, 14 x 1d' are the first points of the newest 24"
            " hours and 14 days that have one. Points with a label stay besides, until they are"
            " dropped.",
            "none",
        ),
    ]
    point_hook: Annotated[
        str | None,
        Key(
            "point_hook",
            kinds.or_word("none", kinds.COMMAND),
            "Program that keeps points of the image, called with keep, drop or restore, the name,"
            " point, image, time and label; without it the image has to be a file that can be"
            " cloned, on XFS or btrfs.",
            "none",
        ),
    ]
    hook_timeout_s: Annotated[
        float,
        Key(
            "hook_timeout",
            kinds.DURATION,
            "How long point_hook may take to keep or drop a point; then it is ended, and the point"
            " is not kept.",
            "1min",
        ),
    ]
    catch_up: Annotated[
        str,
        Key(
            "catch_up",
            kinds.choice("keep", "clone", "in-place"),
            "What becomes of the last point when more has changed than fits into the journal. keep:"
            " it stays, and the sender waits. clone: a copy of the image is kept first, which"
            " 'dmctl promote' then takes, and what comes goes into the image at once. in-place: it"
            " goes there without a copy, and until it is complete there is no point at all. In a"
            " group: keep.",
            "keep",
        ),
    ]
    view_limit_bytes: Annotated[
        int,
        Key(
            "view_limit",
            kinds.SIZE,
            "How much 'dmctl test-failover' may keep of what is written to its view, or overwritten"
            " in the image meanwhile, unless it says otherwise.",
            "1GiB",
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

    @property
    def record(self) -> str:
        """What its process holds a lock on, as that of a volume does on its record."""
        return self.journal


@functools.cache
def receiver_keys() -> dict[str, Key]:
    """The manual: field name -> key, in order of the fields."""
    hints = get_type_hints(ReceiverConfig, include_extras=True)
    return {
        field: hint.__metadata__[0]
        for field, hint in hints.items()
        if hasattr(hint, "__metadata__")
    }


def build_receiver(
    name: str, table: Mapping[str, Any], file: str
) -> tuple[ReceiverConfig | None, list[Problem]]:
    """A receiver from its table, or all that is wrong with it."""
    fields = {key.name: field for field, key in receiver_keys().items()}
    values: dict[str, Any] = {"name": name}
    for field, key in receiver_keys().items():
        if key.default is not None:
            values[field] = key.kind.parse(key.default)
    problems = []
    for key_name, raw in table.items():
        if key_name not in fields:
            problems.append(Problem(file, key_name, "unknown key", nearest(key_name, fields)))
            continue
        try:
            values[fields[key_name]] = receiver_keys()[fields[key_name]].kind.parse(raw)
        except UsageError as error:
            problems.append(Problem(file, key_name, error.message, error.hint))
    for field, key in receiver_keys().items():
        if field not in values and key.name not in table:
            problems.append(Problem(file, key.name, "is missing"))
    if problems:
        return None, problems
    config = ReceiverConfig(**values)
    problems = [
        Problem(file, key_name, error.message, error.hint) for key_name, error in _judge(config)
    ]
    return (None if problems else config), problems


def render_receiver(config: ReceiverConfig) -> dict[str, str | int | bool]:
    """What TOML holds: all that is not by default."""
    rendered = {
        key.name: (key.kind.render(getattr(config, field)), key.default)
        for field, key in receiver_keys().items()
    }
    return {name: value for name, (value, default) in rendered.items() if value != default}


def _judge(config: ReceiverConfig) -> Iterable[tuple[str, UsageError]]:
    """What is wrong with values that are right one by one: (key, error) pairs."""
    if config.image == config.journal:
        yield "journal", UsageError("is the same as image")
    if config.group is not None and config.catch_up != "keep":
        yield (
            "catch_up",
            UsageError(
                f"{config.catch_up!r} is not for the members of a group: a point that goes into the"
                " image at once would be there before the others have theirs",
                "leave it at keep, with a journal that is large enough; or do without group",
            ),
        )
    uri = parse_receiver_uri(config.listen)
    if uri.name != config.name and not config.dials:
        yield "listen", UsageError(f"names the receiver {uri.name!r}, not {config.name!r}")
    if uri.peer.socket_path is None:
        for key_name, value in (
            ("certificates", config.certificates),
            ("sender_name", config.sender_name),
        ):
            # Whom one connects to has the name of the host, unless another one is given.
            if value is None and not (config.dials and key_name == "sender_name"):
                yield (
                    key_name,
                    UsageError(
                        "is needed with receiver+tls://",
                        hint="'dmctl partner-keys' makes certificates for both ends",
                    ),
                )
