"""URIs (pure): of NBD, by doc/uri.md of the NetworkBlockDevice project, of the partner, and of the
receiver of consistent points.

    nbd://HOST[:PORT]/EXPORT            nbds://…             TCP, without and with TLS
    nbd+unix:///EXPORT?socket=PATH      nbds+unix:///…       unix socket, likewise

With TLS two parameters are known: `tls-certificates` (a folder, absolute) and `tls-hostname` (the
name that the server's certificate has to carry, if it is not HOST).  The export name is what
follows the slash, percent-decoded; a `+` means itself everywhere.  Whatever is not understood is an
error: a parameter that was silently ignored could be the one that asked for safety.

The other node of a volume is reached by a shorter kind:

    tls://HOST[:PORT]    TCP with TLS              unix:///PATH    a node on the same host

A receiver is a secondary with a name of its own, which the sender says when it connects:

    receiver+tls://HOST[:PORT]/NAME                receiver+unix:///NAME?socket=PATH
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import NoReturn, Protocol
from urllib.parse import SplitResult, quote, unquote_to_bytes, urlsplit

from bitmapd.errors import UsageError

DEFAULT_PORT = 10809  # of NBD
DEFAULT_PARTNER_PORT = 10820
DEFAULT_RECEIVER_PORT = 10830
MAX_STRING_BYTES = 4096  # of an export name, by the NBD protocol
# sun_path of Linux has 108 bytes, one of which ends the string.
MAX_SOCKET_PATH_BYTES = 107

_SCHEMES = {
    "nbd": (False, False),
    "nbds": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}
_BAD_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")
_NOT_PRINTABLE = re.compile("[\x00-\x20\x7f]")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})\Z")
_HINT = "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=/PATH, or nbds… for TLS"


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Either `socket_path` is set, or `host` is (an IPv6 address without brackets)."""

    tls: bool
    export: str = ""
    socket_path: str | None = None
    host: str | None = None
    port: int = DEFAULT_PORT
    tls_certificates: str | None = None
    tls_hostname: str | None = None

    def __str__(self) -> str:
        return format_uri(self)


def is_uri(text: str) -> bool:
    """Whether a target is an NBD URI rather than a path."""
    return text.partition("://")[0].lower() in _SCHEMES and "://" in text


def parse_uri(text: str) -> NbdUri:
    """Raises UsageError that names the URI and what is wrong with it."""

    def fail(reason: str, hint: str | None = _HINT) -> NoReturn:
        raise UsageError(f"bad NBD URI {text!r}: {reason}", hint)

    parts, port = _split(text, fail)
    kind = _SCHEMES.get(parts.scheme)
    if kind is None or not text[len(parts.scheme) :].startswith("://"):
        fail("it does not begin with nbd://, nbds://, nbd+unix:// or nbds+unix://")
    tls, unix = kind
    if "#" in text:
        fail("a fragment (#…) means nothing here", "write %23 for a #")
    if "@" in parts.netloc:
        fail("a user name means nothing here", "clients are known by their certificates")
    export = _decode(parts.path[1:], "the export name", fail)
    if len(export.encode()) > MAX_STRING_BYTES:
        fail(f"the export name is longer than {MAX_STRING_BYTES} bytes", None)
    values = _parameters(parts.query, tls, unix, fail)
    folder = values.get("tls-certificates")
    if folder is not None and not folder.startswith("/"):
        fail(f"tls-certificates={folder} is not an absolute path", None)
    if unix:
        if parts.netloc:
            fail(f"a unix socket has no host, but {parts.netloc!r} was given")
        return NbdUri(
            tls,
            export,
            socket_path=_socket_path(values.get("socket"), fail),
            tls_certificates=folder,
            tls_hostname=values.get("tls-hostname"),
        )
    return NbdUri(
        tls,
        export,
        host=_host(parts.hostname, fail),
        port=_port(port, fail),
        tls_certificates=folder,
        tls_hostname=values.get("tls-hostname"),
    )


def host_name(text: str) -> str:
    """The text, if it is a host name or an address; UsageError if it is not."""

    def fail(reason: str, hint: str | None = "write a host name or an address") -> NoReturn:
        raise UsageError(f"bad host name {text!r}: {reason}", hint)

    return _host(text, fail)


def format_uri(uri: NbdUri) -> str:
    """The URI that `parse_uri` reads as the same value."""
    scheme = "nbds" if uri.tls else "nbd"
    parameters = []
    if uri.socket_path is not None:
        scheme += "+unix"
        authority = ""
        parameters.append(f"socket={quote(uri.socket_path, safe='/')}")
    else:
        host = uri.host or ""
        authority = f"[{host}]" if ":" in host else host
        if uri.port != DEFAULT_PORT:
            authority += f":{uri.port}"
    for name, value in (
        ("tls-certificates", uri.tls_certificates),
        ("tls-hostname", uri.tls_hostname),
    ):
        if value is not None:
            parameters.append(f"{name}={quote(value, safe='/')}")
    query = "?" + "&".join(parameters) if parameters else ""
    return f"{scheme}://{authority}/{quote(uri.export, safe='/')}{query}"


@dataclass(frozen=True, slots=True)
class PartnerUri:
    """Either `socket_path` is set, or `host` is (an IPv6 address without brackets)."""

    host: str | None = None
    port: int = DEFAULT_PARTNER_PORT
    socket_path: str | None = None

    def __str__(self) -> str:
        if self.socket_path is not None:
            return f"unix://{quote(self.socket_path, safe='/')}"
        host = self.host or ""
        return f"tls://[{host}]:{self.port}" if ":" in host else f"tls://{host}:{self.port}"


