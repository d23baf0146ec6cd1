"""The commands that change which side hosts use."""

from __future__ import annotations

from dmctl.cli.options import Commands, add_command, add_name


def add_later(commands: Commands) -> None:
    for name, text, feature in (
        ("promote", "use the secondary in place of a lost primary", "failover"),
        ("demote", "give the secondary back its place", "failover"),
        ("failback", "copy back what changed, and use the primary again", "failover"),
        ("takeover", "take a volume over from the partner", "partner"),
        ("partner", "show the link to the partner", "partner"),
    ):
        parser = add_command(
            commands,
            name,
            "later:refuse",
            f"{text} (comes with the {feature} feature)",
            "This build does not have it yet: the command changes nothing and ends with status 14.",
        )
        parser.set_defaults(feature=f"the {feature} feature")
        add_name(parser)
