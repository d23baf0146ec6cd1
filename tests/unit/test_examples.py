"""Files that administrators copy are right, and man pages can be made and read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitmapd.config import (
    Paths,
    ReceiverConfig,
    VolumeConfig,
    has_receiver,
    is_keeper,
    keys,
    load_all,
    load_any,
)
from bitmapd.config.receiver import receiver_keys
from bitmapd.control import metrics
from bitmapd.control.catalogue import EVENTS
from bitmapd.control.states import STATES
from bitmapd.net.uri import parse_receiver_uri

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_example_configuration_is_one() -> None:
    configs = load_all(Paths(EXAMPLES, Path("/run/dmctl")))
    assert set(configs) == {"example"}
    assert configs["example"].resync_target_s is None
    assert configs["example"].record_limit_bytes == 4 << 30
    assert configs["example"].copy_rate_bytes_per_s == 200 << 20


@pytest.mark.parametrize("link", ["tls", "unix"])
def test_the_two_nodes_of_an_example_fit_together(link: str) -> None:
    folders = [EXAMPLES / "pair" / link / f"node{number}" for number in (1, 2)]
    one, two = (load_all(Paths(folder, Path("/run/dmctl")))["db"] for folder in folders)
    assert (one.node, two.node) == (1, 2)
    assert (one.partner, one.partner_listen) == (two.partner_listen, two.partner)
    for key in ("primary", "secondary", "extent_size_bytes", "block_size_bytes"):
        assert getattr(one, key) == getattr(two, key)
    assert one.record != two.record


def test_a_node_and_its_keeper_in_the_examples_fit_together() -> None:
    folders = [EXAMPLES / "keeper" / name for name in ("node1", "keeper")]
    one, keeper = (load_all(Paths(folder, Path("/run/dmctl")))["db"] for folder in folders)
    assert (one.node, keeper.node, one.partner_role) == (1, 2, "pair")
    assert is_keeper(keeper)
    assert (one.partner, one.partner_listen) == (keeper.partner_listen, keeper.partner)
    for key in ("extent_size_bytes", "block_size_bytes"):
        assert getattr(one, key) == getattr(keeper, key)


def test_the_two_sites_of_the_example_fit_together() -> None:
    near, far = (
        load_any(Paths(EXAMPLES / "sites" / name, Path("/run/dmctl")), "db")
        for name in ("near", "far")
    )
    assert isinstance(near, VolumeConfig)
    assert isinstance(far, ReceiverConfig)
    assert has_receiver(near)
    sent_to, received = parse_receiver_uri(near.secondary), parse_receiver_uri(far.listen)
    assert (sent_to.name, sent_to.peer.port) == (received.name, received.peer.port)
    assert far.sender_name == "near.example.org"
    assert sent_to.peer.host == "far.example.org"


def test_the_two_nodes_that_fence_by_scsi_take_off_one_another_s_key() -> None:
    folders = [EXAMPLES / "fencing/scsi" / f"node{number}" for number in (1, 2)]
    one, two = (load_all(Paths(folder, Path("/run/dmctl")))["db"] for folder in folders)
    keys_of_others = [dict(config.fence_options)["key"] for config in (one, two)]
    for folder, config, key in zip(folders, (one, two), reversed(keys_of_others), strict=True):
        unfence = (folder / "unfence.conf").read_text()
        assert f"--key={key} " in unfence
        devices = dict(config.fence_options)["devices"]
        assert f"--devices={devices}\n" in unfence
        assert devices == f"{config.primary},{config.secondary}"
        assert (config.takeover, config.fence_aborts_io) == ("auto", True)


def test_scripts_are_ones_that_shellcheck_accepts() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("SHELLCHECK IS NOT INSTALLED: THE SCRIPTS WERE NOT LOOKED AT")
    scripts = [EXAMPLES / "fencing/fence-by-ssh", EXAMPLES / "ocf/dmctl-fence-pacemaker"]
    subprocess.run([program, *scripts], check=True, timeout=60)


def test_the_units_are_accepted_by_systemd(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed: the units were not looked at")
    units = []
    for name in ("bitmapd@.service", "dmctl-resync.service", "dmctl-resync.timer"):
        text = (EXAMPLES / name).read_text()
        for installed in ("/usr/local/bin/bitmapd", "/usr/local/bin/dmctl"):
            text = text.replace(installed, "/bin/true")  # whether it is installed is not the matter
        units.append(tmp_path / name.replace("@", "@vol0"))
        units[-1].write_text(text)
    command = [program, "verify", "--man=no", *map(str, units)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    said = [line for line in answer.stderr.splitlines() if str(tmp_path) in line]
    assert (answer.returncode, said) == (0, [])


def known_metrics() -> set[str]:
    there = {f"bitmapd_{key}" for key in (*metrics.GAUGES, *metrics.COUNTERS)}
    there |= {f"bitmapd_partner_{key.removeprefix('partner_')}" for key in metrics.PARTNER_GAUGES}
    there |= {f"bitmapd_partner_{key}" for key in metrics.PARTNER_COUNTERS}
    there |= {f"bitmapd_{name}" for name, _ in metrics.POINT_GAUGES.values()}
    there |= {f"bitmapd_{name}_total" for name, _ in metrics.POINT_COUNTERS.values()}
    there |= {f"bitmapd_receiver_{key}" for key in metrics.RECEIVER_GAUGES}
    there |= {"bitmapd_state", "bitmapd_point_void_total"}
    return there | {"bitmapd_partner_up", "bitmapd_receiver_up"}


def promtool(*words: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool IS NOT INSTALLED (package prometheus): RULES WERE NOT CHECKED")
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alert_rules_are_about_metrics_and_states_that_there_are() -> None:
    text = (EXAMPLES / "alerts.yml").read_text()
    expressions = "\n".join(line for line in text.splitlines() if "expr:" in line)
    assert set(re.findall(r"bitmapd_\w+", expressions)) <= known_metrics()
    assert set(re.findall(r'state="([^"]+)"', expressions)) <= set(STATES)


def test_the_alert_rules_are_raised_when_they_should_be(tmp_path: Path) -> None:
    promtool("check", "rules", EXAMPLES / "alerts.yml")
    for path in (EXAMPLES / "alerts.yml", ROOT / "tests/data/alerts.test.yml"):
        shutil.copy(path, tmp_path)
    promtool("test", "rules", tmp_path / "alerts.test.yml")


def panels() -> list[dict[str, Any]]:
    found = json.loads((EXAMPLES / "grafana/bitmapd.json").read_text())["panels"]
    return [dict(panel) for panel in found]


def test_no_panel_of_the_dashboard_lies_upon_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))


def test_the_dashboard_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    asked = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    assert asked
    for expression in asked:
        assert set(re.findall(r"bitmapd_\w+", expression)) <= known_metrics()
    # As rules, so that promtool reads them; $volume is within a string already.
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(asked)
    ]
    path = tmp_path / "dashboard.yml"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)


def test_cron_lines_have_their_fields() -> None:
    lines = (EXAMPLES / "dmctl-resync.cron").read_text().splitlines()
    jobs = [line for line in lines if line and line[0] in "*0123456789"]
    assert len(jobs) == 2
    for job in jobs:
        assert job.split()[5] == "root"
        assert "%" not in job  # cron would end the command there
        subprocess.run(["sh", "-n", "-c", job.split("root", 1)[1]], check=True)


def test_man_pages(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs/make_man.py", tmp_path], check=True, timeout=60)
    program = (tmp_path / "dmctl.8").read_text()
    for word in ("resync", "EXIT STATUS", "22 record of another volume", "14 demoted, stopped"):
        assert word in program
    config = (tmp_path / "dmctl.toml.5").read_text()
    of_volumes, _, of_receivers = config.partition(".SH KEYS OF RECEIVERS\n")
    for page, its_keys in ((of_volumes, keys()), (of_receivers, receiver_keys())):
        assert {key.name for key in its_keys.values()} == set(
            re.findall(r"^\.B (\w+)$", page, re.M)
        )
    events = (tmp_path / "dmctl-events.7").read_text()
    assert all(f".B {name}".replace("-", "\\-") in events for name in EVENTS)
    man = shutil.which("man")
    if man is None:
        pytest.skip("man is not installed: the pages were made, and not formatted")
    for page in tmp_path.iterdir():
        shown = subprocess.run(
            [man, "--warnings", "-l", page], capture_output=True, check=True, timeout=60
        )
        assert len(shown.stdout) > 1000