def parse_partner_uri(text: str) -> PartnerUri:
    """Raises UsageError that names the URI and what is wrong with it."""

    def fail(reason: str, hint: str | None = None) -> NoReturn:
        hint = hint or "write tls://HOST[:PORT] or unix:///PATH"
        raise UsageError(f"bad partner URI {text!r}: {reason}", hint)

    parts, port = _split(text, fail)
    if parts.scheme not in ("tls", "unix") or not text[len(parts.scheme) :].startswith("://"):
        fail("it does not begin with tls:// or unix://")
    if "?" in text or "#" in text or "@" in parts.netloc:
        fail("it has parameters, a fragment or a user name")
    if parts.scheme == "unix":
        if parts.netloc:
            fail(f"a unix socket has no host, but {parts.netloc!r} was given")
        return PartnerUri(socket_path=_socket_path(_decode(parts.path, "the path", fail), fail))
    if parts.path not in ("", "/"):
        fail(f"{parts.path!r} means nothing here")
    return PartnerUri(_host(parts.hostname, fail), _port(port, fail, DEFAULT_PARTNER_PORT))


@dataclass(frozen=True, slots=True)
class ReceiverUri:
    """`peer` is how the receiver is reached, or where it listens; `name` is the receiver's."""

    name: str
    peer: PartnerUri

    def __str__(self) -> str:
        name, path = quote(self.name, safe=""), self.peer.socket_path
        if path is not None:
            return f"receiver+unix:///{name}?socket={quote(path, safe='/')}"
        return f"receiver+{self.peer}/{name}"


def is_remote(text: str) -> bool:
    """Whether a target is reached over a socket, rather than a device or file of this machine."""
    return is_uri(text) or is_receiver(text)


def is_receiver(text: str) -> bool:
    """Whether a target is a receiver; what is wrong with it else says `parse_receiver_uri`."""
    return text.lower().startswith("receiver+")


def parse_receiver_uri(text: str) -> ReceiverUri:
    """Raises UsageError that names the URI and what is wrong with it."""

    def fail(reason: str, hint: str | None = None) -> NoReturn:
        usual = "write receiver+tls://HOST[:PORT]/NAME or receiver+unix:///NAME?socket=/PATH"
        raise UsageError(f"bad receiver URI {text!r}: {reason}", hint or usual)

    parts, port = _split(text, fail)
    kinds = ("receiver+tls", "receiver+unix")
    if parts.scheme not in kinds or not text[len(parts.scheme) :].startswith("://"):
        fail("it does not begin with receiver+tls:// or receiver+unix://")
    if "#" in text or "@" in parts.netloc:
        fail("it has a fragment or a user name")
    name = _decode(parts.path[1:], "the name", fail)
    if not name:
        fail("the receiver's name is missing")
    unix = parts.scheme == "receiver+unix"
    values = _parameters(parts.query, False, unix, fail)
    if not unix:
        port = _port(port, fail, DEFAULT_RECEIVER_PORT)
        return ReceiverUri(name, PartnerUri(_host(parts.hostname, fail), port))
    if parts.netloc:
        fail(f"a unix socket has no host, but {parts.netloc!r} was given")
    return ReceiverUri(name, PartnerUri(socket_path=_socket_path(values.get("socket"), fail)))


class _Fail(Protocol):
    """Raises UsageError; without a hint, with that of the kind of text that is being read."""

    def __call__(self, reason: str, hint: str | None = ..., /) -> NoReturn: ...


def _split(text: str, fail: _Fail) -> tuple[SplitResult, int | None]:
    """The parts of the URI, none decoded yet, and the port if there is one."""
    if _NOT_PRINTABLE.search(text):
        fail("it contains a blank or a control character", "write %20 for a blank")
    if _BAD_ESCAPE.search(text):
        fail("a % is not followed by two hexadecimal digits", "write %25 for a percent sign")
    try:
        parts = urlsplit(text)
        return parts, parts.port
    except ValueError as error:
        fail(str(error).lower())


def _decode(raw: str, what: str, fail: _Fail) -> str:
    try:
        value = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        fail(f"{what} is not UTF-8", None)
    if "\0" in value:
        fail(f"{what} contains NUL", None)
    return value


def _parameters(query: str, tls: bool, unix: bool, fail: _Fail) -> dict[str, str]:
    known = (["socket"] if unix else []) + (["tls-certificates", "tls-hostname"] if tls else [])
    values: dict[str, str] = {}
    for item in query.split("&") if query else []:
        raw_name, equals, raw_value = item.partition("=")
        name = _decode(raw_name, "a parameter's name", fail)
        if name not in known:
            reason = f"parameter {name!r} is not known for this kind of URI"
            fail(reason, f"known: {', '.join(known)}" if known else None)
        if name in values:
            fail(f"parameter {name!r} is given twice", None)
        value = _decode(raw_value, f"the value of {name!r}", fail)
        if not equals or not value:
            fail(f"parameter {name!r} has no value", None)
        values[name] = value
    return values


def _socket_path(path: str | None, fail: _Fail) -> str:
    if path is None:
        fail("the parameter socket=PATH is missing")
    if not path.startswith("/"):
        fail(f"{path!r} is not an absolute path of a socket", None)
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        fail(f"the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes", None)
    return path


def _host(host: str | None, fail: _Fail) -> str:
    if not host:
        fail("the host is missing")
    if "%" in host:
        fail(f"{host!r}: an address with a zone, or an escape, is not supported", None)
    if ":" in host:
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            fail(f"{host!r} is not an IPv6 address", None)
    if not _HOST_NAME.match(host):
        fail(f"{host!r} is not a host name", None)
    return host


def _port(port: int | None, fail: _Fail, default: int = DEFAULT_PORT) -> int:
    if port == 0:
        fail("port 0 cannot be connected to", None)
    return default if port is None else port
