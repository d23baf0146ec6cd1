"""receiver/held: which points of a group may be applied."""

from __future__ import annotations

from dataclasses import replace

from bitmapd.receiver.commit import CommitPage, Queued, first_page
from bitmapd.receiver.held import may_be_applied, named

JOURNAL = bytes(range(16))


def page(*groups: int) -> CommitPage:
    queue = tuple(
        Queued(4 + place, bytes(16), 0, bytes(16), 0, group) for place, group in enumerate(groups)
    )
    made = replace(first_page(JOURNAL), applied=3, applied_group=30)
    return replace(made, committed=3 + len(queue), queue=queue)


def free(queue: CommitPage, up_to: int) -> list[int]:
    return [queued.point for queued in may_be_applied(queue.queue, up_to)]


def test_points_of_a_group_wait_until_they_are_named() -> None:
    here = page(40, 1, 60)
    assert free(here, 0) == []
    assert free(here, 3) == []
    assert free(here, 4) == [4]
    assert free(here, 6) == [4, 5, 6], "the one that was cut alone goes along"


def test_a_point_of_no_group_takes_all_before_it_along() -> None:
    assert free(page(0, 0), 0) == [4, 5]
    assert free(page(40, 0, 60), 0) == [4, 5]
    assert free(page(), 0) == []


def test_what_was_named_is_found_by_its_number_in_the_group() -> None:
    here = page(40, 1, 60)
    assert here.groups == (30, 40, 1, 60)
    assert [here.point_of(number) for number in here.groups] == [3, 4, 5, 6]
    assert named(here, 60, 0) == 6
    assert named(here, 40, 6) == 6, "never back"
    assert named(here, 99, 5) == 5, "not here"
