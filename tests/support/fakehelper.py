"""A wiring helper without a kernel: `python -m tests.support.fakehelper --fd N`.

It reports every request to a datagram socket, whose path `hello` names, with its process number.
A request `hang` gets no answer.
"""

from __future__ import annotations

import argparse
import os
import socket

from bitmapd.attach.helper_frames import FrameReader, encode, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    sock = socket.socket(fileno=parser.parse_args().fd)
    report = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    reader = FrameReader()
    while data := sock.recv(1 << 16):
        for frame in reader.feed(data):
            if frame.verb == "hello":
                report.connect(frame.header["report"])
            report.send(f"{frame.verb} {os.getpid()}".encode())
            if frame.verb != "hang":
                sock.sendall(encode(result(frame.header["id"])))


if __name__ == "__main__":
    main()
