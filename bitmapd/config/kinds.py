"""The kinds of values that a configuration holds: how each is written, read and refused (pure)."""

from __future__ import annotations

import re
import reprlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from bitmapd.config.problems import nearest
from bitmapd.errors import UsageError
from bitmapd.net.uri import is_receiver, parse_partner_uri, parse_receiver_uri, parse_uri
from bitmapd.units import (
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)

MOST_RETAINED = 48  # points that are kept by rule; the directory of a journal has 64
MAX_NAME_CHARS = 64  # what the superblock of a record has room for

_NAME = re.compile(r"[A-Za-z0-9+_][A-Za-z0-9+_.-]*", re.ASCII)
_MAX_INSTANCE_CHARS = 255 - len("dmctl-assemble@.service")
_UNIT_PLUS = "\\x2b"
_WORD = re.compile(r"[a-z0-9][a-z0-9-]{0,31}", re.ASCII)
_HOST_NAME = re.compile(r"[A-Za-z0-9*]([A-Za-z0-9.-]{0,252})", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
_FENCE_OPTION = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_RULE = re.compile(r"([0-9]{1,3}) *x *([0-9a-z.]+)", re.ASCII)
_FENCE_ACTIONS = ("off", "reboot")
_LOOPBACK = re.compile(r"localhost|::1|127(\.[0-9]{1,3}){3}", re.ASCII)


def check_name(name: str) -> str:
    """The name itself, if it may be a volume's name: what LVM allows for one of its own."""
    if len(name) > MAX_NAME_CHARS:
        raise UsageError(
            f"the name {name[:MAX_NAME_CHARS]!r}… has {len(name)} characters, that of a volume has"
            f" at most {MAX_NAME_CHARS}"
        )
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"{name!r} cannot be the name of a volume",
            hint="use letters, digits and + _ . - and begin with neither . nor -",
        )
    if len(unit_instance(name)) > _MAX_INSTANCE_CHARS:
        raise UsageError(f"{name!r} has more + than the name of a unit of systemd can hold")
    return name


def unit_instance(name: str) -> str:
    """A volume's name as the instance of a systemd unit, where a + has to be escaped.

    A - is not, as systemd-escape would do it: the units take the instance as it is (%i).
    """
    return name.replace("+", _UNIT_PLUS)


def from_unit_instance(text: str) -> str:
    """The name that an instance stands for; a name itself stays as it is."""
    return text.replace(_UNIT_PLUS, "+")


def is_loopback(host: str) -> bool:
    return _LOOPBACK.fullmatch(host) is not None


@dataclass(frozen=True, slots=True)
class Kind:
    """How a value is written: `parse` raises UsageError, `render` gives what TOML holds."""

    syntax: str
    parse: Callable[[Any], Any]
    render: Callable[[Any], str | int | bool]


