"""Fixed-size structures of the NBD protocol, big-endian (pure)."""

from __future__ import annotations

import struct

GREETING = struct.Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")  # IHAVEOPT, option, length of data
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length of data
INFO_EXPORT = struct.Struct(">HQH")  # Info.EXPORT, size in bytes, transmission flags
INFO_BLOCK_SIZE = struct.Struct(">HIII")  # Info.BLOCK_SIZE, minimum, preferred, maximum
EXPORT_NAME_REPLY = struct.Struct(">QH")  # size in bytes, transmission flags; 124 zeros may follow
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, handle, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, handle
STRUCTURED_REPLY = struct.Struct(">IHHQI")  # magic, flags, type, handle, length of payload
OFFSET_DATA = struct.Struct(">Q")  # offset; data follow
OFFSET_HOLE = struct.Struct(">QI")  # offset, length of hole
BLOCK_DESCRIPTOR = struct.Struct(">II")  # length, flags; preceded by the context id
CONTEXT_ID = struct.Struct(">I")
ERROR_CHUNK = struct.Struct(">IH")  # error, length of message; message follows
ERROR_OFFSET_CHUNK_TAIL = struct.Struct(">Q")

REQUEST_BYTES = REQUEST.size
EXPORT_NAME_ZEROES = bytes(124)


class ProtocolError(Exception):
    """The peer broke the protocol; the connection is dropped.  The text is for the log."""
