"""Which addresses images are fetched from, however they are written."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from yi_vl.server.addresses import is_public
from yi_vl.server.images import _resolve
from yi_vl.server.protocol import ApiError

PUBLIC = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
    "168.63.129.15", "168.63.129.17", "169.253.255.255", "172.15.255.255", "172.32.0.0", "191.255.255.255",
    "192.0.1.0", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "2606:4700::1111", "2a00::1",
    "2001:4860:4860::8888", "2003::1", "64:ff9b::808:808", "64:ff9b::8.8.8.8",
]  # fmt: skip
# Embedded IPv4 addresses of each kind, public ones too: what translates them is not ours to know.
EMBEDDED = [
    form.format(ipv4)
    for ipv4 in ("7f00:1", "a9fe:a9fe", "c0a8:101", "808:808")
    for form in ("::{}", "::ffff:{}", "::ffff:0:{}", "64:ff9b:1::{}", "2002:{}::", "2002:{}::1", "2001::{}")
]
PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
    "168.63.129.16", "169.254.0.23", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.1",
    "192.0.0.8", "192.0.0.9", "192.0.0.10", "192.0.0.170", "192.0.0.192", "192.0.0.255", "192.0.2.1", "192.31.196.1",
    "192.52.193.1", "192.88.99.1", "192.168.1.1", "192.175.48.1", "198.18.0.1", "198.19.255.255", "198.51.100.1",
    "203.0.113.1", "161.26.0.10", "166.8.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "100::1", "100:0:0:1::1", "5f00::1", "fc00::1", "fd00::1", "fd00:ec2::254", "fd20:ce::254",
    "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "2001:0:1::1", "2001:2::1", "2001:3::1", "2001:10::1",
    "2001:20::1", "2001:30::1", "2001:4:112::1", "2001:1::1", "2001:db8::1", "2620:4f:8000::1", "3ffe::1", "3fff::1",
    "2606:4700::1111%eth0", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::c000:c0", "64:ff9b::a83f:8110",
    "64:ff9b::192.168.0.1", "2002:a83f:8110::1", "2002:c000:c0::1", *EMBEDDED,
]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "public"), [*((address, True) for address in PUBLIC), *((address, False) for address in PRIVATE)]
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize(
    "host",
    [
        "2130706433", "0x7f000001", "017700000001", "127.1", "0x7f.0.0.1", "0177.0.0.1", "0", "0.0", "2852039166",
        "0xa9fea9fe", "168.63.33040", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]",
        "[fe80::1%25lo]", "１２７.0.0.1", "127。0。0。1", "127.0.0.1.", "LOCALHOST", "localhost.", "user@127.0.0.1", "",
    ],
)  # fmt: skip
def test_private_hosts_in_disguise_are_not_fetched_from(host: str) -> None:
    with pytest.raises((ApiError, httpx.InvalidURL, OSError, ValueError)):  # all are one kind of answer, 422
        found = asyncio.run(_resolve(httpx.URL(f"http://{host}/a.png"), "url"))
        pytest.fail(f"{host} leads to {found}")
