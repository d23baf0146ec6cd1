"""TOML tables into values: merging, and judging values against one another (pure)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from bitmapd.config.kinds import is_loopback
from bitmapd.config.problems import ConfigError, Problem, nearest
from bitmapd.config.volume import (
    KEEPER,
    VolumeConfig,
    effective_block_size_bytes,
    is_keeper,
    keys,
)
from bitmapd.errors import UsageError
from bitmapd.net.uri import NbdUri, is_receiver, is_uri, parse_receiver_uri, parse_uri
from bitmapd.record.geometry import Geometry

_EXCLUSIVE = ("record_limit", "resync_target")
_OF_POINTS = ("point_interval", "spool_limit", "spool", "spool_file_limit", "compress")


def parse_table(
    table: Mapping[str, Any], file: str, *, shared: bool = False
) -> tuple[dict[str, Any], list[Problem]]:
    """Values by field name; with `shared`, a table that may hold shared keys only."""
    fields = {key.name: field for field, key in keys().items() if key.shared or not shared}
    values: dict[str, Any] = {}
    problems = []
    for name, raw in table.items():
        if name not in fields:
            known = any(key.name == name for key in keys().values())
            message = "belongs into the file of a volume" if known else "unknown key"
            hint = None if known else nearest(name, fields)
            problems.append(Problem(file, name, message, hint))
            continue
        try:
            values[fields[name]] = keys()[fields[name]].kind.parse(raw)
        except UsageError as error:
            problems.append(Problem(file, name, error.message, error.hint))
    if all(values.get(_field(name)) is not None for name in _EXCLUSIVE):
        problems.append(Problem(file, "resync_target", "excludes record_limit", "keep one of them"))
    return values, problems


def _field(name: str) -> str:
    return next(field for field, key in keys().items() if key.name == name)


def build_volume(
    name: str,
    table: Mapping[str, Any],
    defaults: Mapping[str, Any],
    file: str,
    listen: str,
) -> tuple[VolumeConfig | None, list[Problem]]:
    """A volume from its table; `defaults` are the values of dmctl.toml by field name, `listen` is
    where it is exported by default."""
    own, problems = parse_table(table, file)
    values: dict[str, Any] = {"name": name, "listen": listen}
    for field, key in keys().items():
        if key.default is not None:
            values[field] = key.kind.parse(key.default)
    if own.get("partner_role") == KEEPER:  # which has neither
        values |= {"primary": "", "secondary": ""}
    values = layer(layer(values, defaults), own)
    for field, key in keys().items():
        if field not in values and key.name not in table:
            problems.append(Problem(file, key.name, "is missing"))
    if problems:
        return None, problems
    config = VolumeConfig(**values)
    problems = [
        Problem(file, key_name, error.message, error.hint) for key_name, error in _judge(config)
    ]
    return (None if problems else config), problems


def layer(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins; one of two keys that exclude each other withdraws the other one below."""
    merged = dict(below)
    limit, target = (_field(name) for name in _EXCLUSIVE)
    if above.get(limit) is not None:
        merged[target] = None
    if above.get(target) is not None:
        merged[limit] = None
    return merged | dict(above)


def _judge(config: VolumeConfig) -> Iterable[tuple[str, UsageError]]:
    """What is wrong with values that are right one by one: (key, error) pairs."""
    try:
        Geometry(
            config.extent_size_bytes, config.extent_size_bytes, effective_block_size_bytes(config)
        )
    except UsageError as error:
        yield "extent_size, block_size", error
    if is_keeper(config):
        yield from _judge_keeper(config)
        yield from _judge_partner(config)
        return
    yield from _judge_listen(config, parse_uri(config.listen))
    if is_receiver(config.secondary):
        yield from _judge_receiver(config)
    elif is_uri(config.secondary):
        uri = parse_uri(config.secondary)
        if uri.tls and not (config.tls_certificates or uri.tls_certificates):
            yield "secondary", _no_certificates()
        if config.secondary == config.listen:
            yield "secondary", UsageError("is the volume's own export")
    yield from _judge_group(config)
    yield from _judge_partner(config)
    seen: dict[str, str] = {}
    for key_name in ("primary", "secondary", "record", "partner_record"):
        value = getattr(config, key_name)
        if value in seen:
            yield key_name, UsageError(f"is the same as {seen[value]}")
        seen.setdefault(value, key_name)


def _judge_keeper(config: VolumeConfig) -> Iterable[tuple[str, UsageError]]:
    for name in ("primary", "secondary"):
        if getattr(config, name):
            yield (
                name,
                UsageError(
                    "a keeper reads and writes no data",
                    hint="leave it out; a node that serves hosts has partner_role = pair",
                ),
            )
    if config.node == 1:
        yield "node", UsageError("a keeper is node 2", hint="node 1 is the one with the volume")
    for name, usual in OF_HOSTS.items():
        if (value := getattr(config, name)) != usual:
            yield name, UsageError(f"{value} is for nodes that serve hosts, not for a keeper")


# What only a node that serves hosts has a use for, with what a keeper has instead.
OF_HOSTS: Final = {
    "serve": "always",
    "record_on": "both",
    "on_cut": "wait",
}

