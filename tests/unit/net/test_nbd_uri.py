"""NBD URIs: what is read, what is refused and why, and that both directions agree."""

from __future__ import annotations

import ipaddress
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import UsageError
from bitmapd.net.uri import NbdUri, format_uri, is_uri, parse_uri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://host/disk", NbdUri(False, "disk", host="host")),
        ("NBD://HOST", NbdUri(False, "", host="host")),
        ("nbd://host/", NbdUri(False, "", host="host")),
        ("nbd://host//disk", NbdUri(False, "/disk", host="host")),
        ("nbd://host/hello%20w%C3%B6rld+1", NbdUri(False, "hello wörld+1", host="host")),
        ("nbd://10.0.0.1:2000/x", NbdUri(False, "x", host="10.0.0.1", port=2000)),
        ("nbds://[FE80::0:1]:65535/", NbdUri(True, "", host="fe80::1", port=65535)),
        ("nbd+unix:///?socket=/s", NbdUri(False, "", socket_path="/s")),
        ("nbd+unix://?socket=/s", NbdUri(False, "", socket_path="/s")),
        ("nbd+unix:///v?socket=/a%20b+c", NbdUri(False, "v", socket_path="/a b+c")),
        (
            "nbds://h/v?tls-certificates=/etc/pki&tls-hostname=other",
            NbdUri(True, "v", host="h", tls_certificates="/etc/pki", tls_hostname="other"),
        ),
        (
            "nbds+unix:///v?tls-hostname=n&socket=/s&tls-certificates=/c",
            NbdUri(True, "v", socket_path="/s", tls_certificates="/c", tls_hostname="n"),
        ),
    ],
)
def test_read(text: str, uri: NbdUri) -> None:
    assert parse_uri(text) == uri
    assert is_uri(text)
    assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not begin"),
        ("/dev/sda", "does not begin"),
        ("http://host/x", "does not begin"),
        ("nbd:host", "does not begin"),
        ("nbd:///x", "host is missing"),
        ("nbd://:10809/x", "host is missing"),
        ("nbd://ho%20st/x", "escape"),
        ("nbd://-host/x", "not a host name"),
        ("nbd://host:0/", "port 0"),
        ("nbd://host:65536/", "port"),
        ("nbd://host:abc/", "port"),
        ("nbd://[::1/", "ipv6"),
        ("nbd://[fe80::1%25eth0]/", "zone"),
        ("nbd://[::1::]/", "(?i)ipv6 address"),
        ("nbd://[v1.a:b]/", "not an IPv6 address"),
        ("nbd://user@host/", "user name"),
        ("nbd://host/x#y", "fragment"),
        ("nbd://host/x#", "fragment"),
        ("nbd://host/a b", "blank"),
        ("nbd://host/a\nb", "control character"),
        ("nbd://host/%zz", "hexadecimal"),
        ("nbd://host/%ff", "export name is not UTF-8"),
        ("nbd://host/%00", "export name contains NUL"),
        ("nbd://host/" + "n" * 4097, "longer than 4096"),
        ("nbd://host/?socket=/s", "'socket' is not known"),
        ("nbd://host/?tls-certificates=/c", "'tls-certificates' is not known"),
        ("nbds://host/?tls-verify-peer=0", "'tls-verify-peer' is not known"),
        ("nbds://host/?tls-certificates=c", "not an absolute path"),
        ("nbds://host/?tls-hostname", "no value"),
        ("nbds://host/?tls-hostname=", "no value"),
        ("nbds://host/?tls-hostname=a&tls-hostname=b", "twice"),
        ("nbd+unix:///v", "socket=PATH is missing"),
        ("nbd+unix:///v?socket=s", "not an absolute path"),
        ("nbd+unix:///v?socket=%00/abstract", "contains NUL"),
        ("nbd+unix:///v?socket=/" + "s" * 107, "at most 107 bytes"),
        ("nbd+unix://host/v?socket=/s", "has no host"),
        ("nbd+unix:///v?socket=/s&", "'' is not known"),
        ("nbd+unix:///v?%ff=/s", "not UTF-8"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        parse_uri(text)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize("text", ["/dev/nbd0", "nbd", "nbd:x", "file://x", "disk.img", "://"])
def test_paths_are_not_uris(text: str) -> None:
    assert not is_uri(text)


_names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
_paths = _names.map(lambda name: "/" + name).filter(lambda path: len(path.encode()) <= 107)
_hosts = (
    st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=20)
    | st.ip_addresses(v=4).map(str)
    | st.ip_addresses(v=6)
    .filter(lambda address: address.scope_id is None)  # type: ignore[union-attr]
    .map(lambda address: str(ipaddress.IPv6Address(int(address))))
)
_tls = {
    "tls": st.just(True),
    "tls_certificates": st.none() | _paths,
    "tls_hostname": st.none() | _names.filter(bool),
}
_uris = st.one_of(
    st.builds(NbdUri, tls=st.just(False), export=_names, socket_path=_paths),
    st.builds(NbdUri, export=_names, socket_path=_paths, **_tls),
    st.builds(NbdUri, tls=st.just(False), export=_names, host=_hosts, port=st.integers(1, 65535)),
    st.builds(NbdUri, export=_names, host=_hosts, port=st.integers(1, 65535), **_tls),
)


@given(_uris)
def test_round_trip(uri: NbdUri) -> None:
    assert parse_uri(format_uri(uri)) == uri


@given(
    st.text(max_size=40)
    | st.tuples(
        st.sampled_from(["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"]),
        st.text("abc:/?#[]@%&=+0123456789 .socketls-\x00é", max_size=40),
    ).map("".join)
)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        uri = parse_uri(text)
    except UsageError:
        return
    assert (uri.socket_path is None) != (uri.host is None)
    assert parse_uri(format_uri(uri)) == uri
