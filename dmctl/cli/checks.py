"""What has to be true before a volume is created; nothing is changed here.

Every check is made, and adds what speaks against the volume to `Findings`, so that an administrator
sees all of it at once.  What `--force` overrides goes to `unless_forced`; a copy that may be the
last good one to `lost`, which only an answer overrides.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from bitmapd.config import (
    ReceiverConfig,
    VolumeConfig,
    effective_block_size_bytes,
    load_any,
    volume_names,
)
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    DifferencesError,
    ExistsError,
    ForeignRecordError,
    FormatTooNewError,
    NoSpaceError,
    PermissionError_,
    RecordDamagedError,
    UsageError,
    explain,
)
from bitmapd.media.claims import Claim, busy, holder_of
from bitmapd.media.identity import Identity, identify, in_use, same_medium, signature
from bitmapd.net.tls import client_context, server_context
from bitmapd.net.uri import is_uri, parse_uri
from bitmapd.predict.predictors import make_policy
from bitmapd.record import tool
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import InitialSync, RecordFlag, Superblock, record_size_bytes
from bitmapd.volume.secondary import unshared
from bitmapd.volume.sides import good_copies
from dmctl.cli.context import Context
from dmctl.cli.media import first_difference, open_export, open_file

_UNSTABLE_NAME = re.compile(r"/dev/(sd[a-z]+|vd[a-z]+|xvd[a-z]+|nvme\d+n\d+)(p?\d+)?")
Value = TypeVar("Value")


@dataclass(slots=True)
class Findings:
    """What the checks have found out so far."""

    force: bool
    errors: list[BitmapdError] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # copies that are overwritten, to be asked for
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep an error for the list, and go on behind the block."""
        try:
            yield
        except BitmapdError as error:
            self.errors.append(error)
        except OSError as error:
            self.errors.append(explain(error))

    def attempt(self, check: Callable[[], Value]) -> Value | None:
        with self.collect():
            return check()
        return None

    def unless_forced(self, error: BitmapdError) -> None:
        if self.force:
            self.overridden.append(error.message)
        else:
            hint = "--force overwrites it"
            self.errors.append(type(error)(error.message, hint))


def check(
    context: Context,
    found: Findings,
    name: str,
    table: dict[str, Any],
    config: VolumeConfig | None,
    *,
    joins: bool = False,
) -> Superblock | None:
    """Everything that can be known before anything is written; None if a part is missing.  A node
    that `joins` copies nothing by itself."""
    media = {key: str(table[key]) for key in ("primary", "secondary", "record")}
    known = {key: found.attempt(partial(identified, key, value)) for key, value in media.items()}
    with found.collect():
        context.paths.run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    for key, value in media.items():
        identity = known[key]
        if identity is not None and identity.kind not in ("nbd", "receiver"):
            check_free(found, key, value, identity, config)
    _check_distinct(found, media, known)
    check_others(context, found, media, known)
    primary, secondary, record = (known[key] for key in media)
    if config is None or primary is None:
        return None
    if config.node is not None:
        found.notes += [
            f"both nodes compare what they call {key}: {identity.text!r} has to be the same there"
            for key, identity in known.items()
            if key != "record" and identity is not None and not identity.stable
        ]
    geometry = _check_geometry(found, config, primary)
    _check_certificates(found, config)
    if geometry is None:
        return None
    joins = joins or config.node == 2  # what node 1 does with the secondary was asked before
    size_bytes = _check_secondary(found, config, geometry, secondary, joins=joins)
    overwrites = secondary is not None and secondary.kind != "receiver"
    if secondary is not None and overwrites and config.initial_sync != "skip" and not joins:
        _check_copies(context, found, config, primary, secondary)
    superblock = Superblock(
        volume_uuid=config.uuid,
        name=name,
        geometry=geometry,
        generations=(uuid4(),),
        primary=primary.text,
        primary_size_bytes=primary.size_bytes or 0,
        secondary=secondary.text if secondary else "",
        secondary_size_bytes=size_bytes or 0,
        created_s=int(time.time()),
        updated_s=int(time.time()),
        flags=(RecordFlag.SYNC_SKIPPED | RecordFlag.CLEAN)
        if config.initial_sync == "skip"
        else RecordFlag(0),
        initial_sync={"full": InitialSync.FULL, "checksum": InitialSync.CHECKSUM}.get(
            config.initial_sync, InitialSync.NONE
        ),
    )
    if (
        record is not None
        and not record.read_only
        and not check_record(context, found, config, record, geometry)
    ):
        # As after a process that died: what it had sent may land late.
        superblock = dataclasses.replace(superblock, session=1)
    return superblock