def _quoted(value: Any) -> str:
    """The value, shortened: a file may hold one of any size and depth."""
    return reprlib.repr(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{_quoted(value)} is not a string", hint='write it in quotes: "…"')
    if not value.isprintable() or not value:
        raise UsageError(f"{_quoted(value)} is empty or holds control characters")
    return value


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return parse_size(_text(value))


def _positive_size(value: Any) -> int:
    size_bytes = _size(value)
    if size_bytes == 0:
        raise UsageError(f"{_quoted(value)} is zero")
    return size_bytes


def _interval(value: Any) -> float:
    interval_s = parse_duration(_text(value))
    if not 0.1 <= interval_s <= 600:
        raise UsageError(f"{_quoted(value)} is not between 100ms and 10min")
    return interval_s


def _point_interval(value: Any) -> float:
    interval_s = parse_duration(_text(value))
    if not 0.1 <= interval_s <= 86400:
        raise UsageError(f"{_quoted(value)} is not between 100ms and 24h")
    return interval_s


def _positive_duration(value: Any) -> float:
    duration_s = parse_duration(_text(value))
    if duration_s == 0:
        raise UsageError(f"{_quoted(value)} is zero")
    return duration_s


def _rate(value: Any) -> int:
    return parse_rate(str(value) if type(value) is int else _text(value), "use 'dmctl pause'")


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{_quoted(value)} is neither true nor false")
    return value


def _switch(value: Any) -> bool:
    """A boolean that may be given as a word, too, by an option or `dmctl set`."""
    return _boolean(value == "true" if value in ("true", "false") else value)


def _path(value: Any) -> str:
    path = _text(value)
    if not path.startswith("/"):
        raise UsageError(f"{path!r} is not an absolute path")
    return path


def _command(value: Any) -> str:
    try:
        return _path(value)
    except UsageError as error:
        hint = "name the program from the root, such as /usr/sbin/fence_scsi; options go elsewhere"
        raise UsageError(error.message, hint) from None


def _options(value: Any) -> tuple[tuple[str, str], ...]:
    """KEY=VALUE words, or a table of them."""
    if isinstance(value, dict):
        pairs = [(key, _text(item)) for key, item in value.items()]
    elif value == "none":
        return ()
    else:
        try:
            words = shlex.split(_text(value))
        except ValueError as error:
            raise UsageError(f"{_quoted(value)}: {error}") from None
        pairs = [(key, item) for key, _, item in (word.partition("=") for word in words)]
    found: dict[str, str] = {}
    for key, item in pairs:
        if _FENCE_OPTION.fullmatch(key) is None or not item:
            hint = "write 'ip=10.0.0.9 username=dmctl'"
            raise UsageError(f"{key!r} with the value {_quoted(item)} is no KEY=VALUE", hint)
        if key in found:
            raise UsageError(f"{key!r} is given twice")
        found[key] = item
    if found.get("action", "off") not in _FENCE_ACTIONS:
        raise UsageError(
            f"action={found['action']} proves nothing of the other node",
            hint="leave it out, which means off, or use reboot",
        )
    return tuple(found.items())


def _render_options(pairs: tuple[tuple[str, str], ...]) -> str:
    return shlex.join(f"{key}={item}" for key, item in pairs) or "none"


def _retain(value: Any) -> tuple[tuple[int, float], ...]:
    rules = []
    for word in _text(value).split(","):
        found = _RULE.fullmatch(word.strip())
        if found is None:
            raise UsageError(
                f"{word.strip()!r} is no NUMBER x INTERVAL", hint="write '24 x 1h, 14 x 1d'"
            )
        days = found[2].endswith("d") and parse_duration(f"{found[2][:-1]}h") * 24
        interval_s = days or parse_duration(found[2])
        if interval_s < 1 or not int(found[1]):
            raise UsageError(f"{word.strip()!r} keeps nothing", hint="an interval is 1s or longer")
        rules.append((int(found[1]), interval_s))
    total = sum(most for most, _ in rules)
    if total > MOST_RETAINED:
        raise UsageError(
            f"{_quoted(value)} keeps {total} points",
            hint=f"the journal has room for {MOST_RETAINED}, and those with a label",
        )
    return tuple(rules)


def _render_retain(rules: tuple[tuple[int, float], ...]) -> str:
    words = []
    for most, interval_s in rules:
        days, rest_s = divmod(interval_s, 86400)
        words.append(f"{most} x {format_duration(interval_s) if rest_s else f'{days:.0f}d'}")
    return ", ".join(words)


def _uuid(value: Any) -> UUID:
    try:
        return UUID(_text(value))
    except ValueError:
        raise UsageError(f"{_quoted(value)} is not a UUID") from None


def _word(value: Any) -> str:
    word = _text(value)
    if _WORD.fullmatch(word) is None:
        raise UsageError(f"{word!r} is not a name of a-z 0-9 -")
    return word


def _target(value: Any) -> str:
    target = _text(value)
    if is_receiver(target):
        check_name(parse_receiver_uri(target).name)
        return target
    if "://" in target:
        parse_uri(target)
        return target
    return _path(target)


def _listen(value: Any) -> str:
    listen = _text(value)
    parse_uri(listen)
    return listen


def _node(value: Any) -> int:
    if type(value) is int and value in (1, 2):
        return value
    if value in ("1", "2"):
        return int(value)
    raise UsageError(f"{_quoted(value)} is not a node of a pair: there are 1 and 2")


def _partner(value: Any) -> str:
    return str(parse_partner_uri(_text(value)))


def _receiver(value: Any) -> str:
    return str(parse_receiver_uri(_text(value)))


def _host_name(value: Any) -> str:
    name = _text(value)
    if _HOST_NAME.fullmatch(name) is None:
        raise UsageError(f"{name!r} is not a host's name")
    return name


def _fingerprint(value: Any) -> str:
    text = _text(value).replace(":", "").lower()
    if _FINGERPRINT.fullmatch(text) is None:
        raise UsageError(
            f"{_quoted(value)} is not a SHA-256 fingerprint",
            hint="openssl x509 -in node-cert.pem -noout -fingerprint -sha256",
        )
    return text


def parse_metrics_listen(text: str) -> Path | tuple[str, int]:
    """A socket path for `unix:PATH`, or a loopback host and port for `HOST:PORT`."""
    if text.startswith("unix:"):
        return Path(_path(text.removeprefix("unix:")))
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not re.fullmatch("[0-9]{1,5}", port, re.ASCII) or not 0 < int(port) < 65536:
        raise UsageError(
            f"{text!r} is not an address for metrics",
            hint="write unix:/PATH, 127.0.0.1:PORT or [::1]:PORT",
        )
    if not is_loopback(host):
        raise UsageError(
            f"{text!r}: metrics are served on loopback addresses only",
            hint="use 127.0.0.1 and a proxy of your own that authenticates",
        )
    return host, int(port)


def _metrics(value: Any) -> str:
    text = _text(value)
    parse_metrics_listen(text)
    return text


def choice(*words: str) -> Kind:
    def parse(value: Any) -> str:
        word = _text(value)
        if word not in words:
            raise UsageError(
                f"{word!r} is not one of {', '.join(words)}", hint=nearest(word, words)
            )
        return word

    return Kind(" | ".join(words), parse, str)


def or_word(word: str, kind: Kind) -> Kind:
    """A kind that has a word for None."""
    return Kind(
        f"{kind.syntax} | {word}",
        lambda value: None if value == word else kind.parse(value),
        lambda value: word if value is None else kind.render(value),
    )


TEXT_UUID = Kind("UUID", _uuid, str)
PATH = Kind("path", _path, str)
COMMAND = Kind("path", _command, str)
OPTIONS = Kind("KEY=VALUE … | none", _options, _render_options)
FOLDER = Kind("path", lambda value: Path(_path(value)), str)
TARGET = Kind("path | NBD URI | receiver URI", _target, str)
LISTEN = Kind("NBD URI", _listen, str)
ATTACH = choice("auto", "nbd", "dm")
SERVE = choice("always", "on-promote")
PARTNER_ROLE = choice("pair", "keeper")
SIZE = Kind("size", _positive_size, format_size)
RATE = Kind("size per second", _rate, format_rate)
DURATION = Kind("duration", _positive_duration, format_duration)
PATIENCE = Kind("duration", lambda value: parse_duration(_text(value)), format_duration)
INTERVAL = Kind("duration", _interval, format_duration)
POINT_INTERVAL = Kind("duration", _point_interval, format_duration)
RETAIN = Kind("NUMBER x INTERVAL, …", _retain, _render_retain)
WORD = Kind("name", _word, str)
BOOLEAN = Kind("true | false", _boolean, bool)
SWITCH = Kind("true | false", _switch, bool)
METRICS = Kind("unix:PATH | LOOPBACK:PORT", _metrics, str)
RECORD_ON = choice("both", "partner", "local")
PARTNER_ACK = choice("memory", "stored")
ON_CUT = choice("wait", "go-on")
NODE = Kind("1 | 2", _node, int)
RECEIVER = Kind(
    "receiver+tls://HOST[:PORT]/NAME | receiver+unix:///NAME?socket=PATH", _receiver, str
)
PARTNER = Kind("tls://HOST[:PORT] | unix:///PATH", _partner, str)
HOST_NAME = Kind("name", _host_name, str)
FINGERPRINT = Kind("SHA-256", _fingerprint, str)
