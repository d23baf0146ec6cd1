"""Configuration files: where they are, reading all of them, writing one."""

from __future__ import annotations

import errno
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from bitmapd.config.kinds import check_name
from bitmapd.config.problems import Problem, config_error, denied, nearest
from bitmapd.config.receiver import ROLE, ReceiverConfig, build_receiver
from bitmapd.config.roles import OF_RECEIVERS
from bitmapd.config.tables import build_volume, layer, parse_table, render
from bitmapd.config.volume import VolumeConfig, keys
from bitmapd.errors import ExistsError, NotFoundError, UsageError, WrongStateError
from bitmapd.net.uri import MAX_SOCKET_PATH_BYTES, NbdUri, format_uri

DEFAULT_CONFIG_DIR = "/etc/dmctl"
DEFAULT_RUN_DIR = "/run/dmctl"
MAX_FILE_BYTES = 1 << 20
MAX_KEY_DOTS = 16
_QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'[^']*'""")


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the files of this host's volumes are."""

    config_dir: Path
    run_dir: Path

    @classmethod
    def find(
        cls,
        environment: Mapping[str, str],
        config_dir: str | None = None,
        run_dir: str | None = None,
    ) -> Paths:
        """An argument wins over the environment, which wins over the built-in default."""
        config = config_dir or environment.get("DMCTL_CONFIG_DIR") or DEFAULT_CONFIG_DIR
        run = run_dir or environment.get("DMCTL_RUN_DIR") or DEFAULT_RUN_DIR
        return cls(Path(os.path.abspath(config)), Path(os.path.abspath(run)))

    @property
    def defaults_file(self) -> Path:
        return self.config_dir / "dmctl.toml"

    @property
    def volumes_dir(self) -> Path:
        return self.config_dir / "volumes"

    def volume_file(self, name: str) -> Path:
        return self.volumes_dir / f"{name}.toml"

    @property
    def state_dir(self) -> Path:
        return self.config_dir / "state"

    def state_file(self, uuid: UUID) -> Path:
        """The newest session of a record, and its primary at rest; goes with the volume."""
        return self.state_dir / f"{uuid}.json"

    def sides_file(self, uuid: UUID) -> Path:
        """Which media were in sync, and when; stays when the volume is removed."""
        return self.state_dir / f"{uuid}.sides"

    def control_socket(self, name: str) -> Path:
        return self._socket(name, "ctl")

    def nbd_socket(self, name: str) -> Path:
        return self._socket(name, "nbd")

    def _socket(self, name: str, suffix: str) -> Path:
        path = self.run_dir / f"{name}.{suffix}"
        length_bytes = len(os.fsencode(path))
        if length_bytes > MAX_SOCKET_PATH_BYTES:
            raise UsageError(
                f"the socket {path} has a path of {length_bytes} bytes; the system allows"
                f" {MAX_SOCKET_PATH_BYTES}",
                hint="choose a shorter --run-dir, or a shorter name",
            )
        return path

    def pid_file(self, name: str) -> Path:
        return self.run_dir / f"{name}.pid"

    def error_file(self, name: str) -> Path:
        """Where a bitmapd that could not start leaves its error, as one JSON object."""
        return self.run_dir / f"{name}.err"

    def force_file(self, name: str) -> Path:
        """There for the start of a volume that is to serve whatever became of its receiver."""
        return self.run_dir / f"{name}.force"

    def default_listen(self, name: str) -> str:
        return format_uri(NbdUri(False, name, socket_path=str(self.nbd_socket(name))))


