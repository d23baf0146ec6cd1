"""Two nodes of corosync and Pacemaker on one machine, each in namespaces of its own.

A node has its own network, processes, host name and mounts: what the daemons keep lies on RAM
disks, and all else is shared with the machine, as are the media.  Each has two network cards:
`ring` for the cluster, `side` for the appliances.  They end at a switch, a namespace of its own, so
that a card goes on when the other node has no power.  Power off is SIGKILL for the first process of
a node, which ends all others with it.  That is what the fence agent of these clusters asks for: it
reaches the outside over a socket, as a real one reaches a BMC.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.needs import lacks, need
from tests.support.pairs import Pair
from tests.support.volumes import DMCTL, CommandFailed

AGENT = Path(__file__).parents[2] / "examples/ocf/volume"
FENCE = AGENT.with_name("dmctl-fence-pacemaker")
PROGRAMS = ("corosync", "pacemakerd", "crm_resource", "crm_attribute", "cibadmin", "unshare")
WAIT_S = 180.0  # a dozen actions of the agent, one after the other, on a machine that is busy
_NETWORKS = {"ring": 77, "side": 78}
POLL_S = 0.5  # each look starts two programs
MONITORED_S = 8.0  # both intervals of the volume's monitors, and what a monitor takes

_COROSYNC = """
totem {
    version: 2
    cluster_name: test
    transport: udpu
    token: 5000
}
nodelist {
    node {
        ring0_addr: 10.77.0.1
        nodeid: 1
        name: node1
    }
    node {
        ring0_addr: 10.77.0.2
        nodeid: 2
        name: node2
    }
}
quorum {
    provider: corosync_votequorum
    two_node: 1
    wait_for_all: 0
}
logging {
    to_stderr: yes
    to_syslog: no
}
system {
    sched_rr: no
    move_to_root_cgroup: no
}
"""

# The first process of a node.  Mounts over a folder keep what was there visible in `under`.
_NODE = r"""
set -eu
n=$1 d=$2
mount --make-rprivate /
# What other tests have mounted would stay mounted here when they unmount it, and their file systems
# and loop devices in use.
findmnt -rno TARGET | grep "^${TMPDIR:-/tmp}/" | tac | while read -r place; do
    umount -l "$place" || :
