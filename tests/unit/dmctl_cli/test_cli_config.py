"""config show and config check."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.config import keys, load_volume, parse_table
from tests.support.cli import Cli, new_cli


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


def test_check_counts_or_lists_everything(cli: Cli) -> None:
    assert "0 volumes" in cli.ok("config", "check").err
    cli.create("a")
    assert cli.ok("config", "check").err.endswith("; 1 volume, 0 receivers\n")
    cli.create("b")
    assert cli.ok("config", "check", "--json").json["volumes"] == ["a", "b"]
    cli.paths.defaults_file.write_text("[default]\n")
    cli.paths.volume_file("a").write_text("uid = 1\n")
    outcome = cli.call("config", "check")
    assert outcome.status == 2
    for part in ("dmctl.toml: default", "a.toml: uid", "a.toml: primary", "did you mean uuid?"):
        assert part in outcome.err
    error = cli.call("config", "check", "--json").json["error"]
    assert len(error["problems"]) == 6
    assert {"file", "key", "message", "hint"} == set(error["problems"][0])


def test_show_is_toml_that_means_the_same(cli: Cli) -> None:
    cli.create()
    for words in (("config", "show"), ("config", "show", "vol0", "--explain")):
        table = tomllib.loads(cli.ok(*words).out)
        values, problems = parse_table(table, "shown")
        assert problems == []
        config = load_volume(cli.paths, "vol0")
        assert values == {field: getattr(config, field) for field in keys()}


def test_show_says_where_a_value_comes_from(cli: Cli) -> None:
    cli.create("vol0", "--era-interval", "2s")
    cli.paths.defaults_file.write_text(
        '[defaults]\ncopy_rate = "5MiB/s"\nera_interval = "9s"\nresync_target = "7s"\n'
    )
    out = cli.ok("config", "show").out
    assert 'copy_rate = "5MiB/s"  # dmctl.toml\n' in out
    assert 'era_interval = "2s"\n' in out
    assert 'predictor = "superset"  # default\n' in out
    document = cli.ok("config", "show", "--json").json
    origins = document["volumes"][0]["origins"]
    assert origins["resync_target"] == "dmctl.toml"
    assert set(origins) == {key.name for key in keys().values()}
    cli.paths.volume_file("vol0").write_text(
        cli.paths.volume_file("vol0").read_text() + 'record_limit = "1GiB"\n'
    )
    withdrawn = cli.ok("config", "show", "--json").json["volumes"][0]
    assert withdrawn["origins"]["resync_target"] == "default"
    assert withdrawn["values"]["resync_target"] == "none"


def test_show_explains_every_key_even_without_a_volume(cli: Cli) -> None:
    out = cli.ok("config", "show", "--explain").out
    for key in keys().values():
        assert f"# {key.name} = " in out
        assert key.doc.split()[0] in out


def test_show_with_a_broken_volume_shows_the_others(cli: Cli) -> None:
    cli.create()
    cli.paths.volume_file("broken").write_text("?")
    outcome = cli.call("config", "show")
    assert outcome.status == 2
    assert "broken.toml" in outcome.err
    assert 'predictor = "superset"' in outcome.out
    document = cli.call("config", "show", "--json")
    assert document.status == 2
    assert [volume["name"] for volume in document.json["volumes"]] == ["vol0"]
    assert document.json["error"]["exit_status"] == 2
    assert cli.call("config", "show", "nosuch").status == 10