def identified(key: str, target: str) -> Identity:
    try:
        return identify(target)
    except BitmapdError as error:
        raise type(error)(f"{key} {error.message}", error.hint) from None


def check_free(
    found: Findings, key: str, path: str, identity: Identity, config: VolumeConfig | None
) -> None:
    with found.collect():
        # Nobody claims a record: whoever has one locks it.  One that may not be written is refused
        # below, and may not be opened either.
        looked_at = key != "record" and not identity.read_only
        other = holder_of(path) if looked_at else None
        partner = Claim(config.node if config else None).admits(other)
        if other is not None and not partner:
            error = busy(path, other)
            raise type(error)(f"{key} {error.message}", error.hint)
        user = in_use(path, shared=partner)
        if user is not None:
            found.errors.append(
                BusyError(f"{key} {path} is {user}", hint="unmount or detach it first")
            )
    if identity.read_only:
        found.errors.append(PermissionError_(f"{key} {path} cannot be written"))
    if not identity.stable:
        found.notes.append(f"{key} {path} has no lasting identity; an exchange goes unnoticed")
    if _UNSTABLE_NAME.fullmatch(path):
        found.notes.append(
            f"{path} may be another disk after a reboot; a name in /dev/disk/by-id stays"
        )


def _check_distinct(
    found: Findings, media: dict[str, str], known: dict[str, Identity | None]
) -> None:
    for one, other in (("primary", "secondary"), ("primary", "record"), ("secondary", "record")):
        if known[one] is None or known[other] is None:
            continue
        if found.attempt(partial(same_medium, media[one], media[other])):
            found.errors.append(
                UsageError(f"{one} {media[one]} and {other} {media[other]} are the same medium")
            )


def check_others(
    context: Context,
    found: Findings,
    media: Mapping[str, str],
    known: Mapping[str, Identity | None],
    but: tuple[str, str] | None = None,
) -> None:
    """What volumes use, `but` for one role of one of them; `config check` reports one that cannot
    be read, not this."""
    for name in volume_names(context.paths):
        try:
            other = load_any(context.paths, name)
        except (BitmapdError, OSError):
            found.notes.append(f"the configuration of '{name}' has errors and was not looked at")
            continue
        for key, value in media.items():
            receives = isinstance(other, ReceiverConfig)
            for role in ("image", "journal") if receives else ("primary", "secondary", "record"):
                used = None if (name, role) == but else getattr(other, role)
                try:
                    same = known[key] is not None and used and same_medium(value, used)
                except BitmapdError:
                    continue  # the other volume's medium is not there
                if same:
                    found.errors.append(
                        BusyError(
                            f"{key} {value} is the {role} of"
                            f" {'receiver' if receives else 'volume'} '{name}'"
                        )
                    )


def _check_geometry(found: Findings, config: VolumeConfig, primary: Identity) -> Geometry | None:
    size_bytes = primary.size_bytes or 0
    sector = primary.logical_block_bytes or 512
    if size_bytes % sector:
        found.errors.append(
            UsageError(
                f"primary {config.primary} has {size_bytes} bytes, no multiple of its blocks of"
                f" {sector} bytes",
                hint=f"truncate -s {size_bytes + -size_bytes % sector} {config.primary}",
            )
        )
    with found.collect():
        block_bytes = effective_block_size_bytes(config)
        if block_bytes < sector:
            raise UsageError(f"--block-size is smaller than the primary's blocks of {sector} bytes")
        geometry = Geometry(size_bytes, config.extent_size_bytes, block_bytes)
        make_policy(config.predictor, geometry)
        return geometry
    return None


def _check_certificates(found: Findings, config: VolumeConfig) -> None:
    with found.collect():
        listen = parse_uri(config.listen)
        folder = listen.tls_certificates or config.tls_certificates
        if listen.tls and folder is not None:
            server_context(Path(folder))
    with found.collect():
        if is_uri(config.secondary):
            uri = parse_uri(config.secondary)
            folder = uri.tls_certificates or config.tls_certificates
            if uri.tls and folder is not None:
                client_context(Path(folder), uri.tls_hostname or uri.host)
            if not uri.tls and uri.socket_path is None:
                found.notes.append(f"what is copied to {config.secondary} is not encrypted")


