"""Which IP addresses belong to the public internet: a table of our own.

Python's `ipaddress.is_global` differs between Python versions, and takes addresses that only a cloud's own machines
reach (metadata and wire servers) for public ones.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address

# IANA's IPv4 special-purpose registry, multicast, and what clouds serve to their own machines at public addresses.
_DENIED_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers; Alibaba's metadata at 100.100.100.200
        "127.0.0.0/8",  # loopback
        "161.26.0.0/16",  # IBM Cloud's own services
        "166.8.0.0/14",  # IBM Cloud's own services
        "168.63.129.16/32",  # Azure's wire server
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata at 192.0.0.192
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved; broadcast
    )
)
_PUBLIC_IPV6 = IPv6Network("2000::/3")  # everything else is local, multicast, reserved, or an IPv4 address in disguise
_DENIED_IPV6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "2620:4f:8000::/48",  # AS112
        "3ffe::/16",  # the former 6bone
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")  # what DNS64 makes of IPv4 addresses where a network has no IPv4


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet.

    Of IPv6 addresses that hold an IPv4 address only NAT64's well-known prefix is let through, and only with a public
    one in it. An address with a zone (`%eth0`) is of a local link.
    """
    ip = ip_address(address)
    if ip.version == 6:
        if "%" in address:
            return False
        if ip not in _NAT64:
            return ip in _PUBLIC_IPV6 and not any(ip in network for network in _DENIED_IPV6)
        ip = IPv4Address(int(ip) & 0xFFFFFFFF)
    return not any(ip in network for network in _DENIED_IPV4)
