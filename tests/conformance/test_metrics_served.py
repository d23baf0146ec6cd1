"""The metrics that the alert rules and the dashboard of `examples` name are served by processes.

Real ones: a volume, its receiver, and two appliances.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pairs import Pair
from tests.support.scrape import scrape
from tests.support.sites import Sites
from tests.support.volumes import MIB

pytestmark = pytest.mark.timeout(180)
EXAMPLES = Path(__file__).parents[2] / "examples"
AT_THE_SENDER = "bitmapd_receiver_in_place"  # the receiver says until when


@pytest.fixture
def sites(short_path: Path) -> Iterator[Sites]:
    near, far = (("--metrics-listen", f"unix:{short_path}/{name}.m") for name in ("near", "far"))
    with Sites(short_path, 8 * MIB, near_options=near, far_options=far) as made:
        made.create()
        made.start()
        yield made


@pytest.fixture
def pair(short_path: Path) -> Iterator[Pair]:
    with Pair(short_path, 8 * MIB) as made:
        for number, node in made.nodes.items():
            node.options += ["--metrics-listen", f"unix:{short_path}/{number}.m"]
        made.create()
        made.start()
        made[1].until(lambda status: status["partner"]["rtt_seconds"] is not None)
        yield made


def asked() -> dict[str, set[str]]:
    """What the series of one process have to tell: each expression, or each side of its `or`, with
    the metrics in it."""
    rules = (EXAMPLES / "alerts.yml").read_text()
    expressions = re.findall(r"expr: (.+)", rules)
    panels = json.loads((EXAMPLES / "grafana/bitmapd.json").read_text())["panels"]
    expressions += [target["expr"] for panel in panels for target in panel.get("targets", ())]
    parts = [part for expression in expressions for part in expression.split(" or ")]
    named = {part: set(re.findall(r"bitmapd_\w+", part)) for part in parts}
    assert all(named.values())
    return named


def test_each_metric_that_the_examples_name_is_served(sites: Sites, pair: Pair) -> None:
    served = {name: scrape(sites.folder / f"{name}.m") for name in ("near", "far", "1", "2")}
    dead = {
        part: names
        for part, names in asked().items()
        if not any(names <= set(metrics) for metrics in served.values())
    }
    assert dead == {}
    of_receivers = {
        name for names in asked().values() for name in names if name.startswith("bitmapd_receiver_")
    }
    assert len(of_receivers) == 8
    assert of_receivers - {AT_THE_SENDER} <= set(served["far"])
    limit_bytes = sites.far.status()["receiver"]["journal_limit_bytes"]
    assert served["far"]["bitmapd_receiver_journal_limit_bytes"] == limit_bytes > 0
    assert served["far"]["bitmapd_receiver_in_place_until"] == 0
    assert served["far"]["bitmapd_receiver_up"] == served["near"]["bitmapd_receiver_up"] == 1


def test_metrics_are_served_at_the_same_places_when_the_sites_change_theirs(sites: Sites) -> None:
    sites.near.dmctl("switchover", "vol0", "--journal", str(sites.near_journal))
    sites.far.dmctl("wait", "vol0", "--for", "started", "--timeout", "60s")  # it began anew
    near, far = (scrape(sites.folder / f"{name}.m") for name in ("near", "far"))
    assert "bitmapd_receiver_journal_bytes" in near
    assert "bitmapd_point_number" in far
    assert "bitmapd_receiver_journal_bytes" not in far
    assert "bitmapd_point_number" not in near
