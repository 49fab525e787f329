"""The ledger on its own, against golden orders and a brute-force model; then ledgers in tiers."""

import math
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from arrcoc.cache import Ledger, Moved, TierLedger


def test_lowest_score_per_byte_leaves_first() -> None:
    """Scores per byte: a 1/32 = .03125, b 0.5/10 = .05, c 0.8/40 = .02, d 0.5/16 = .03125."""
    ledger: Ledger[str] = Ledger(98, half_life=10)
    for name, size, relevance in [("a", 32, 1.0), ("b", 10, 0.5), ("c", 40, 0.8), ("d", 16, 0.5)]:
        assert ledger.add(name, size, relevance) == []
    assert ledger.used == 98
    # 10 bytes: c (.02) leaves, 58 + 10 are in use; e has 0.01/10 = .001.
    assert ledger.add("e", 10, 0.01) == ["c"]
    # 50 bytes where 30 are free: e (10 bytes), then a before d at equal scores, being older.
    assert ledger.add("f", 50, 1.0) == ["e", "a"]
    assert ledger.used == 10 + 16 + 50


def test_a_use_adds_relevance() -> None:
    """a 0.2 + 0.4 = 0.6 outlives b 0.5, which is younger."""
    ledger: Ledger[str] = Ledger(2, half_life=10)
    ledger.add("a", 1, 0.2)
    ledger.add("b", 1, 0.5)
    ledger.touch("a", 0.4)
    assert ledger.score("a") == pytest.approx(0.6)
    assert ledger.add("c", 1, 0.0) == ["b"]


def test_recent_use_beats_old_use() -> None:
    """a 0.9 two half-lives ago is 0.225 now, less than b's 0.3."""
    ledger: Ledger[str] = Ledger(2, half_life=4)
    ledger.add("a", 1, 0.9)
    ledger.advance(8)
    ledger.add("b", 1, 0.3)
    assert ledger.score("a") == pytest.approx(0.225)
    assert ledger.add("c", 1, 0.1) == ["a"]


@pytest.mark.parametrize("half_life", [0.5, 1.0, 256.0, 1e6])
def test_score_halves_after_the_half_life(half_life: float) -> None:
    ledger: Ledger[str] = Ledger(10, half_life)
    ledger.add("a", 1, 0.8)
    uses = max(int(half_life), 1)
    ledger.advance(uses)
    assert ledger.score("a") == pytest.approx(0.8 * 0.5 ** (uses / half_life), rel=1e-12)


def test_equal_scores_leave_oldest_first() -> None:
    ledger: Ledger[str] = Ledger(3, half_life=10)
    for name in "xba":
        ledger.add(name, 1, 0.0)
    ledger.touch("x", 0.0)
    assert ledger.add("big", 3, 0.0) == ["x", "b", "a"]


def test_long_life_neither_overflows_nor_loses_order() -> None:
    ledger: Ledger[int] = Ledger(3, half_life=0.01)  # 2e11 half-lives
    ledger.add(0, 1, 1.0)
    for _ in range(2):
        ledger.advance(10**9)
        ledger.add(ledger._stored, 1, 0.5)
    assert ledger.score(2) == pytest.approx(0.5, rel=1e-3)
    assert ledger.score(0) == 0.0  # too small for a float, and yet in order:
    assert ledger.add(3, 2, 0.1) == [0, 1]
    for _ in range(100):
        ledger.advance(10**7)
        ledger.touch(2, 1.0)
    assert math.isfinite(ledger.score(2))


def test_too_large_is_refused_and_changes_nothing() -> None:
    ledger: Ledger[str] = Ledger(10, half_life=10)
    ledger.add("a", 6, 0.1)
    assert ledger.add("b", 11, 1.0) is None
    assert ledger.add("a", 11, 1.0) is None
    assert (len(ledger), ledger.used) == (1, 6)
    assert ledger.score("a") == pytest.approx(0.1)
    assert ledger.add("c", 10, 0.0) == ["a"]


