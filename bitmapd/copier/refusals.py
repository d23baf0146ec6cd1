"""What an error of the secondary means for the link, for the place and for the operation (pure).

One table for all of it.  An error is one of these:

- `GONE`: there is no working connection, or no use in it.  It is given up and made anew.
- `PLACE`: the secondary answers, and does not take this.  The place is tried again by itself, less
  and less often; others go on.
- `FULL`: the same for want of room.  Room may come back at any time.
- `NOT_OFFERED`: it does not know the operation, or not in this form.

1. What is not in the table is `GONE`: a new connection is always right, only slow.
2. A connection that was lost is `GONE`, whatever number the error has, and so is a secondary that
   may carry out later what it answered with an error.
3. An operation other than a plain write or a flush is never needed (`may_do_without`): zeros can be
   written, and what cannot be compared can be sent.  So unless the link is gone it is done in the
   plain form, and the error of that one counts.
4. A flush has no plainer form, and what it did not make durable is anywhere: a failed one is
   always `GONE`.
"""

from __future__ import annotations

import errno
from enum import Enum

from bitmapd.errors import Unanswered


class Refusal(Enum):
    """See the module docstring."""

    GONE = "gone"
    PLACE = "place"
    FULL = "full"
    NOT_OFFERED = "not offered"


_BY_ERRNO = {
    errno.EIO: Refusal.PLACE,
    errno.EINVAL: Refusal.PLACE,
    errno.EREMOTEIO: Refusal.PLACE,
    errno.EILSEQ: Refusal.PLACE,  # protection information does not fit
    errno.ENODATA: Refusal.PLACE,  # the kernel's word for a medium error
    errno.EBADE: Refusal.PLACE,  # a reservation conflict
    errno.EOVERFLOW: Refusal.PLACE,
    errno.EPERM: Refusal.PLACE,  # nbdkit's protect filter, for a part of an export
    errno.EACCES: Refusal.PLACE,
    errno.EROFS: Refusal.PLACE,
    errno.ENOMEM: Refusal.PLACE,
    errno.EAGAIN: Refusal.PLACE,
    errno.EBUSY: Refusal.PLACE,
    errno.ENOSPC: Refusal.FULL,
    errno.EDQUOT: Refusal.FULL,
    errno.EFBIG: Refusal.FULL,
    errno.EOPNOTSUPP: Refusal.NOT_OFFERED,
    errno.ENOSYS: Refusal.NOT_OFFERED,
    errno.ENOTTY: Refusal.NOT_OFFERED,
}


def judge(error: OSError, answers: bool) -> Refusal:
    """What the error of a write says; `answers`: the secondary was there when it came, and what
    failed will not be carried out later."""
    if not answers or isinstance(error, Unanswered):
        return Refusal.GONE
    refusal = _BY_ERRNO.get(error.errno or 0, Refusal.GONE)
    # A secondary that does not take plain writes is none.
    return Refusal.GONE if refusal is Refusal.NOT_OFFERED else refusal


def may_do_without(error: OSError, answers: bool) -> bool:
    """Whether an operation that is not needed failed for itself, and the plain form may work."""
    return answers and not isinstance(error, Unanswered) and error.errno in _BY_ERRNO
