"""config show, config check."""

from __future__ import annotations

import textwrap
from argparse import Namespace

from bitmapd.config import (
    ConfigError,
    Key,
    Problem,
    ReceiverConfig,
    VolumeConfig,
    keys,
    load_all,
    load_any,
    receiver_keys,
    render,
    render_receiver,
    volume_names,
)
from bitmapd.config.files import volume_origins
from dmctl.cli.context import Context, selected, worst
from dmctl.cli.pair import fence_problem


def check(context: Context, _args: Namespace) -> int:
    configs = load_all(context.paths)
    problems = [
        Problem(
            str(context.paths.volume_file(name)), "fence_command", f"{path} {found[0]}", found[1]
        )
        for name, config in configs.items()
        if (path := config.fence_command) and config.node and (found := fence_problem(path))
    ]
    if problems:
        raise ConfigError(problems)
    receivers = sorted(set(volume_names(context.paths)) - set(configs))
    counts = f"{_count(len(configs), 'volume')}, {_count(len(receivers), 'receiver')}"
    context.output.say(f"no errors in {context.paths.config_dir}; {counts}")
    if context.output.as_json:
        body = {"volumes": sorted(configs), "receivers": receivers, "errors": []}
        context.output.json("config check", body)
    return 0


def _count(number: int, kind: str) -> str:
    return f"{number} {kind}{'' if number == 1 else 's'}"


def show(context: Context, args: Namespace) -> int:
    output = context.output
    names = selected(context, args, default_all=True)
    configs: list[VolumeConfig] = []
    receivers: list[ReceiverConfig] = []
    errors: list[ConfigError] = []
    for name in names:
        try:
            config = load_any(context.paths, name)
        except ConfigError as error:
            errors.append(error)
            continue
        if isinstance(config, ReceiverConfig):
            receivers.append(config)
        else:
            configs.append(config)
    origins = {config.name: volume_origins(context.paths, config.name) for config in configs}
    every = [key.name for key in keys().values()]
    if output.as_json:
        volumes = [
            {"name": config.name, "values": render(config, every), "origins": origins[config.name]}
            for config in configs
        ]
        volumes += [
            {"name": receiver.name, "values": render_receiver(receiver), "origins": {}}
            for receiver in receivers
        ]
        body: dict[str, object] = {"volumes": volumes}
        if errors:
            body["error"] = errors[0].to_json()
        output.json("config show", body)
        return worst(error.exit_status for error in errors)
    for problem in errors:
        output.error(problem)
    for config in configs:
        output.line(f"# {context.paths.volume_file(config.name)}")
        values = render(config, every)
        for key in keys().values():
            if args.explain:
                _explain(context, key)
            origin = origins[config.name][key.name]
            mark = "" if origin == "volume" else f"  # {origin}"
            output.line(f"{key.name} = {_toml(values[key.name])}{mark}")
        output.line()
    for receiver in receivers:
        output.line(f"# {context.paths.volume_file(receiver.name)}")
        shown = render_receiver(receiver)
        for key in receiver_keys().values():
            if args.explain:
                _explain(context, key)
            if key.name in shown:
                output.line(f"{key.name} = {_toml(shown[key.name])}")
        output.line()
    if not configs and args.explain and not volume_names(context.paths):
        for key in keys().values():
            _explain(context, key)
            output.line(f"# {key.name} = {_toml(key.default) if key.default is not None else '…'}")
    return worst(error.exit_status for error in errors)


def _explain(context: Context, key: Key) -> None:
    where = "volume or dmctl.toml" if key.shared else "volume"
    live = ", dmctl set" if key.live else ""
    for line in textwrap.wrap(f"{key.doc} ({key.kind.syntax}; {where}{live})", 96):
        context.output.line(f"# {line}")


def _toml(value: str | int | bool) -> str:
    import toml  # noqa: PLC0415  (its encoder knows how strings are quoted)

    return str(toml.dumps({"x": value})).partition("= ")[2].strip()
