"""How long a host's requests wait while others flood the export with connections.

    python -m tests.bench.neighbours [--seconds 10]

A client over TLS reads 4 KiB every five milliseconds from a server whose key is of RSA-4096, alone
and then during each flood of `tests/support/floods.py`.  Times include the client's own; what the
flood adds is the difference.  Needs certtool.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from bitmapd.nbd.numbers import Opt
from bitmapd.net.tls import client_context
from tests.support.floods import flood
from tests.support.nbdcerts import make_certificates
from tests.support.nbdraw import RawClient, info_data
from tests.support.nbdserve import MIB, serve

INTERVAL_S = 0.005
FLOODS: tuple[tuple[str, str | None, float], ...] = (
    ("alone", None, 0),
    ("300 bare connects a second", "connect", 300),
    ("37 ClientHellos a second", "hello", 37),
    ("150 ClientHellos a second", "hello", 150),
)


def admitted(port: int, certificates: Path) -> RawClient:
    client = RawClient(port)
    client.greet()
    client.ask(Opt.STARTTLS)
    context = client_context(certificates / "good", "localhost")
    client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
    client.ask(Opt.GO, info_data(""))
    return client


def waits_ms(client: RawClient, seconds: float) -> list[float]:
    """Of requests at fixed times, each from the moment at which it was due."""
    begun_s, waits = time.monotonic(), []
    for number in range(int(seconds / INTERVAL_S)):
        due_s = begun_s + number * INTERVAL_S
        time.sleep(max(0.0, due_s - time.monotonic()))
        client.read(0, 4096)
        waits.append((time.monotonic() - due_s) * 1000)
    return sorted(waits)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    seconds = parser.parse_args().seconds
    heads = " ".join(f"{head:>8}" for head in ("median", "99 %", "longest", "> 1 ms"))
    print(f"{'a request waits, ms':28} {heads}  admission")
    with tempfile.TemporaryDirectory(prefix="nbd") as name:
        folder = Path(name)
        certificates = make_certificates(folder, "--key-type=rsa", "--bits=4096")
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(16 * MIB)
        with serve(image, "--quiet", "--tls", str(certificates / "good")) as server:
            if server.port is None:
                raise RuntimeError("the server has no port")
            for title, kind, rate in FLOODS:
                with admitted(server.port, certificates) as client:
                    one = nullcontext() if kind is None else flood(kind, server.port, rate=rate)
                    with one:
                        waits = waits_ms(client, seconds)
                        begun_s = time.monotonic()
                        try:
                            admitted(server.port, certificates).sock.close()
                            entered = f"{(time.monotonic() - begun_s) * 1000:.0f} ms"
                        except (OSError, EOFError) as error:
                            entered = f"failed: {error}"
                chosen = (waits[len(waits) // 2], waits[int(len(waits) * 0.99)], waits[-1])
                figures = " ".join(f"{wait:8.2f}" for wait in chosen)
                late = sum(wait > 1 for wait in waits) / len(waits)
                print(f"{title:28} {figures} {late:8.1%}  {entered}", flush=True)


if __name__ == "__main__":
    main()
