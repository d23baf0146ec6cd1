"""How the other node of a volume is named."""

from __future__ import annotations

import pytest

from bitmapd.errors import UsageError
from bitmapd.net.uri import PartnerUri, host_name, parse_partner_uri


@pytest.mark.parametrize(
    ("text", "uri", "canonical"),
    [
        ("tls://node-b", PartnerUri("node-b"), "tls://node-b:10820"),
        ("tls://node-b/", PartnerUri("node-b"), "tls://node-b:10820"),
        ("tls://10.0.0.2:77", PartnerUri("10.0.0.2", 77), "tls://10.0.0.2:77"),
        ("tls://[::1]", PartnerUri("::1"), "tls://[::1]:10820"),
        ("unix:///run/a%20b", PartnerUri(socket_path="/run/a b"), "unix:///run/a%20b"),
    ],
)
def test_partner_uris(text: str, uri: PartnerUri, canonical: str) -> None:
    assert parse_partner_uri(text) == uri
    assert str(uri) == canonical
    assert parse_partner_uri(canonical) == uri


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("node-b", "does not begin with tls:// or unix://"),
        ("nbd://node-b", "does not begin with"),
        ("tls:node-b", "does not begin with"),
        ("tls://", "host is missing"),
        ("tls://a b", "blank"),
        ("tls://a%zz", "%"),
        ("tls://a:port", "port"),
        ("tls://a:0", "port 0"),
        ("tls://a:70000", "port"),
        ("tls://a/volume", "'/volume' means nothing"),
        ("tls://a?x=1", "parameters"),
        ("tls://a#x", "fragment"),
        ("tls://me@a", "user name"),
        ("tls://-a", "not a host name"),
        ("unix://host/run/x", "has no host"),
        ("unix://", "'' is not an absolute path"),
        ("unix:///" + "x" * 107, "at most 107 bytes"),
        ("unix:///a%00", "NUL"),
    ],
)
def test_what_is_not_understood_is_an_error(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_partner_uri(text)
    assert reason in caught.value.message
    assert repr(text) in caught.value.message
    assert caught.value.hint
    assert "nbd" not in caught.value.hint


def test_host_names() -> None:
    assert host_name("Node-A.example") == "Node-A.example"
    assert host_name("::1") == "::1"
    for text in ("", "../x", "a/b", "a,b", "-a"):
        with pytest.raises(UsageError, match="bad host name") as caught:
            host_name(text)
        assert "nbd" not in (caught.value.hint or "")
