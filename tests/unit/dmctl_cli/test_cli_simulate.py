"""simulate: options, tables, JSON, pictures, recommendations."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dmctl.cli.context import Context
from dmctl.cli.output import Output
from dmctl.cli.simulate import _table
from dmctl.simulate import replay
from dmctl.simulate.files import load_trace
from tests.support.cli import Cli, new_cli

TRACES = Path(__file__).parents[2] / "data" / "traces"
MIB = 1 << 20

# What the contract promises; more may be there.
KEYS = {
    *("trace", "policy", "extent_size_bytes", "record_limit_bytes", "queue_depth", "writes"),
    *("waited_updates", "record_writes", "hits", "mean_resync_bytes", "p99_resync_bytes"),
    *("mean_record_bytes", "stalls", "violations"),
}


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Rewrites and a stream, for two minutes."""
    file = tmp_path / "mixed.csv"
    lines = ["time_s,op,offset_bytes,length_bytes"]
    for i in range(240):
        lines.append(f"{i * 0.5},W,{i * 65536},65536")
        lines.append(f"{i * 0.5},W,{(100 + i * 7 % 90) * MIB},4096")
        lines.append(f"{i * 0.5},R,0,4096")
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def test_every_combination_is_run(cli: Cli, trace: str) -> None:
    words = ["simulate", trace, str(TRACES / "disk.blkparse"), "--json", "--queue-depth", "1"]
    words += ["--policy", "superset", "--policy", "drbd-al", "--policy", "md-bitmap"]
    words += ["--record-limit", "64m", "--sizes", "16m,32MiB", "--policy", "drbd-al:8"]
    document = cli.call(*words).json
    assert document["output_version"]["command"] == "simulate"
    found = document["results"]
    assert all(row.keys() >= KEYS for row in found)
    keys = [(r["trace"], r["policy"], r["record_limit_bytes"] // MIB) for r in found]
    assert len(keys) == len(set(keys)) == 2 * (3 * 3 + 1)
    for limit in (16, 32, 64):
        for policy in ("superset", "drbd-al", "md-bitmap"):
            assert ("mixed", policy, limit) in keys
    assert ("mixed", "drbd-al:8", 32) in keys
    md = [row for row in found if row["policy"] == "md-bitmap" and row["trace"] == "mixed"]
    assert not any(row["limited"] for row in md)
    assert len({row["waited_updates"] for row in md}) == 1
    assert all(row["violations"] == 0 for row in found)
    assert all(row["writes"] == 480 for row in found if row["trace"] == "mixed")


def test_the_defaults_are_all_policies_at_three_limits_and_two_depths(cli: Cli) -> None:
    found = cli.call("simulate", str(TRACES / "job.fio3.log"), "--json").json["results"]
    policies = {row["policy"] for row in found}
    assert len(policies) == 11
    assert {"superset", "belady", "drbd-al:1237", "drbd-al:6433"} <= policies
    assert {row["queue_depth"] for row in found} == {1, 32}
    limits = {row["record_limit_bytes"] // MIB for row in found if row["policy"] == "superset"}
    assert limits == {64, 256, 1024}


def test_extent_sizes_apply_to_what_has_none_of_its_own(cli: Cli, trace: str) -> None:
    words = ["simulate", trace, "--json", "--queue-depth", "1", "--sizes", "64m"]
    words += ["--extent-size", "1m,4m", "--policy", "lru", "--policy", "drbd-al"]
    found = cli.call(*words).json["results"]
    assert [(row["policy"], row["extent_size_bytes"] // MIB) for row in found] == [
        ("lru", 1),
        ("lru", 4),
        ("drbd-al", 4),
    ]


def test_the_machine_is_a_matter_of_options(cli: Cli, trace: str) -> None:
    words = ["simulate", trace, "--json", "--queue-depth", "1", "--sizes", "16m", "--policy"]
    slow = ["drbd-al", "--link-speed", "100k/s", "--link-latency", "50ms"]
    quick = cli.call(*words, "drbd-al").json["results"][0]
    found = cli.call(*words, *slow, "--record-latency", "500us").json["results"][0]
    assert quick["stalls"] < found["stalls"]
    assert found["longest_wait_seconds"] > quick["longest_wait_seconds"]
    eras = [
        cli.call(*words, "dm-era", "--era-interval", text, "--block-size", "4k").json["results"][0]
        for text in ("500ms", "10s")
    ]
    assert eras[0]["waited_updates"] >= eras[1]["waited_updates"]
    assert eras[0]["extent_size_bytes"] == 4096


def test_the_table_and_the_charts(cli: Cli, trace: str) -> None:
    words = ["simulate", trace, "--policy", "superset", "--policy", "dm-mirror", "--sizes"]
    text = cli.call(*words, "16m,64m", "--queue-depth", "1").out
    head = text.splitlines()[0].split()
    assert head[:5] == ["POLICY", "EXTENT", "LIMIT", "DEPTH", "UPDATES"]
    assert text.count("dm-mirror") == 3  # once a table or chart, whatever the limits
    assert "mixed: record updates waited for, per 1,000 writes, queue depth 1" in text
    assert "█" in text
    assert "violations" not in text
    several = cli.call("simulate", str(TRACES / "requests.csv"), *words[1:], "16m").out
    assert several.splitlines()[0].split()[0] == "TRACE"


def test_pictures(cli: Cli, trace: str, tmp_path: Path) -> None:
    svg = tmp_path / "x.svg"
    words = ["simulate", trace, "--policy", "lru", "--sizes", "16m", "--json", "--plot"]
    assert cli.call(*words, str(svg)).status == 0
    assert svg.read_text().startswith("<svg ")
    wrong = cli.call(*words, str(tmp_path / "x.jpg"))
    assert wrong.status == 2
    assert "x.jpg: pictures are drawn as .svg or .png" in wrong.json["error"]["message"]


def test_a_png_picture(cli: Cli, trace: str, tmp_path: Path) -> None:
    if shutil.which("rsvg-convert") is None:
        pytest.skip("rsvg-convert is not installed: apt-get install librsvg2-bin")
    png = tmp_path / "x.png"
    words = ["simulate", trace, "--policy", "lru", "--sizes", "16m", "--json", "--plot"]
    assert cli.call(*words, str(png)).status == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    refused = cli.call(*words, str(tmp_path / "nowhere" / "x.png"))
    assert refused.status == 1
    assert "cannot draw" in refused.json["error"]["message"]


def test_a_png_picture_without_the_converter(
    cli: Cli, trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["simulate", trace, "--policy", "lru", "--sizes", "16m", "--json", "--plot"]
    error = cli.call(*words, str(tmp_path / "x.png")).json["error"]
    assert "there is no rsvg-convert" in error["message"]
    assert "librsvg2-bin" in error["hint"]


def test_recommendations(cli: Cli, trace: str) -> None:
    words = ["simulate", trace, "--recommend", "--extent-size", "256k,1m"]
    text = cli.call(*words, "--resync-target", "4s").out
    assert text.startswith("# mixed\nextent_size = ")
    assert 'predictor = "' in text
    assert "# record_limit: " in text
    (row,) = cli.call(*words, "--record-limit", "128m", "--json").json["recommendations"]
    assert row["trace"] == "mixed"
    assert row["result"]["record_limit_bytes"] <= 128 * MIB
    assert row["extent_size"] in ("256KiB", "1MiB")
    assert len(row["reasons"]) == 5
    assert "a trace of 480 writes says little" in row["reasons"][-1]
    small = cli.call(*words, "--record-limit", "1m")
    assert small.status == 2
    assert "not enough for a record of 64 extents" in small.err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--policy", "drbd"), 2, "did you mean 'drbd-al'?"),
        (("--record-limit", "5MB"), 2, "ambiguous"),
        (("--record-latency", "us"), 2, "is not a duration"),
        (("--queue-depth", "0"), 2, "queue depth 0 is below 1"),
        (("--extent-size", "3m"), 2, "not a power of two"),
        (("--format", "tape"), 2, "'tape' is not a format"),
        (("--format", "msr"), 2, "line 1: 4 columns, not 7"),
    ],
)
def test_mistakes(cli: Cli, trace: str, words: tuple[str, ...], status: int, message: str) -> None:
    outcome = cli.call("simulate", trace, *words)
    assert outcome.status == status
    assert message in outcome.err


def test_a_violation_would_be_seen(cli: Cli, trace: str) -> None:
    result = replace(replay(load_trace(trace), "lru"), violations=3)
    said = io.StringIO()
    _table(Context(cli.paths, Output({}, stdout=said)), [result])
    assert said.getvalue().splitlines()[1].endswith("3 violations")


def test_a_directory_is_no_trace(cli: Cli, tmp_path: Path) -> None:
    outcome = cli.call("simulate", str(tmp_path))
    assert outcome.status == 2
    assert f"{tmp_path}: this is a directory, not a trace" in outcome.err
    assert "name the files in it" in outcome.err


def test_a_link_without_speed_has_no_hint_at_another_command(cli: Cli, trace: str) -> None:
    outcome = cli.call("simulate", trace, "--link-speed", "0")
    assert outcome.status == 2
    assert "a rate of zero copies nothing" in outcome.err
    assert "pause" not in outcome.err


def test_a_trace_that_is_not_there(cli: Cli) -> None:
    assert cli.call("simulate", "/nowhere").status == 10
