import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.plan import PLAN_VERSION, RolePlan, check_lanes, lanes_of, pass_batches
from dataio.spec import DataError


def plan_of(sizes, batch=8, lanes=2, window=7, seed=3, role="labelled"):
    return RolePlan(role, sizes, batch=batch, lanes=lanes, window=window, seed=seed)


def one_pass(plan, consumed=0):
    """The global batches up to the next end of a pass, and the counter there."""
    batches = []
    while True:
        batches.append([plan.slots(consumed, lane) for lane in range(plan.lanes)])
        consumed = plan.advance(consumed)
        if consumed % plan.samples == 0:
            return batches, consumed


def places(batches):
    return [(s.shard, s.index) for batch in batches for lane in batch for s in lane if s is not None]


sizes_st = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum)


@settings(max_examples=150, deadline=None)
@given(
    sizes=sizes_st, lanes=st.integers(1, 6), share=st.integers(1, 5), window=st.integers(1, 60), seed=st.integers(0, 9)
)
def test_every_sample_exactly_once_per_pass(sizes, lanes, share, window, seed):
    plan = plan_of(sizes, batch=lanes * share, lanes=lanes, window=window, seed=seed)
    everything = sorted((shard, i) for shard, size in enumerate(sizes) for i in range(size))
    consumed = 0
    for epoch in range(2):
        batches, consumed = one_pass(plan, consumed)
        assert consumed == (epoch + 1) * sum(sizes)
        assert sorted(places(batches)) == everything
        assert {s.epoch for batch in batches for lane in batch for s in lane if s} == {epoch}
        full = [all(s is not None for lane in batch for s in lane) for batch in batches]
        assert all(full[:-1]), "only the last batch of a pass may be partial"
        assert all(len(lane) == share for batch in batches for lane in batch)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_st, share=st.integers(1, 3), window=st.integers(1, 60), data=st.data())
def test_continuing_from_any_counter_gives_the_same_batches(sizes, share, window, data):
    plan = plan_of(sizes, batch=4 * share, lanes=4, window=window)
    counters = [0]
    for _ in range(12):
        counters.append(plan.advance(counters[-1]))
    start = data.draw(st.sampled_from(counters))
    fresh = plan_of(sizes, batch=4 * share, lanes=4, window=window)
    for consumed in counters[counters.index(start) :]:
        for lane in range(4):
            assert fresh.slots(consumed, lane) == plan.slots(consumed, lane)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_the_lanes_without_overlap(world_size):
    served = [list(lanes_of("labelled", 4, rank, world_size)) for rank in range(world_size)]
    assert sorted(itertools.chain(*served)) == [0, 1, 2, 3]
    assert all(lane % world_size == rank for rank, lanes in enumerate(served) for lane in lanes)


def test_lanes_are_contiguous_and_even():
    plan = plan_of([10, 13], batch=15, lanes=5)
    spans = [plan.lane_span(lane) for lane in range(5)]
    assert spans[0][0] == 0
    assert spans[-1][1] == 23
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert {stop - start for start, stop in spans} == {4, 5}


def test_samples_stay_within_their_window():
    plan = plan_of([25, 30, 5], window=20)
    natural = {}
    for shard in plan._pass(0)[0].tolist():
        for i in range([25, 30, 5][shard]):
            natural[shard, i] = len(natural)
    order = plan.order(0, 0, 60)
    assert [s.position for s in order] == list(range(60))
    assert all(natural[(s.shard, s.index)] // 20 == s.position // 20 for s in order)
    assert [natural[(s.shard, s.index)] for s in order] != list(range(60))
    assert plan.order(0, 17, 43) == order[17:43]


def test_fewer_samples_than_a_batch():
    plan = plan_of([1, 0, 2], batch=8, lanes=4)
    batches, consumed = one_pass(plan)
    assert (len(batches), consumed) == (1, 3)
    assert sum(s is None for lane in batches[0] for s in lane) == 5


def test_epochs_roles_and_seeds_differ():
    first = plan_of([20, 20]).order(0, 0, 40)
    orders = [
        plan_of([20, 20]).order(1, 0, 40),
        plan_of([20, 20], seed=4).order(0, 0, 40),
        plan_of([20, 20], role="unlabelled").order(0, 0, 40),
    ]
    for order in orders:
        assert [(s.shard, s.index) for s in order] != [(s.shard, s.index) for s in first]


def test_order_is_pinned():
    """A checkpoint's counter means this order. When it has to change, raise PLAN_VERSION and pin the new one."""
    plan = plan_of([3, 2, 4], batch=4, lanes=2, window=4, seed=0)
    assert PLAN_VERSION == 1
    assert places(one_pass(plan)[0]) == GOLDEN


GOLDEN = [(1, 0), (2, 1), (0, 0), (2, 2), (2, 0), (1, 1), (0, 1), (2, 3), (0, 2)]


def test_nothing_large_is_built():
    plan = plan_of([10_000] * 6_200, batch=128, lanes=16, window=512)  # 62 M samples
    consumed = 128 * 400_000
    slots = [s for lane in range(16) for s in plan.slots(consumed, lane)]
    assert len(set(slots)) == 128
    assert len(plan._windows._values) <= 18


def test_a_larger_batch_can_go_on_from_the_counter():
    """The counter says how far every lane is, so exactly-once survives a changed batch."""
    small, large = plan_of([40], batch=4, lanes=2), plan_of([40], batch=8, lanes=2)
    before = [small.slots(consumed, lane) for consumed in (0, 4, 8) for lane in range(2)]
    after, _ = one_pass(large, 12)
    assert sorted(places([before]) + places(after)) == [(0, i) for i in range(40)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: plan_of([9], batch=10, lanes=4), "lanes may be 1, 2, 5, 10"),
        (lambda: plan_of([9], batch=0), "batch is 0"),
        (lambda: plan_of([9], batch=4, lanes=0), "lanes may be 1, 2, 4"),
        (lambda: plan_of([0, 0]), "no samples"),
        (lambda: plan_of([9], window=0), "shuffle_window is 0"),
        (lambda: plan_of([9]).slots(3, 0), "3 samples consumed is no state"),
        (lambda: plan_of([9]).advance(-2), "no state"),
        (lambda: check_lanes("unlabelled", 8, 8, per_lane=2), "lanes may be 1, 2, 4"),
        (lambda: check_lanes("unlabelled", 1, 1, per_lane=2), "at least 2 samples per lane"),
        (lambda: lanes_of("labelled", 2, 0, 3), "data.roles.labelled.lanes to at least 3"),
    ],
)
def test_refusals_name_the_remedy(make, words):
    with pytest.raises(DataError, match=words):
        make()


@given(samples=st.integers(1, 60), lanes=st.integers(1, 5), share=st.integers(1, 4))
def test_the_batches_of_a_pass_are_counted_the_partial_one_included(samples, lanes, share):
    plan = RolePlan("r", [samples], batch=lanes * share, lanes=lanes, window=7, seed=0)
    consumed = batches = 0
    while not (batches and plan.ends_pass(consumed)):
        consumed, batches = plan.advance(consumed), batches + 1
    assert batches == pass_batches(samples, lanes * share, lanes)
    assert consumed == samples