def test_storing_again_keeps_score_and_age_and_takes_the_new_size() -> None:
    ledger: Ledger[str] = Ledger(10, half_life=10)
    ledger.add("a", 4, 0.25)
    ledger.add("b", 4, 0.5)
    assert ledger.add("a", 6, 0.125) == []
    assert ledger.used == 10
    assert ledger.score("a") == pytest.approx(0.375)
    assert ledger.add("c", 1, 0.0) == ["a"]  # .375/6 = .0625 a byte, b .125


def test_low_relevance_leaves_on_demand() -> None:
    """After one half-life: a 0.4, b 0.1, c 0.25; strictly below 0.25 is b alone."""
    ledger: Ledger[str] = Ledger(100, half_life=8)
    for name, relevance in [("a", 0.8), ("b", 0.2), ("c", 0.5)]:
        ledger.add(name, 10, relevance)
    ledger.advance(8)
    assert ledger.evict_low_relevance(0.2499) == ["b"]
    assert ledger.used == 20
    assert ledger.evict_low_relevance(1.0) == ["a", "c"]
    assert (ledger.used, len(ledger)) == (0, 0)


@pytest.mark.parametrize("relevance", [-0.1, math.nan, math.inf])
def test_relevance_must_be_finite_and_not_negative(relevance: float) -> None:
    with pytest.raises(AssertionError, match="relevance"):
        Ledger[str](10, 1.0).add("a", 1, relevance)


def test_queue_of_past_ranks_stays_small() -> None:
    ledger: Ledger[int] = Ledger(10, half_life=10)
    ledger.add(0, 1, 0.5)
    ledger.add(1, 1, 0.6)
    for _ in range(10_000):
        ledger.touch(0, 0.5)
    assert len(ledger._queue) < 100
    assert ledger.add(2, 9, 0.1) == [1]


class LedgerModel(RuleBasedStateMachine):
    """A ledger beside a dict that decays every score at every use and looks at all of them to evict.

    The two round differently, so scores that differ by rounding alone may leave in either order.
    """

    BOUND = 12
    keys = st.integers(0, 6)
    relevances = st.sampled_from([0.0, 0.25, 0.3, 0.7, 1.0])

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger[int] = Ledger(self.BOUND, half_life=3.0)
        self.model: dict[int, list[float]] = {}  # score, size, age
        self.stored = 0

    def leaving(self) -> int:
        return min(self.model, key=lambda k: (self.model[k][0] / self.model[k][1], self.model[k][2]))

    @rule(key=keys, size=st.integers(1, 14), relevance=relevances)
    def add(self, key: int, size: int, relevance: float) -> None:
        evicted = self.ledger.add(key, size, relevance)
        if size > self.BOUND:
            assert evicted is None
            return
        old = self.model.pop(key, None)
        assert evicted is not None
        used = sum(int(entry[1]) for entry in self.model.values())
        for gone in evicted:
            assert used + size > self.BOUND, "evicted without need"
            best, real = self.model[self.leaving()], self.model[gone]
            assert real[0] / real[1] <= best[0] / best[1] * (1 + 1e-9)
            if real[0] == best[0] == 0:
                assert gone == self.leaving(), "exact ties leave oldest first"
            used -= int(self.model.pop(gone)[1])
        assert used + size <= self.BOUND, "too little evicted"
        self.model[key] = [(old[0] if old else 0.0) + relevance, size, old[2] if old else self.stored]
        self.stored += old is None

    @rule(key=keys, relevance=relevances)
    def touch(self, key: int, relevance: float) -> None:
        if key in self.model:
            self.ledger.touch(key, relevance)
            self.model[key][0] += relevance

    @rule(uses=st.integers(1, 5))
    def advance(self, uses: int) -> None:
        self.ledger.advance(uses)
        for entry in self.model.values():
            entry[0] *= 2 ** (-uses / 3.0)

    @rule(threshold=st.floats(0, 1.5))
    def evict_low_relevance(self, threshold: float) -> None:
        if any(abs(entry[0] - threshold) < 1e-9 for entry in self.model.values()):
            return
        low = [k for k, entry in self.model.items() if entry[0] < threshold]
        assert sorted(self.ledger.evict_low_relevance(threshold)) == sorted(low)
        for k in low:
            del self.model[k]

    @rule()
    def clear(self) -> None:
        self.ledger.clear()
        self.model.clear()

    @invariant()
    def same(self) -> None:
        assert len(self.ledger) == len(self.model)
        assert self.ledger.used == sum(entry[1] for entry in self.model.values()) <= self.BOUND
        for k, entry in self.model.items():
            assert k in self.ledger
            assert self.ledger.score(k) == pytest.approx(entry[0], rel=1e-9, abs=1e-12)