done
add() { # FOLDER: what is in it, and room for more
    mkdir -p "$d/under$n$1"
    mount --bind "$1" "$d/under$n$1"
    mount -t tmpfs tmpfs "$1"
    ln -s "$d/under$n$1"/* "$1/"
}
add /usr/sbin
add /usr/lib/ocf/resource.d
mkdir /usr/lib/ocf/resource.d/dmctl
ln -s "$3" /usr/lib/ocf/resource.d/dmctl/volume
cp "$d/fence_test" /usr/sbin/
for folder in /run /dev/shm /var/log /var/lib/corosync /var/lib/pacemaker; do
    mount -t tmpfs tmpfs $folder
done
mkdir -p /run/crm /run/resource-agents /run/lock /var/log/pacemaker
for folder in blackbox cib cores pengine; do mkdir /var/lib/pacemaker/$folder; done
cp "$d/cib.xml" /var/lib/pacemaker/cib/
chmod 600 /var/lib/pacemaker/cib/cib.xml
chown -R hacluster:haclient /var/lib/pacemaker /var/log/pacemaker /run/crm
mount --bind "$d/corosync.conf" /etc/corosync/corosync.conf
mount --bind "$d/n$n/etc" "$d/etc"
mount --bind "$d/n$n/run" "$d/run"
hostname "node$n"
ip link set lo up
echo made
read -r _ # the network cards are there
corosync -f >"$d/corosync$n.log" 2>&1 &
until corosync-quorumtool -s >/dev/null 2>&1; do read -rt 0.1 _ || :; done
export PCMK_logfile="$d/pacemaker$n.log" PCMK_logfacility=none
touch "$PCMK_logfile"
chown hacluster:haclient "$PCMK_logfile"
pacemakerd -f >/dev/null 2>&1 &
wait
"""

_FENCE = """#!/usr/bin/python3
import socket, sys
words = dict(line.strip().split("=", 1) for line in sys.stdin if "=" in line)
action = words.get("action", words.get("option", "reboot"))
if action == "metadata" or sys.argv[1:] == ["-o", "metadata"]:
    print('<?xml version="1.0"?><resource-agent name="fence_test"><longdesc>for tests</longdesc>'
          '<parameters><parameter name="plug" required="0"><content type="string"/></parameter>'
          '</parameters><actions>' + "".join(f'<action name="{name}"/>' for name in
          ("on", "off", "reboot", "status", "monitor", "list", "metadata"))
          + '</actions></resource-agent>')
elif action in ("off", "reboot"):
    with socket.socket(socket.AF_UNIX) as bmc:
        bmc.connect("%s")
        bmc.sendall(words["plug"].encode())
        bmc.shutdown(socket.SHUT_WR)
        sys.exit(bmc.recv(9) != b"off")
"""

_CIB = """{head}<configuration>
<crm_config><cluster_property_set id="options">{options}</cluster_property_set></crm_config>
<nodes/>
<resources>
<primitive id="fence" class="stonith" type="fence_test"><instance_attributes id="fence-i">
<nvpair id="fence-hosts" name="pcmk_host_list" value="node1 node2"/>
</instance_attributes></primitive>
<clone id="vol0-clone"><meta_attributes id="vol0-m">
<nvpair id="vol0-m1" name="promotable" value="true"/>
<nvpair id="vol0-m2" name="promoted-max" value="{promoted}"/>
<nvpair id="vol0-m3" name="notify" value="true"/>
<nvpair id="vol0-m4" name="interleave" value="true"/></meta_attributes>
<primitive id="vol0" class="ocf" provider="dmctl" type="volume">
<instance_attributes id="vol0-i">{parameters}</instance_attributes>
<operations>
<op id="o1" name="monitor" interval="2s" timeout="20s" role="Promoted"/>
<op id="o2" name="monitor" interval="3s" timeout="20s" role="Unpromoted"/>
<op id="o3" name="start" interval="0" timeout="60s"/>
<op id="o4" name="stop" interval="0" timeout="90s"/>
<op id="o5" name="promote" interval="0" timeout="120s"/>
<op id="o6" name="demote" interval="0" timeout="60s"/>
<op id="o7" name="notify" interval="0" timeout="30s"/></operations></primitive></clone>
{address}
</resources>
<constraints>{constraints}</constraints>
</configuration><status/></cib>
"""
_ADDRESS = """<primitive id="ip" class="ocf" provider="heartbeat" type="IPaddr2">
<instance_attributes id="ip-i"><nvpair id="ip-1" name="ip" value="10.77.0.9"/>
<nvpair id="ip-2" name="cidr_netmask" value="24"/></instance_attributes></primitive>"""
_CONSTRAINTS = """<rsc_colocation id="c1" rsc="ip" with-rsc="vol0-clone" with-rsc-role="Promoted"
 score="INFINITY"/><rsc_order id="c2" first="vol0-clone" first-action="promote" then="ip"
 then-action="start"/>"""


def _pairs(prefix: str, values: dict[str, str]) -> str:
    return "".join(
        f'<nvpair id="{prefix}-{key}" name="{key}" value="{value}"/>'
        for key, value in values.items()
    )


@dataclass(slots=True)
class _Node:
    process: subprocess.Popen[str]  # of unshare
    pid: int  # of the first process inside


class Cluster:
    """`promoted_max` 1 has an address that moves along, 10.77.0.9."""

    def __init__(self, folder: Path, promoted_max: int = 1) -> None:
        need(*PROGRAMS)
        if os.geteuid():
            lacks("root, for namespaces")
        self.folder = folder
        self.fenced: list[str] = []
        self._nodes: dict[int, _Node] = {}
        self._write_files(promoted_max)
        self._make_volume()
        self._switch = self._make_switch()
        self._lock = threading.Lock()
        self._bmc = socket.socket(socket.AF_UNIX)
        self._bmc.bind(str(folder / "bmc"))
        self._bmc.listen()
        threading.Thread(target=self._serve_bmc, daemon=True).start()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._bmc.close()
        for number in (1, 2):
            self.power_off(number)
        self._switch.communicate()

    # -- what it is made of -------------------------------------------------------------------
    def _make_volume(self) -> None:
        options = ["--serve", "on-promote", "--partner-wait", "3s"]
        options += ["--fence-command", str(FENCE), "--takeover", "auto"]
        self.pair = Pair(self.folder, 64 << 20, *options)
        self.pair[1].dmctl("partner-keys", str(self.folder / "keys"), "--names", "node1,node2")
        for number in (1, 2):
            node, other = self.pair[number], 3 - number
            said = node.options
            said[said.index("--partner") + 1] = f"tls://10.78.0.{other}"
            said[said.index("--partner-listen") + 1] = f"tls://10.78.0.{number}"
            said += ["--partner-certificates", str(self.folder / "keys" / f"node{number}")]
            said += ["--partner-name", f"node{other}"]
            (node.folder / "run").mkdir()
        self.pair.create()

    def _write_files(self, promoted_max: int) -> None:
        folder = self.folder
        folder.chmod(0o755)  # the cluster's daemons log there as a user of their own
        for name in ("etc", "run"):
            (folder / name).mkdir()
        (folder / "corosync.conf").write_text(_COROSYNC)
        (folder / "node.sh").write_text(_NODE)
        (folder / "fence_test").write_text(_FENCE % (folder / "bmc"))
        (folder / "fence_test").chmod(0o755)
        options = {"stonith-enabled": "true", "dc-deadtime": "2s", "stonith-timeout": "30s"}
        parameters = {
            "volume": "vol0",
            "dmctl": str(DMCTL),
            "config_dir": str(folder / "etc"),
            "run_dir": str(folder / "run"),
        }
        moves = promoted_max == 1
        empty = _run("cibadmin", "--empty")  # its first tag says what this Pacemaker understands
        cib = _CIB.format(
            head=empty[: empty.index(">") + 1],
            options=_pairs("option", options),
            parameters=_pairs("vol0", parameters),
            promoted=promoted_max,
            address=_ADDRESS if moves else "",
            constraints=_CONSTRAINTS if moves else "",
        )
        (folder / "cib.xml").write_text(cib)

    def _make_switch(self) -> subprocess.Popen[str]:
        words = [f"ip link add name {card} up type bridge" for card in _NETWORKS]
        script = " && ".join([*words, "echo made", "exec cat"])  # cat ends with this process
        switch = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if switch.stdout is None or switch.stdout.readline() != "made\n":
            switch.kill()
            lacks("network namespaces and bridges")
        return switch

    # -- power --------------------------------------------------------------------------------
    def power_on(self, *numbers: int) -> None:
        """Begin to start nodes; of two, both together."""
        for number in numbers:
            log = (self.folder / f"node{number}.log").open("a")
            process = subprocess.Popen(
                ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork",
                 "--kill-child", "--mount-proc", "bash", str(self.folder / "node.sh"), str(number),
                 str(self.folder), str(AGENT)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
            log.close()
            if process.stdout is None or process.stdout.readline() != "made\n":
                process.kill()
                lacks("namespaces and mounts, as in a container that may have its own")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            self._nodes[number] = _Node(process, int(children.split()[0]))
            for card in _NETWORKS:
                self._connect(number, card)
        for number in numbers:
            stdin = self._nodes[number].process.stdin
            if stdin is not None:
                stdin.write("\n")
                stdin.flush()

    def power_off(self, number: int) -> None:
        """Every process of the node is gone when this returns."""
        with self._lock:
            node = self._nodes.pop(number, None)
            if node is None:
                return
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(node.pid, 9)
            node.process.wait()
            for stream in (node.process.stdin, node.process.stdout):
                if stream is not None:
                    stream.close()
            (self.pair[number].folder / "run" / "vol0.pid").unlink(missing_ok=True)

    def _serve_bmc(self) -> None:
        while True:
            try:
                client, _ = self._bmc.accept()
            except OSError:
                return
            with client:
                name = client.recv(64).decode()
                self.fenced.append(name)
                self.power_off(int(name.removeprefix("node")))
                client.sendall(b"off")

    # -- what can be seen and done --------------------------------------------------------------
    def fenced_since(self, before: list[str]) -> set[int]:
        """Nodes that were fenced, however often, since `fenced` was this."""
        return {int(name.removeprefix("node")) for name in self.fenced[len(before) :]}

    def run(self, number: int, *words: str, check: bool = True) -> str:
        """A command at a node."""
        pid = str(self._nodes[number].pid)
        return _run("nsenter", "-t", pid, "-m", "-u", "-i", "-n", "-p", *words, check=check)

    def _connect(self, number: int, card: str) -> None:
        """A node that comes up to the switch."""
        port = f"{card}{number}"
        switch = ("nsenter", "-t", str(self._switch.pid), "-n", "ip", "link")
        # The kernel takes the port of a node that has died away some time after it.
        _run(*switch, "del", port, check=False)
        _run(*switch, "add", "name", port, "up", "master", card, "type", "veth",
             "peer", "name", card, "netns", str(self._nodes[number].pid))  # fmt: skip
        self._plug_in(number, card)

    def _plug_in(self, number: int, card: str) -> None:
        address = f"10.{_NETWORKS[card]}.0.{number}/24"
        self.run(number, "ip", "addr", "replace", address, "dev", card)
        self.run(number, "ip", "link", "set", card, "up")

    def cut(self, card: str) -> None:
        self.run(1, "ip", "link", "set", card, "down")

    def mend(self, card: str) -> None:
        self._plug_in(1, card)

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not in {timeout_s:g} s: {what}\n{self.report()}")
            time.sleep(POLL_S)

    def partner(self, number: int) -> dict[str, object]:
        """`partner` of the volume's status at the node; empty while it does not run."""
        if number not in self._nodes:
            return {}
        partner = self.pair[number].status()["partner"]
        return dict(partner) if partner else {}

    def settled(self, number: int) -> None:
        """Return when the cluster has nothing left to do, as seen at a node that is on."""
        self.run(number, "crm_resource", "--wait", "--timeout", "90s")

    def monitored(self) -> None:
        """Return when both nodes' monitors have seen the volume as it is now."""
        time.sleep(MONITORED_S)

    def score(self, number: int) -> int:
        """Of a node, for its promotion: what the cluster has heard last."""
        what = ("--name", "master-vol0", "--lifetime", "reboot", "--query", "--quiet")
        return int(self.run(number, "crm_attribute", "--node", f"node{number}", *what))

    def promoted(self) -> set[int]:
        """Where hosts are let in, by bitmapd's own word."""
        return {number for number in (1, 2) if self.partner(number).get("serving")}

    def pids(self) -> dict[int, str]:
        """Of bitmapd, as the nodes count processes."""
        files = {number: self.pair[number].folder / "run/vol0.pid" for number in (1, 2)}
        return {number: file.read_text().strip() for number, file in files.items() if file.exists()}

    def report(self) -> str:
        said = [self.run(number, "crm_mon", "-1Afr", check=False) for number in list(self._nodes)]
        for log in sorted([*self.folder.glob("pacemaker*.log"), *self.folder.glob("node*.log")]):
            lines = log.read_text(errors="replace").splitlines()
            said += [str(log), *[line for line in lines if "error" in line or "vol0" in line][-30:]]
        return "\n".join(said)


def _run(*words: str, check: bool = True) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
    )
    if check and done.returncode:
        raise CommandFailed(f"{words}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
