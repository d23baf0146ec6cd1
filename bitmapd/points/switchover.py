"""A planned move of a volume to the site of its receiver: the steps, and what follows each (pure).

    old site                                          new site
    close hosts, send what is left: COMMITTED
    wait until it is in the image: APPLIED
    superblock: DEMOTED           -- HANDOVER(t+1) -> promoted: generation, term t+1
    becomes its receiver          <- TAKEN(t+1) --

| stage | it went well | it did not |
| --- | --- | --- |
| CLOSING, SENDING, APPLYING | the next one | REOPENING |
| DEMOTING | DEMOTED | UNKNOWN: whether it is durable |
| REOPENING | SERVING, as before | UNKNOWN: whether hosts come in |
| HANDING | GIVEN | DEMOTED |

Invariants:
1. HANDOVER is sent by a site whose superblock says DEMOTED, and which has no hosts.  So two sites
   never serve; between DEMOTED and TAKEN neither does.
2. What is handed over is the whole volume: the receiver has committed what the old site's record
   knows, nothing less and nothing more, and has applied it.
3. HANDOVER may be repeated any number of times: a site that was promoted says so by its generation.
4. A site that is demoted serves again only when the other says that it was not promoted, or by an
   administrator's word.

A crash leaves what the superblock says: SERVING, or DEMOTED.  A process in UNKNOWN ends, so that
the next one reads that.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from bitmapd.points.messages import Hello2, Role


class Stage(Enum):
    SERVING = auto()
    CLOSING = auto()
    SENDING = auto()
    APPLYING = auto()
    DEMOTING = auto()
    REOPENING = auto()
    UNKNOWN = auto()
    DEMOTED = auto()
    HANDING = auto()
    GIVEN = auto()


ASKED: Final = {Stage.SERVING: Stage.CLOSING, Stage.DEMOTED: Stage.HANDING}

_WENT_WELL: Final = {
    Stage.CLOSING: Stage.SENDING,
    Stage.SENDING: Stage.APPLYING,
    Stage.APPLYING: Stage.DEMOTING,
    Stage.DEMOTING: Stage.DEMOTED,
    Stage.REOPENING: Stage.SERVING,
    Stage.HANDING: Stage.GIVEN,
}
_FAILED: Final = {
    Stage.CLOSING: Stage.REOPENING,
    Stage.SENDING: Stage.REOPENING,
    Stage.APPLYING: Stage.REOPENING,
    Stage.DEMOTING: Stage.UNKNOWN,
    Stage.REOPENING: Stage.UNKNOWN,
    Stage.HANDING: Stage.DEMOTED,
}


def after(stage: Stage, *, well: bool) -> Stage | None:
    """What follows; None: nothing is done in this stage."""
    return (_WENT_WELL if well else _FAILED).get(stage)


class Outlook(Enum):
    """What the other site is to one that is demoted."""

    TAKEN = "it was promoted, and serves"
    NOT_TAKEN = "it is the receiver that it was"
    BUSY = "it is being promoted"
    OTHER = "it has other data than this site gave away"


def outlook(ours: Hello2, theirs: Hello2) -> Outlook:
    """By what the other site says of itself, as a receiver or as a volume."""
    generation = ours.generations[0]
    if generation in theirs.generations[1:]:
        return Outlook.TAKEN
    if generation != theirs.generations[0] or theirs.role is Role.SENDER:
        return Outlook.OTHER
    if theirs.role is Role.PROMOTED:
        return Outlook.BUSY
    return Outlook.NOT_TAKEN if theirs.committed == ours.committed else Outlook.OTHER


def refusal(term: int, hello: Hello2, here: Hello2) -> str | None:
    """Why a receiver, which says `here` of itself, does not take HANDOVER from who said `hello`;
    None: it does."""
    if hello.role is not Role.DEMOTED:
        return "who hands over has to be demoted before"
    if hello.generations[0] != here.generations[0]:
        return "what is handed over is not what this receiver has"
    if term != here.term + 1:
        return f"term {term} does not follow {here.term}"
    if not here.committed or here.committed != hello.committed:
        return f"the receiver has point {here.committed}, and {hello.committed} is handed over"
    if here.applied != here.committed:
        return f"point {here.committed} is still being applied"
    return None
