"""The Spin models of two nodes hold; seeded mistakes give counterexamples; good ends are reached.

MODEL_FULL=1 adds the larger searches (minutes, and up to 2 GB of memory).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import spin

pytestmark = pytest.mark.skipif(spin.IS_MISSING, reason=spin.MISSING)

Search = tuple[str, str]  # a model, and its definitions: NAME or NAME=NUMBER, parted by blanks

# What is not named in a search of coherence.pml; WRITES and WRITES1: of the hosts of either node.
SMALLEST = {"CUTS": 0, "READS": 0, "GUESSES": 0, "WRITES": 1}


def coherence(*defines: str) -> Search:
    return "coherence.pml", " ".join(defines)


def pair(*defines: str) -> Search:
    return "pair.pml", " ".join(defines)


def memory(*defines: str) -> Search:
    return "memory.pml", " ".join(("CUTS=1", *defines))


def keeper(*defines: str) -> Search:
    return "keeper.pml", " ".join(defines)


def kernel(*defines: str) -> Search:
    return "kernel.pml", " ".join(defines)


MEETS = coherence("WRITES=2")
CUT = coherence("CUTS=1")
CRASH = coherence("CRASHES=1")
STOP = coherence("STOPS=1")
TAKE = coherence("TAKES=1")
CUT_AND_CRASH = coherence("CUTS=1", "CRASHES=1")
GO_ON = coherence("GO_ON", "CUTS=1", "CRASHES=1")
STORED_HERE = memory("CRASHES=2")
STORED_THERE = memory("CRASHES=2", "STORE", "FAILS=1")
IN_MEMORY = memory("CRASHES=2", "RELY=3")
FALLS_BACK = memory("CRASHES=1", "FAILS=1")
KEPT = keeper()
KEPT_STORED = keeper("STORE")
OUTLIVES = kernel("CRASHES=1")
READS_OTHER = memory("CRASHES=2", "SHARED", "RELY=3")

HOLDS = [
    MEETS,
    coherence("CUTS=2", "WRITES=2"),
    coherence("CUTS=1", "GUESSES=1"),
    coherence("CUTS=1", "READS=1"),
    CUT_AND_CRASH,
    coherence("CRASHES=2"),
    coherence("CACHE", "READS=1"),
    coherence("HANDS=1", "CUTS=1"),
    coherence("STOPS=1", "CUTS=1"),
    coherence("TAKES=1", "CUTS=1"),
    GO_ON,
    pair(),
    pair("ACK_STORED"),
    pair("BOTH"),
    pair("GO_ON"),
    pair("GO_ON", "SHARED"),
    pair("GO_ON", "SHARED", "BOTH"),
    pair("RECEIVER"),
    STORED_HERE,
    STORED_THERE,
    IN_MEMORY,
    FALLS_BACK,
    READS_OTHER,
    KEPT,
    KEPT_STORED,
    keeper("RELY"),
    keeper("RELY", "STORE"),
    keeper("GO_ON"),
    kernel(),
    kernel("TAKES=1"),
]
FULL = [
    coherence("READS=1", "GUESSES=1", "CUTS=0", "WRITES=2"),
    coherence("CUTS=2", "WRITES=2", "WRITES1=2"),
    coherence("CUTS=1", "CRASHES=1", "WRITES=2"),
    coherence("CUTS=1", "CRASHES=2", "WRITES=2"),
    coherence("CUTS=1", "CRASHES=1", "READS=1"),
    coherence("CUTS=1", "CRASHES=1", "TAKES=1"),
    coherence("CUTS=2", "TAKES=1"),
    coherence("TAKES=1", "HANDS=1", "STOPS=1", "CUTS=1"),
    coherence("CACHE", "READS=1", "WRITES=2"),
    coherence("CACHE", "CUTS=1", "READS=1"),
    coherence("STOPS=1", "CUTS=1", "CRASHES=1"),
    coherence("HANDS=1", "CUTS=2", "WRITES=2", "WRITES1=2"),
    coherence("GO_ON", "CUTS=2", "CRASHES=2"),
    coherence("GO_ON", "STOPS=1", "CUTS=1", "CRASHES=1"),
    pair("WRITES=3", "CUTS=3", "CRASHES=3"),
    memory("CRASHES=2", "FAILS=1", "RELY=2"),
    memory("CRASHES=2", "FAILS=1", "RELY=1", "STORE"),
    memory("CRASHES=2", "FAILS=1", "SHARED", "STORE"),
    memory("FAILS=2", "RELY=3"),
    keeper("GO_ON", "RELY"),
    keeper("GO_ON", "RELY", "STORE"),
    keeper("FAILS"),
    keeper("FAILS", "STORE"),
    kernel("CUTS=2", "CRASHES=3", "TAKES=1", "WRITES=3"),
]
MISTAKES = {
    "BUG_ABSORB_CLEAN": [CRASH],
    "BUG_ACK_BEFORE_RECORD": [MEETS],
    "BUG_ACK_EARLY": [pair()],
    "BUG_ADOPTED_CLEAN": [OUTLIVES],
    "BUG_ALONE_DURING_EXCHANGE": [CUT_AND_CRASH],
    "BUG_ASKED_IS_GRANTED": [pair()],
    "BUG_BOTH_GRANT": [MEETS],
    "BUG_BYE_BEFORE_COPIES_END": [STOP],
    "BUG_BYE_BEFORE_LACKS": [KEPT_STORED],
    "BUG_CLEAR_AT_ONCE": [MEETS],
    "BUG_COMPLETE_BEFORE_READY": [KEPT_STORED],
    "BUG_COPIED_IS_CLEAN": [OUTLIVES],
    "BUG_COPY_UNDER_EMBARGO": [MEETS],
    "BUG_CUT_WRITES_ON": [CUT],
    "BUG_DIRECT_IS_DROPPED": [OUTLIVES],
    "BUG_DIRECT_UNSAID": [OUTLIVES],
    "BUG_DIRECT_UNSTORED": [OUTLIVES],
    "BUG_DIRT_STAYS": [MEETS],
    "BUG_DROP_UNDER_ADD": [pair("BOTH")],
    "BUG_EMBARGO_FORGOTTEN": [CUT],
    "BUG_EMBARGO_PASSED_ON": [MEETS],
    "BUG_EXCHANGE_CLEARS_FLAG": [IN_MEMORY],
    "BUG_FAILED_RECORD_IS_TRUSTED": [keeper("FAILS", "STORE")],
    "BUG_FENCE_LEAVES_THE_KERNEL": [kernel()],
    "BUG_FLAG_BEFORE_DESTAGE": [pair(), IN_MEMORY],
    "BUG_FLAG_UNREAD": [READS_OTHER],
    "BUG_FREE_MEANS_NOW": [CUT],
    "BUG_FRESH_CLEARS_FLAG": [IN_MEMORY],
    "BUG_FRESH_RECORD_UNSEEN": [GO_ON],
    "BUG_GIVER_FORGETS": [MEETS],
    "BUG_GIVE_IN_FLIGHT": [MEETS],
    "BUG_GIVE_UNHARDENED": [coherence("CACHE", "WRITES=2")],
    "BUG_GO_ON_IN_MEMORY": [pair("GO_ON")],
    "BUG_GRANTED_IS_GIVEN_FIRST": [MEETS],
    "BUG_GRANTS_UNSTORED": [STORED_THERE],
    "BUG_GRANT_TWICE": [STOP],
    "BUG_GUESS_TAKES": [coherence("GUESSES=1")],
    "BUG_HOLDER_ACKS_FIRST": [pair()],
    "BUG_HOLDER_FORGETS": [pair()],
    "BUG_KEEPER_PASSES_FOR_COMPLETE": [KEPT],
    "BUG_KEEPER_UNASKED": [KEPT],
    "BUG_LOST_GRANT_CLEAN": [CUT],
    "BUG_NEW_RECORD_IS_TRUSTED": [KEPT],
    "BUG_NOTHING_OWED": [CUT],
    "BUG_NO_EMBARGO": [MEETS],
    "BUG_NO_FENCE": [pair()],
    "BUG_NO_FLAG": [pair(), IN_MEMORY],
    "BUG_NO_GOT": [STOP],
    "BUG_OLD_DIRT": [coherence("CUTS=2", "WRITES=2", "WRITES1=2")],
    "BUG_ONLY_OWN_FLAG": [IN_MEMORY],
    "BUG_OTHER_IS_DROPPED": [STORED_HERE],
    "BUG_OWED_IS_DROPPED": [STORED_HERE],
    "BUG_OWED_IS_NOT_KNOWN": [CUT],
    "BUG_OWN_COPY_FORGOTTEN": [MEETS],
    "BUG_OWN_RECORD_UNREAD": [KEPT],
    "BUG_READY_BEFORE_FLAG": [IN_MEMORY],
    "BUG_READY_UNSTORED": [STORED_THERE, KEPT_STORED],
    "BUG_READ_WITHOUT_ASKING": [coherence("CACHE", "READS=1")],
    "BUG_RECLAIM_BEFORE_READY": [CUT],
    "BUG_RECORD_OF_START": [STORED_THERE],
    "BUG_RECORD_OF_WHO_RELIES_IS_TRUSTED": [keeper("RELY", "STORE")],
    "BUG_RELIES_ON_FAILING": [memory("FAILS=2", "RELY=1")],
    "BUG_REMOVE_BEFORE_COPIED": [pair()],
    "BUG_RESTART_BEFORE_GHOSTS": [CRASH],
    "BUG_STATUS_UNHARDENED": [coherence("CACHE", "READS=1")],
    "BUG_STORED_IS_OWN_ONLY": [memory("CRASHES=2", "FAILS=1")],
    "BUG_TAKEN_BEFORE_GIVEN": [TAKE],
    "BUG_TAKEN_BEFORE_THE_STACK_IS_DOWN": [kernel("CRASHES=0", "TAKES=1")],
    "BUG_TAKEN_OVER_AT_HELLO": [OUTLIVES],
    "BUG_TERM_NOT_TOLD": [pair("RECEIVER")],
    "BUG_TIMEOUT_IS_PROOF": [CUT_AND_CRASH],
    "BUG_TRUSTS_AFTER_CUT": [GO_ON, pair("GO_ON")],
    "BUG_TRUSTS_AFTER_RESTART": [pair()],
    "BUG_UNION_IS_OWN_ONLY": [coherence("CRASHES=2")],
    "BUG_UNION_LOST_BY_A_CUT": [coherence("GO_ON", "CUTS=2", "CRASHES=1")],
    "BUG_VOLATILE_IS_TRUSTED": [keeper("RELY")],
}
# Else a model could hold because nothing ever happens in it.
WITNESSES = {
    "WITNESS_ALONE": [KEPT],
    "WITNESS_BACK": [pair()],
    "WITNESS_COMPARED": [IN_MEMORY, KEPT],
    "WITNESS_CROSSED": [MEETS],
    "WITNESS_FENCED": [kernel()],
    "WITNESS_FETCHED": [KEPT],
    "WITNESS_GONE_ON": [pair("GO_ON")],
    "WITNESS_NOTHING_COPIED": [pair()],
    "WITNESS_OUTLIVED": [OUTLIVES],
    "WITNESS_READ": [READS_OTHER],
    "WITNESS_REST_IS_TAKEN_OVER": [OUTLIVES],
    "WITNESS_RETURNED": [CUT],
    "WITNESS_ROUND_TRIP": [MEETS],
    "WITNESS_STOOD_IN": [FALLS_BACK],
    "WITNESS_TAKEN": [TAKE],
    "WITNESS_TOOK_OVER": [pair()],
    "WITNESS_UNION": [coherence("CRASHES=2"), IN_MEMORY],
}
FOUND = spin.searches(MISTAKES | WITNESSES)


def errors(folder: Path, search: Search, *defines: str) -> int:
    """How many errors an exhaustive search finds; it ends at the first one."""
    model, scope = search
    given = scope.split()
    named = {define.partition("=")[0] for define in given}
    defaults = SMALLEST if model == "coherence.pml" else {}
    bounds = [f"{name}={number}" for name, number in defaults.items() if name not in named]
    return spin.errors(
        folder, model, [*given, *bounds, *defines], ends_early=bool(defines), collapse=True
    )


@pytest.mark.parametrize("search", HOLDS, ids=" ".join)
def test_the_models_hold(tmp_path: Path, search: Search) -> None:
    assert errors(tmp_path, search) == 0


@pytest.mark.skipif(not spin.FULL, reason="MODEL_FULL is not set: takes minutes")
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("search", FULL, ids=" ".join)
def test_the_models_hold_at_large(tmp_path: Path, search: Search) -> None:
    assert errors(tmp_path, search) == 0


@pytest.mark.parametrize(("search", "name"), FOUND, ids="".join)
def test_a_mistake_or_a_good_end_is_found(tmp_path: Path, search: Search, name: str) -> None:
    assert errors(tmp_path, search, name) == 1


MODELS = ["coherence.pml", "pair.pml", "memory.pml", "keeper.pml", "kernel.pml"]


@pytest.mark.parametrize("model", MODELS)
def test_every_mistake_and_good_end_is_tried(model: str) -> None:
    assert spin.mistakes_and_ends(model) == {name for search, name in FOUND if search[0] == model}
