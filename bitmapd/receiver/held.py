"""Which of the points that are committed may be applied (pure).

The image goes forward only, and what it was before is gone.  So a point of a group waits in the
journal until all members of the group have one that is as new: whoever is promoted then can take
the newest point that all have.

1. A point that is of no group may be applied, and so may all before it.
2. A point of a group may be applied once the sender has named it, or a later one.
3. When as many wait as a receiver can name, and another one is complete, the oldest is applied all
   the same: nothing waits for ever.  The senders see to it that all others have that other one then
   (`points.group`).
"""

from __future__ import annotations

from bitmapd.receiver.commit import CommitPage, Queued


def may_be_applied(queue: tuple[Queued, ...], up_to: int) -> tuple[Queued, ...]:
    """The first of these; `up_to`: the newest point that all members have."""
    free = [place for place, it in enumerate(queue, 1) if not it.group or it.point <= up_to]
    return queue[: free[-1]] if free else ()


def named(page: CommitPage, group: int, up_to: int) -> int:
    """The newest point that may be applied, after the sender has named one by its number in the
    group; as before if that is not here."""
    return max(up_to, page.point_of(group) or 0)