def read_table(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The file's table; FileNotFoundError passes through, whatever else is wrong is a problem."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            return {}, [Problem(str(path), None, f"is larger than {MAX_FILE_BYTES} bytes")]
        text = data.decode()
        if _is_deep(text):
            return {}, [Problem(str(path), None, "is nested too deeply")]
        return tomllib.loads(text), []
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            return {}, [Problem(str(path), None, "is a symbolic link", "put the file itself there")]
        if error.errno in (errno.EACCES, errno.EPERM):
            return {}, [denied(str(path), f"cannot be read: {error.strerror}")]
        return {}, [Problem(str(path), None, f"cannot be read: {error.strerror}")]
    except UnicodeDecodeError:
        return {}, [Problem(str(path), None, "is not UTF-8 text")]
    except RecursionError:
        return {}, [Problem(str(path), None, "is nested too deeply")]
    except ValueError as error:  # TOMLDecodeError, and numbers beyond what Python converts
        return {}, [Problem(str(path), None, f"is not TOML: {error}")]


def _is_deep(text: str) -> bool:
    """Whether a key has more parts than any of ours.  tomllib takes memory in their square: one of
    100,000 parts takes 40 GB."""
    return any(
        _QUOTED.sub("", line).partition("#")[0].count(".") > MAX_KEY_DOTS
        for line in text.split("\n")
    )


def load_defaults(paths: Paths) -> tuple[dict[str, Any], list[Problem]]:
    """Values of dmctl.toml by field name; a missing file is an empty one."""
    file = str(paths.defaults_file)
    try:
        table, problems = read_table(paths.defaults_file)
    except FileNotFoundError:
        return {}, []
    defaults = table.pop("defaults", {})
    problems += [Problem(file, name, "unknown key", nearest(name, ["defaults"])) for name in table]
    if not isinstance(defaults, dict):
        return {}, [*problems, Problem(file, "defaults", "is not a table")]
    values, found = parse_table(defaults, file, shared=True)
    return values, problems + found


def volume_names(paths: Paths) -> list[str]:
    """Names of the volumes that have a file, in order; names that cannot be volumes included."""
    try:
        found = os.listdir(paths.volumes_dir)
    except FileNotFoundError:
        return []
    return sorted(
        file.removesuffix(".toml")
        for file in found
        if file.endswith(".toml") and not file.startswith(".")
    )


def load_volume(paths: Paths, name: str) -> VolumeConfig:
    """Raises NotFoundError, WrongStateError for a receiver, or `config_error` of all problems of
    dmctl.toml and the volume."""
    config = load_any(paths, name)
    if isinstance(config, ReceiverConfig):
        raise WrongStateError(
            f"'{name}' is a receiver: it has no hosts, and is no volume",
            hint=f"'dmctl points {name}' shows what it holds",
        )
    return config


def load_any(paths: Paths, name: str) -> VolumeConfig | ReceiverConfig:
    """A volume or a receiver; as `load_volume`."""
    check_name(name)
    try:
        table, problems = read_table(paths.volume_file(name))
    except FileNotFoundError:
        names = volume_names(paths)
        raise NotFoundError(
            f"there is no volume '{name}' in {paths.config_dir}",
            hint=nearest(name, names)
            or (f"there are: {', '.join(names)}" if names else "make one with 'dmctl create'"),
        ) from None
    file = str(paths.volume_file(name))
    if table.get("role") == ROLE:
        receiver, problems = build_receiver(name, table, file)
        if receiver is None:
            raise config_error(problems)
        return receiver
    defaults, found = load_defaults(paths)
    config = None
    if not problems:
        listen = paths.default_listen(name)
        config, problems = build_volume(name, table, defaults, file, listen)
    if config is None or found:
        raise config_error(found + problems)
    return config


def volume_origins(paths: Paths, name: str) -> dict[str, str]:
    """Where the value of each key of a volume that loads comes from: `volume`, `dmctl.toml` or
    `default`."""
    own, _problems = parse_table(read_table(paths.volume_file(name))[0], "")
    shared, _problems = load_defaults(paths)
    inherited = layer(shared, own)
    return {
        key.name: "volume"
        if field in own
        else "dmctl.toml"
        if field in shared and inherited[field] == shared[field]
        else "default"
        for field, key in keys().items()
    }


def load_all(paths: Paths) -> dict[str, VolumeConfig]:
    """Every volume, of receivers the problems only; `config_error` of all problems of all files."""
    defaults, problems = load_defaults(paths)
    configs: dict[str, VolumeConfig] = {}
    receivers: dict[str, ReceiverConfig] = {}
    for name in volume_names(paths):
        file = str(paths.volume_file(name))
        config = receiver = None
        try:
            check_name(name)
            table, found = read_table(paths.volume_file(name))
            if table.get("role") == ROLE:
                receiver, found = build_receiver(name, table, file)
            elif not found:
                listen = paths.default_listen(name)
                config, found = build_volume(name, table, defaults, file, listen)
        except FileNotFoundError:
            continue  # removed since the directory was read
        except UsageError as error:
            found = [Problem(file, None, error.message, error.hint)]
        problems += found
        if config is not None:
            configs[name] = config
        if receiver is not None:
            receivers[name] = receiver
    problems += _shared_things(paths, {**configs, **receivers})
    if problems:
        raise config_error(problems)
    return configs


def _shared_things(
    paths: Paths, configs: Mapping[str, VolumeConfig | ReceiverConfig]
) -> list[Problem]:
    """Two volumes that use the same identity, medium or address; of receivers only that of their
    metrics."""
    owners: dict[str, str] = {}
    problems = []
    of_volumes = ("uuid", "primary", "secondary", "record", "listen", "metrics_listen")
    for name, config in configs.items():
        receives = isinstance(config, ReceiverConfig)
        for key_name in ("metrics_listen",) if receives else of_volumes:
            value = getattr(config, key_name)
            if not value:
                continue
            owner = owners.setdefault(str(value), name)
            if owner != name:
                role = "receiver" if isinstance(configs[owner], ReceiverConfig) else "volume"
                problems.append(
                    Problem(
                        str(paths.volume_file(name)), key_name, f"is used by {role} '{owner}' too"
                    )
                )
    return problems


def _dumps(table: Mapping[str, Any]) -> str:
    import toml  # noqa: PLC0415  (3 MiB, which a process that only reads need not have)

    return str(toml.dumps(dict(table)))


def create_volume(paths: Paths, name: str, table: Mapping[str, Any]) -> None:
    """Write a new volume's file; ExistsError if there is one."""
    head = f"# Volume {name}.  'dmctl config show --explain {name}' explains every key.\n"
    try:
        atomic_write(paths.volume_file(name), head + _dumps(table), new=True)
    except FileExistsError:
        raise ExistsError(f"volume '{name}' exists already") from None
    _forget_former(paths, name)  # of another one of this name


def exchange_role(paths: Paths, name: str, table: Mapping[str, Any]) -> None:
    """Give a site its other role: what its file said is kept beside it, for the way back."""
    path = paths.volume_file(name)
    if "role" in table:
        before = _former_table(path, True)
        table = {key: before[key] for key in before.keys() & OF_RECEIVERS} | dict(table)
    atomic_write(_former(path, "role" not in table), path.read_bytes())
    head = f"# {name}.  'dmctl config show --explain {name}' explains every key.\n"
    atomic_write(path, head + _dumps(table))


def former_volume(paths: Paths, name: str) -> dict[str, Any]:
    """What the file of a receiver said while it was a volume; empty if it never was one."""
    return _former_table(paths.volume_file(name), False)


def _former_table(path: Path, of_receiver: bool) -> dict[str, Any]:
    try:
        return read_table(_former(path, of_receiver))[0]
    except FileNotFoundError:
        return {}


def _former(path: Path, of_receiver: bool) -> Path:
    return path.with_suffix(".was-receiver" if of_receiver else ".was-volume")


def _forget_former(paths: Paths, name: str) -> None:
    for of_receiver in (False, True):
        _former(paths.volume_file(name), of_receiver).unlink(missing_ok=True)


def change_volume(paths: Paths, config: VolumeConfig, names: Iterable[str]) -> None:
    """Put the values that these keys (TOML names) have in `config` into the volume's file.

    Lines that set other keys, comments among them, stay as they are.
    """
    path = paths.volume_file(config.name)
    table, problems = read_table(path)
    if problems:
        raise config_error(problems)
    changes = render(config, names)
    wanted = {key: value for key, value in table.items() if key not in changes} | changes
    kept = [
        line
        for line in path.read_text().splitlines()
        if line.partition("=")[0].strip() not in changes
    ]
    text = "\n".join([*kept, _dumps(changes)])
    try:
        whole = tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        whole = False
    # The edit by lines fails on a value of several lines; the comments are then given up.
    atomic_write(path, text if whole else _dumps(wanted))


def remove_volume(paths: Paths, name: str, uuid: UUID | None) -> None:
    """Forget a volume: its file first, then what this host knows of its record."""
    paths.volume_file(name).unlink()
    _forget_former(paths, name)
    _sync_folder(paths.volumes_dir)
    if uuid is not None:
        paths.state_file(uuid).unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | str, *, new: bool = False, mode: int = 0o600) -> None:
    """Replace a file, or with `new` make one that must not exist; durable on return.

    An `OSError` names the file itself, whichever step failed.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            with open(os.open(temporary, flags, mode), "wb") as stream:
                stream.write(data if isinstance(data, bytes) else data.encode())
                stream.flush()
                os.fsync(stream.fileno())
            if new:
                os.link(temporary, path)
            else:
                temporary.rename(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