# What only a pair has a use for, with what a volume of one node has instead.
OF_A_PAIR: Final = {
    "serve": "always",
    "record_on": "both",
    "partner_ack": "memory",
    "record_fallback": True,
    "partner_record": None,
    "on_cut": "wait",
    "partner_role": "pair",
}


def _judge_group(config: VolumeConfig) -> Iterable[tuple[str, UsageError]]:
    if config.group is not None and not is_receiver(config.secondary):
        yield "group", UsageError("is for volumes whose secondary is a receiver")


def _judge_receiver(config: VolumeConfig) -> Iterable[tuple[str, UsageError]]:
    if config.node is not None:
        yield "secondary", UsageError("is a receiver, and the volume one of two appliances")
    if config.initial_sync != "full":
        yield (
            "initial_sync",
            UsageError(
                f"{config.initial_sync} is for secondaries that can be read, not for receivers",
                hint="leave it out: the first point has everything",
            ),
        )
    if parse_receiver_uri(config.secondary).peer.host is not None and not (
        config.partner_certificates or config.tls_certificates
    ):
        yield (
            "partner_certificates",
            UsageError("the receiver needs certificates", hint="dmctl partner-keys makes them"),
        )


def _judge_partner(config: VolumeConfig) -> Iterable[tuple[str, UsageError]]:
    named = {
        "node": config.node,
        "partner": config.partner,
        "partner_listen": config.partner_listen,
    }
    missing = [name for name, value in named.items() if value is None]
    if len(missing) == len(named):
        for name, usual in OF_A_PAIR.items():
            if (value := getattr(config, name)) != usual:
                yield (
                    name,
                    UsageError(
                        f"{str(value).lower()} is for one of two appliances",
                        hint="a pair needs node, partner and partner_listen",
                    ),
                )
        return
    if missing:
        yield (
            missing[0],
            UsageError("is missing", hint="a pair needs node, partner and partner_listen"),
        )
        return
    if config.attach == "dm" and config.serve != "on-promote":
        yield (
            "attach",
            UsageError(
                "with device-mapper hosts read and write without asking the partner, so one node of"
                " a pair serves at a time",
                hint="serve = on-promote at both nodes (active/passive), or attach = nbd",
            ),
        )
    if config.takeover == "auto" and config.fence_command is None:
        yield (
            "takeover",
            UsageError(
                "auto needs a fence_command: a partner that is silent may be alive and writing",
                hint="name one, or leave takeover = manual",
            ),
        )
    if config.partner == config.partner_listen:
        yield "partner", UsageError("is where this node itself listens")
    uris = [uri for uri in (config.partner, config.partner_listen) if uri and uri[:3] == "tls"]
    if uris and not (config.partner_certificates or config.tls_certificates):
        yield (
            "partner_certificates",
            UsageError(f"{uris[0]} needs certificates", hint="dmctl partner-keys makes them"),
        )


def _judge_listen(config: VolumeConfig, uri: NbdUri) -> Iterable[tuple[str, UsageError]]:
    if uri.tls and not (config.tls_certificates or uri.tls_certificates):
        yield "listen", _no_certificates()
    if uri.tls or uri.socket_path is not None:
        return
    if not is_loopback(uri.host or ""):
        yield (
            "listen",
            UsageError(
                f"would offer the volume in plain text on {uri.host or 'every address'}",
                hint="use nbds:// with tls_certificates, or a unix socket",
            ),
        )
    elif not config.allow_plaintext_loopback:
        yield (
            "listen",
            UsageError(
                "plain TCP lets every local user write to the volume",
                hint="use a unix socket, or set allow_plaintext_loopback = true",
            ),
        )


def _no_certificates() -> UsageError:
    return UsageError("needs TLS certificates", hint="set tls_certificates to their folder")


def changed(
    config: VolumeConfig, changes: Mapping[str, Any], also: Collection[str] = ()
) -> VolumeConfig:
    """A configuration with the live keys in `changes` (TOML name -> raw value) replaced, and those
    that are named in `also`."""
    live = [key.name for key in keys().values() if key.live or key.name in also]
    source = f"volume '{config.name}'"
    problems = [
        Problem(
            source,
            name,
            "cannot be changed while the volume runs"
            if any(key.name == name for key in keys().values())
            else "unknown key",
            nearest(name, live) or f"one of {', '.join(live)}",
        )
        for name in changes
        if name not in live
    ]
    problems += [
        Problem(source, name, "is for volumes whose secondary is a receiver")
        for name in changes
        if name in _OF_POINTS and not is_receiver(config.secondary)
    ]
    values, found = parse_table({k: v for k, v in changes.items() if k in live}, source)
    if problems or found:
        raise ConfigError([*problems, *found])
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    after = VolumeConfig(**layer(fields, values))
    wrong = [Problem(source, key, error.message, error.hint) for key, error in _judge(after)]
    if wrong:
        raise ConfigError(wrong)
    return after


def render(config: VolumeConfig, names: Iterable[str]) -> dict[str, str | int | bool]:
    """What TOML holds for these keys; of keys that exclude each other, always both."""
    wanted = set(names)
    if wanted.intersection(_EXCLUSIVE):
        wanted.update(_EXCLUSIVE)
    return {
        key.name: key.kind.render(getattr(config, field))
        for field, key in keys().items()
        if key.name in wanted
    }
