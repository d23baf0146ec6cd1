"""copier/refusals: the table, and what goes before it."""

from __future__ import annotations

import errno

import pytest

from bitmapd.copier.refusals import Refusal, judge, may_do_without
from bitmapd.errors import Unanswered

EXPECTED = {
    Refusal.PLACE: "EIO EINVAL EREMOTEIO EILSEQ ENODATA EBADE EOVERFLOW ENOMEM EAGAIN EBUSY"
    " EPERM EACCES EROFS",
    Refusal.FULL: "ENOSPC EDQUOT EFBIG",
    Refusal.GONE: "ENOTCONN ECONNRESET EPIPE ETIMEDOUT ESHUTDOWN ENODEV ENXIO EPROTO ECANCELED"
    " EBADF EOPNOTSUPP ENOSYS ENOTTY",
}
CASES = [(name, refusal) for refusal, names in EXPECTED.items() for name in names.split()]


@pytest.mark.parametrize(("name", "refusal"), CASES)
def test_what_the_error_of_a_write_says(name: str, refusal: Refusal) -> None:
    error = OSError(getattr(errno, name), name)
    assert judge(error, answers=True) is refusal
    assert judge(error, answers=False) is Refusal.GONE


@pytest.mark.parametrize(("name", "refusal"), CASES)
def test_whether_the_plain_form_may_work(name: str, refusal: Refusal) -> None:
    error = OSError(getattr(errno, name), name)
    not_offered = name in ("EOPNOTSUPP", "ENOSYS", "ENOTTY")
    assert may_do_without(error, answers=True) == (not_offered or refusal is not Refusal.GONE)
    assert not may_do_without(error, answers=False)


def test_what_was_not_answered_is_gone_whatever_its_number() -> None:
    error = Unanswered(errno.EIO, "the connection was lost")
    assert judge(error, answers=True) is Refusal.GONE
    assert not may_do_without(error, answers=True)


def test_an_error_without_a_number_is_gone() -> None:
    assert judge(OSError("what?"), answers=True) is Refusal.GONE
    assert not may_do_without(OSError("what?"), answers=True)
