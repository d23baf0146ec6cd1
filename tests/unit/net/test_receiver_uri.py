"""How the receiver of consistent points is named, by the sender and where it listens."""

from __future__ import annotations

import pytest

from bitmapd.errors import UsageError
from bitmapd.net.uri import PartnerUri, ReceiverUri, is_receiver, parse_receiver_uri

UNIX = PartnerUri(socket_path="/run/a b")


@pytest.mark.parametrize(
    ("text", "uri", "canonical"),
    [
        (
            "receiver+tls://far/db",
            ReceiverUri("db", PartnerUri("far", 10830)),
            "receiver+tls://far:10830/db",
        ),
        (
            "RECEIVER+TLS://10.0.0.2:77/db%2B1",
            ReceiverUri("db+1", PartnerUri("10.0.0.2", 77)),
            "receiver+tls://10.0.0.2:77/db%2B1",
        ),
        (
            "receiver+tls://[::1]/a",
            ReceiverUri("a", PartnerUri("::1", 10830)),
            "receiver+tls://[::1]:10830/a",
        ),
        (
            "receiver+unix:///db?socket=/run/a%20b",
            ReceiverUri("db", UNIX),
            "receiver+unix:///db?socket=/run/a%20b",
        ),
    ],
)
def test_receiver_uris(text: str, uri: ReceiverUri, canonical: str) -> None:
    assert is_receiver(text)
    assert parse_receiver_uri(text) == uri
    assert str(uri) == canonical
    assert parse_receiver_uri(canonical) == uri


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("receiver+tcp://far/db", "does not begin with receiver+tls:// or receiver+unix://"),
        ("receiver+tls:far/db", "does not begin with"),
        ("tls://far/db", "does not begin with"),
        ("receiver+tls://far", "name is missing"),
        ("receiver+tls://far/", "name is missing"),
        ("receiver+tls:///db", "host is missing"),
        ("receiver+tls://far:0/db", "port 0"),
        ("receiver+tls://far/db?socket=/x", "'socket' is not known"),
        ("receiver+tls://far/db#x", "fragment"),
        ("receiver+tls://me@far/db", "user name"),
        ("receiver+unix:///db", "socket=PATH is missing"),
        ("receiver+unix:///db?socket=x", "not an absolute path"),
        ("receiver+unix:///db?socket=/x&socket=/y", "given twice"),
        ("receiver+unix://host/db?socket=/x", "has no host"),
        ("receiver+unix:///?socket=/x", "name is missing"),
    ],
)
def test_what_is_not_understood_is_an_error(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_receiver_uri(text)
    assert reason in caught.value.message
    assert repr(text) in caught.value.message


def test_other_targets_are_no_receivers() -> None:
    for text in ("nbd://far/db", "/dev/receiver+tls", "tls://far"):
        assert not is_receiver(text)
