"""partner --dissolve: a node becomes a volume of one appliance."""

from __future__ import annotations

from argparse import Namespace

from bitmapd.config import VolumeConfig, load_volume
from bitmapd.errors import BitmapdError, WrongStateError
from bitmapd.volume.conversion import become_single, is_of_a_pair
from dmctl.cli.context import Context
from dmctl.cli.copying import ask
from dmctl.cli.processes import is_running

DISSOLVE_TIMEOUT_S = 600.0  # waits for requests that are under way


def dissolve(context: Context, args: Namespace) -> None:
    """Make a node a volume of one appliance, by its process: it knows whether it may be."""
    name, output = args.name, context.output
    config = load_volume(context.paths, name)
    output.confirm(
        "the other node must never be started again, and its record is worth nothing any more",
        f"Go on with volume '{name}' at this node alone?",
        yes=args.yes,
    )
    state = None
    if is_running(context.paths, name):
        state = ask(context, name, "dissolve", {}, DISSOLVE_TIMEOUT_S)["state"]
    elif config.node is None or is_of_a_pair(config):
        raise _not_now(config)
    else:  # it was interrupted
        become_single(config, context.paths, lambda event, **fields: None)
    if output.as_json:
        output.json("partner", {"name": name, "partner": None, "state": state})
        return
    output.say(f"volume '{name}' is one of a single appliance")


def _not_now(config: VolumeConfig) -> BitmapdError:
    if config.node is None:
        return WrongStateError(f"volume '{config.name}' has no partner")
    return WrongStateError(
        f"volume '{config.name}' is not running, and only its process knows what the partner has"
        " written",
        hint=f"'dmctl start {config.name}', then this command at the node that is alone",
    )