TestLedgerModel = LedgerModel.TestCase
TestLedgerModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# Keys with a past.


def test_an_admitted_key_keeps_its_score_and_goes_on_decaying() -> None:
    old, new = Ledger[str](10, half_life=4), Ledger[str](10, half_life=4)
    old.add("a", 1, 0.75)
    old.advance(4)
    new.advance(100)  # the clocks of two ledgers need not agree
    assert new.admit("a", 1, old.take("a")) == []
    assert "a" not in old
    assert old.used == 0
    assert new.score("a") == pytest.approx(0.375)
    new.advance(4)
    assert new.score("a") == pytest.approx(0.1875)


def test_a_key_is_admitted_over_lower_scores_alone() -> None:
    """Scores per byte: a .1/2 = .05, b .4/2 = .2. A key of 4 bytes at .3/4 = .075 would need b's place."""
    ledger: Ledger[str] = Ledger(4, half_life=10)
    ledger.add("a", 2, 0.1)
    ledger.add("b", 2, 0.4)
    assert ledger.admit("c", 4, math.log2(0.3)) is None
    assert ledger.admit("d", 5, 9.0) is None
    assert (sorted(ledger.ranked()), ledger.used) == (["a", "b"], 4)
    assert ledger.score("a") == pytest.approx(0.1)
    assert ledger.admit("c", 2, math.log2(0.3)) == [Moved("a", 2, pytest.approx(math.log2(0.1)))]
    assert ledger.ranked() == ["b", "c"]


def test_a_refused_key_leaves_everything_as_it_was() -> None:
    """Also the order of ties, by which the older of two equals leaves first."""
    ledger: Ledger[str] = Ledger(2, half_life=10)
    ledger.add("a", 1, 0.5)
    ledger.add("b", 1, 0.5)
    assert ledger.admit("c", 2, math.log2(0.99)) is None
    assert ledger.add("d", 1, 1.0) == ["a"]


# Tiers.


def test_what_a_tier_evicts_goes_to_the_next_with_its_score() -> None:
    tiers: TierLedger[str] = TierLedger((2, 2), half_life=10)
    assert [m.key for m in tiers.add("a", 1, 0.2)] == ["a"]
    tiers.add("b", 1, 0.6)
    moved = tiers.add("c", 1, 0.4)
    assert [(m.key, m.size) for m in moved] == [("c", 1), ("a", 1)]
    assert [tiers.where(key) for key in "abc"] == [1, 0, 0]
    assert tiers.tiers[1].score("a") == pytest.approx(0.2)
    tiers.advance()
    tiers.add("d", 1, 0.5)  # c to the second tier, which has room
    assert [tiers.where(key) for key in "abcd"] == [1, 0, 1, 0]
    moved = tiers.add("e", 1, 0.7)  # d moves on; a scores less than c and d, and is gone
    assert [m.key for m in moved] == ["e", "d", "a"]
    assert [tiers.where(key) for key in "abcde"] == [None, 0, 1, 1, 0]
    assert (len(tiers), tiers.used, tiers.max_bytes) == (4, 4, 4)


def test_a_key_that_scores_lowest_passes_through_the_tier_below() -> None:
    tiers: TierLedger[str] = TierLedger((1, 1), half_life=10)
    tiers.add("high", 1, 0.9)
    tiers.add("low", 1, 0.1)  # high moves to the second tier
    moved = tiers.add("new", 1, 0.5)
    assert list(dict.fromkeys(m.key for m in moved)) == ["new", "low"]
    assert [tiers.where(key) for key in ("high", "low", "new")] == [1, None, 0]