def _check_secondary(
    found: Findings,
    config: VolumeConfig,
    geometry: Geometry,
    identity: Identity | None,
    *,
    joins: bool,
) -> int | None:
    """The secondary's size, once everything about it has been checked."""
    target, need = config.secondary, geometry.size_bytes
    if identity is None or identity.kind == "receiver":
        return None
    if identity.kind == "nbd":
        with found.collect(), open_export(target, config.tls_certificates) as export:
            _check_size(found, config, need, export.size_bytes, export.block_size_bytes)
            if config.node is not None and not export.takes_many:
                found.errors.append(unshared(target))
            if config.initial_sync == "skip" and export.size_bytes >= need and not joins:
                with open_file(config.primary) as read:
                    _check_samples(config, first_difference(read, export.read, need))
            return export.size_bytes
        return None
    have = identity.size_bytes or 0
    _check_size(found, config, need, have, identity.logical_block_bytes or 512)
    if joins:
        return have
    with found.collect():
        content = None if identity.read_only else signature(target)
        # A copy of the primary looks like the primary; whether it is one is checked otherwise.
        if content is not None and not (
            config.initial_sync != "full" and content == signature(config.primary)
        ):
            found.unless_forced(ExistsError(f"secondary {target} holds something: {content}"))
    if config.initial_sync == "skip" and have >= need:
        with found.collect(), open_file(config.primary) as one, open_file(target) as other:
            _check_samples(config, first_difference(one, other, need))
    return have


def _check_copies(
    context: Context,
    found: Findings,
    config: VolumeConfig,
    primary: Identity,
    secondary: Identity,
) -> None:
    """Whether the secondary was in sync with another primary."""
    old: Superblock | None = None
    with suppress(BitmapdError):  # its own check reports what is wrong with the record
        old = tool.probe(config.record)
    found.lost += good_copies(context.paths, old, primary.text, secondary.text)


def _check_size(
    found: Findings, config: VolumeConfig, need: int, have: int, block_bytes: int
) -> None:
    if have < need:
        found.errors.append(
            NoSpaceError(
                f"secondary {config.secondary} has {have} bytes, the primary {config.primary} has"
                f" {need}"
            )
        )
    if effective_block_size_bytes(config) < block_bytes:
        found.errors.append(
            UsageError(
                f"--block-size is smaller than the secondary's blocks of {block_bytes} bytes"
            )
        )
    elif need % block_bytes:
        found.errors.append(
            UsageError(
                f"the size of the primary, {need} bytes, is no multiple of the secondary's blocks"
                f" of {block_bytes} bytes"
            )
        )


def _check_samples(config: VolumeConfig, offset: int | None) -> None:
    if offset is not None:
        raise DifferencesError(
            f"--initial-sync skip: {config.primary} and {config.secondary} differ near byte"
            f" {offset}",
            hint="use --initial-sync checksum, which copies only what differs",
        )


def check_record(
    context: Context,
    found: Findings,
    config: VolumeConfig,
    identity: Identity,
    geometry: Geometry,
) -> bool:
    """False if an earlier volume's process may have left writes on their way to its secondary."""
    path, need, have = config.record, record_size_bytes(geometry.extents), identity.size_bytes or 0
    if have < need:
        hint = f"truncate -s {need} {path}" if identity.kind == "file" else "use a larger device"
        found.errors.append(NoSpaceError(f"record {path} has {have} bytes and needs {need}", hint))
    with found.collect(), tool.RecordMedium.open(path) as medium:
        medium.lock()
    with found.collect():
        try:
            superblock = tool.probe(path)
        except (RecordDamagedError, FormatTooNewError) as error:
            found.unless_forced(error)
            return False
        if superblock is not None:
            _check_old_record(context, found, config, superblock)
            return superblock.clean or superblock.session == 0
        content = signature(path)
        if content is not None:
            found.unless_forced(ExistsError(f"record {path} holds something: {content}"))
    return True


def _check_old_record(
    context: Context, found: Findings, config: VolumeConfig, old: Superblock
) -> None:
    """Whether the record that stands on the device may go."""
    owner = f"volume '{old.name}' (uuid {old.volume_uuid})"
    if old.name != config.name:
        found.unless_forced(ForeignRecordError(f"record {config.record} belongs to {owner}"))
    elif old.session > 0 and not old.clean:
        found.unless_forced(
            ForeignRecordError(
                f"record {config.record} belongs to an earlier {owner}, which was not stopped"
                " cleanly: it names what its secondary lacks"
            )
        )
    else:
        found.notes.append(f"the record of an earlier {owner} is overwritten")
