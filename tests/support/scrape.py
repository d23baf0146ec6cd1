"""What Prometheus reads at a process: its metrics over a unix socket."""

from __future__ import annotations

import socket
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

WAIT_S = 60


def scrape(path: Path) -> dict[str, float]:
    """Metric -> value; of one with more labels than the volume the last."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(WAIT_S)
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    head, _, text = answer.partition("\r\n\r\n")
    assert " 200 " in head, head
    samples = [it for family in text_string_to_metric_families(text) for it in family.samples]
    assert {it.labels["volume"] for it in samples} == {"vol0"}
    return {it.name: it.value for it in samples}