def test_a_use_moves_a_key_up_if_it_earns_the_place() -> None:
    tiers: TierLedger[str] = TierLedger((1, 1), half_life=10)
    tiers.add("a", 1, 0.3)
    tiers.add("b", 1, 0.5)
    assert tiers.use("a", 0.1) == 1
    assert tiers.promote("a") == []  # 0.4 against 0.5
    assert tiers.use("a", 0.3) == 1
    assert [m.key for m in tiers.promote("a")] == ["a", "b"]
    assert [tiers.where(key) for key in "ab"] == [0, 1]
    assert tiers.promote("a") == []
    assert tiers.use("c", 1.0) is None


def test_a_past_counts_in_a_new_place() -> None:
    tiers: TierLedger[str] = TierLedger((2, 0), half_life=10)
    tiers.add("a", 1, 0.25, level=math.log2(0.5))
    assert tiers.tiers[0].score("a") == pytest.approx(0.75)


def test_what_is_too_large_for_one_tier_goes_to_the_next_and_for_all_nowhere() -> None:
    tiers: TierLedger[str] = TierLedger((2, 5), half_life=10)
    assert [m.key for m in tiers.add("big", 4, 0.1)] == ["big"]
    assert tiers.where("big") == 1
    assert tiers.promote("big") == []
    assert tiers.add("huge", 6, 0.1) == []
    assert tiers.where("huge") is None


class TierModel(RuleBasedStateMachine):
    """Every key in one tier or none, books balanced, scores independent of where a key is."""

    BOUNDS = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.tiers: TierLedger[int] = TierLedger(self.BOUNDS, half_life=3.0)
        self.held: dict[int, tuple[int, float]] = {}  # size, score

    def follow(self, moved: list[Moved[int]]) -> None:
        for key in {m.key for m in moved}:
            if self.tiers.where(key) is None:
                self.held.pop(key, None)

    @rule(key=st.integers(0, 9), size=st.integers(1, 7), relevance=st.sampled_from([0.0, 0.25, 0.7, 1.0]))
    def add(self, key: int, size: int, relevance: float) -> None:
        if key in self.held:
            assert self.tiers.use(key, relevance) is not None
            self.held[key] = self.held[key][0], self.held[key][1] + relevance
            return
        before = {k: self.tiers.where(k) for k in self.held}
        moved = self.tiers.add(key, size, relevance)
        assert (moved == []) == (size > max(self.BOUNDS))
        changed = {k for k, place in before.items() if self.tiers.where(k) != place}
        assert changed <= {m.key for m in moved}, "whoever moved is told of"
        if moved:
            self.held[key] = size, relevance
            assert self.tiers.where(key) == (0 if size <= self.BOUNDS[0] else 1), "the newest has a place"
        self.follow(moved)

    @rule(key=st.integers(0, 9))
    def promote(self, key: int) -> None:
        place = self.tiers.where(key)
        if place is None:
            return
        moved = self.tiers.promote(key)
        assert self.tiers.where(key) == (0 if moved else place)
        self.follow(moved)

    @rule()
    def advance(self) -> None:
        self.tiers.advance()
        self.held = {key: (size, score * 2 ** (-1 / 3)) for key, (size, score) in self.held.items()}

    @rule(threshold=st.floats(0, 1.5))
    def evict_low_relevance(self, threshold: float) -> None:
        if any(abs(score - threshold) < 1e-9 for _, score in self.held.values()):
            return
        low = {key for key, (_, score) in self.held.items() if score < threshold}
        assert set(self.tiers.evict_low_relevance(threshold)) == low
        for key in low:
            del self.held[key]

    @invariant()
    def books_balance(self) -> None:
        assert len(self.tiers) == len(self.held)
        assert self.tiers.used == sum(size for size, _ in self.held.values())
        for tier, bound in zip(self.tiers.tiers, self.BOUNDS, strict=True):
            assert tier.used <= bound
            ranked = [tier.score(key) for key in tier.ranked()]
            assert all(a >= b * (1 - 1e-12) for a, b in pairwise(ranked))
        for key, (size, score) in self.held.items():
            place = self.tiers.where(key)
            assert place is not None
            assert sum(key in tier for tier in self.tiers.tiers) == 1
            assert self.tiers.tiers[place].size(key) == size
            assert self.tiers.tiers[place].score(key) == pytest.approx(score, rel=1e-9, abs=1e-12)


TestTierModel = TierModel.TestCase
TestTierModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
