"""The messages of the kernel's NBD client in generic netlink, for pyroute2 (pure).

Source: <linux/nbd-netlink.h>.  Importing this costs a fifth of a second, so who needs it imports it
when it is needed.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from pyroute2.netlink import ctrlmsg, genlmsg, nla

FAMILY: Final = "nbd"
FAMILY_VERSION: Final = 1
GROUP: Final = "nbd_mc_group"

__all__ = ["FAMILY", "FAMILY_VERSION", "GROUP", "NbdCommand", "NbdMessage", "ctrlmsg"]


class NbdCommand(IntEnum):
    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class NbdMessage(genlmsg):  # type: ignore[misc]
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "devices"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]
        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "socket"))

        class socket(nla):  # type: ignore[misc]
            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class devices(nla):  # type: ignore[misc]
        nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "device"))

        class device(nla):  # type: ignore[misc]
            nla_map = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )
