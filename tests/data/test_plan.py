from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_data.reader.plan import Plan, SourceSchedule, cut, reverse_digits
from vjepa_data.settings import BadInput


class Shards:
    """A source whose samples are all eligible."""

    def __init__(self, counts: list[int], name: str = "a") -> None:
        self.counts, self.name = np.array(counts, dtype=np.int64), name
        self.first = np.concatenate([[0], np.cumsum(self.counts)])

    def members(self, shard: int) -> np.ndarray:
        return np.arange(self.first[shard], self.first[shard + 1])


def keys(plan: Plan, step: int) -> list[tuple[int, int]]:
    return [(d.source, d.sample) for d in (plan.draw(step, slot) for slot in range(plan.batch_size))]


uneven = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)


@given(st.integers(1, 200), st.integers(1, 64))
def test_the_lanes_of_an_epoch_partition_its_list(samples: int, lanes: int):
    seen: Counter[tuple[int, int]] = Counter()
    for lane in range(lanes):
        cursor, epochs = 0, []
        while (where := cut(samples, lanes, lane, cursor))[0] < 3:
            seen[where] += 1
            epochs.append(where)
            cursor += 1
        assert epochs == sorted(epochs)  # a lane walks forward through its part
        assert abs(cursor - 3 * samples / lanes) < 1  # no lane falls behind
    assert seen == Counter((e, i) for e in range(3) for i in range(samples))


@settings(deadline=None, max_examples=60)
@given(uneven, st.integers(0, 5), st.sampled_from([1, 2, 4, 6, 8, 12]), st.integers(1, 4), st.data())
def test_an_epoch_covers_each_sample_once(counts: list[int], seed: int, batch: int, window: int, data: st.DataObject):
    lanes = data.draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]))
    plan = Plan([Shards(counts)], [1], seed=seed, batch_size=batch, lanes=lanes, window_shards=window)
    samples = sum(counts)
    epochs: dict[int, Counter[int]] = {0: Counter(), 1: Counter()}
    for step in range(2 * samples // batch + 2 + samples):
        for slot in range(batch):
            draw = plan.draw(step, slot)
            if draw.epoch in epochs:
                epochs[draw.epoch][draw.sample] += 1
    assert epochs[0] == epochs[1] == Counter(range(samples))


@settings(deadline=None, max_examples=60)
@given(uneven, uneven, st.integers(0, 3), st.sampled_from([1, 2, 6, 12, 24]), st.integers(0, 10_000), st.data())
def test_any_world_and_accumulation_fills_the_same_slots(
    a: list[int], b: list[int], seed: int, lanes: int, step: int, data: st.DataObject
):
    batch = lanes * data.draw(st.integers(1, 3))
    world = data.draw(st.sampled_from([n for n in range(1, lanes + 1) if lanes % n == 0]))
    make = lambda: Plan([Shards(a), Shards(b, "b")], [3, 1], seed=seed, batch_size=batch, lanes=lanes)  # noqa: E731
    expected = keys(make(), step)
    plan = make()
    filled = {}
    for rank in range(world):
        mine = plan.slots(rank, world)
        assert len(mine) == batch // world
        for slot in mine:
            draw = plan.draw(step, slot)
            assert slot not in filled
            filled[slot] = (draw.source, draw.sample)
    assert [filled[slot] for slot in range(batch)] == expected


@settings(deadline=None, max_examples=30)
@given(uneven, st.integers(0, 40))
def test_seeking_equals_reading_in_order(counts: list[int], target: int):
    walker = Plan([Shards(counts), Shards([5, 5], "b")], [0.7, 0.3], seed=1, batch_size=4)
    walked = [keys(walker, step) for step in range(target + 1)][-1]
    assert keys(Plan([Shards(counts), Shards([5, 5], "b")], [0.7, 0.3], seed=1, batch_size=4), target) == walked


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.integers(0, 10**12), st.integers(1, 500))
def test_every_part_of_the_schedule_has_the_exact_shares(weights: list[float], start: int, length: int):
    mixture = SourceSchedule(weights)
    for source, weight in enumerate(weights):
        drawn = mixture.count(source, start + length) - mixture.count(source, start)
        walked = sum(mixture.source(p) == source for p in range(start, start + length))
        assert drawn == walked
        share = weight / sum(weights)
        assert abs(drawn - share * length) < 1 + len(weights) / 2 + length * len(weights) / 65536


def test_a_million_draws_have_the_shares_of_v_jepa_2():
    weights = [0.335, 0.100, 0.565]
    mixture = SourceSchedule(weights)
    assert mixture.period == 200
    for source, weight in enumerate(weights):
        assert mixture.count(source, 1_000_000) == round(weight * 1_000_000)


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32])
def test_each_rank_gets_the_exact_shares_in_every_step(world: int):
    plan = Plan([Shards([400]), Shards([400], "b")], [1, 1], seed=0, batch_size=64)
    for step in range(5):
        for rank in range(world):
            mine = [plan.source(step, slot) for slot in plan.slots(rank, world)]
            assert sum(mine) == len(mine) / 2


def test_two_epochs_have_different_orders():
    """Their samples go to other ranks, too."""
    plan = Plan([Shards([50] * 20)], [1], seed=0, batch_size=20, window_shards=2)
    mine = set(plan.slots(0, 2))
    seen = [[plan.draw(s, b) for s in range(50 * e, 50 * e + 50) for b in mine] for e in range(2)]
    a, b = ({d.sample for d in epoch} for epoch in seen)
    assert {d.epoch for d in seen[0]} == {0}
    assert {d.epoch for d in seen[1]} == {1}
    assert 0.3 < len(a & b) / len(a) < 0.7  # 0.5 if they are independent
    assert [d.sample for d in seen[0]] != [d.sample for d in seen[1]]


def test_another_seed_gives_another_stream():
    streams = [[keys(Plan([Shards([100] * 3)], [1], seed=s, batch_size=8), i) for i in range(4)] for s in range(2)]
    assert streams[0] != streams[1]


def test_a_corpus_smaller_than_the_batch_fills_every_slot():
    plan = Plan([Shards([5])], [1], seed=0, batch_size=32)
    drawn = Counter(plan.draw(step, slot).sample for step in range(5) for slot in range(32))
    assert drawn == Counter(dict.fromkeys(range(5), 32))


def test_a_small_corpus_is_shuffled_uniformly():
    pairs = Counter()
    for seed in range(400):
        first = [sample for _, sample in keys(Plan([Shards([4, 4])], [1], seed=seed, batch_size=2), 0)]
        pairs[frozenset(first)] += 1
    expected = 400 / 28  # pairs of 8 samples
    chi2 = sum((pairs[p] - expected) ** 2 / expected for p in pairs) + expected * (28 - len(pairs))
    assert chi2 < 55.5  # 99.9 % of chi-squared with 27 degrees of freedom


def test_a_lane_reads_few_shards_at_a_time():
    plan = Plan([Shards([1000] * 64)], [1], seed=0, batch_size=4, window_shards=4)
    for slot in range(4):
        shards = {plan.draw(step, slot).sample // 1000 for step in range(1000)}
        assert len(shards) <= 8  # two windows at most


def test_replacements_come_from_the_same_source_and_window():
    plan = Plan([Shards([50] * 40), Shards([7], "b")], [1, 1], seed=3, batch_size=8, window_shards=2)
    for slot in range(8):
        draws = [plan.redraw(2, slot, attempt) for attempt in range(1, 9)]
        assert {d.source for d in draws} == {plan.draw(2, slot).source}
        assert len({d.sample // 50 for d in draws}) <= 2
        assert len({d.sample for d in draws}) > 1
        assert plan.redraw(2, slot, 3) == draws[2]
    far = {plan.redraw(2, 0, attempt).sample // 50 for attempt in range(9, 60)}
    assert len(far) > 5 or plan.source(2, 0) == 1


def test_several_clips_of_a_video_lie_in_one_lane():
    plan = Plan([Shards([40])], [1], seed=0, batch_size=8, clips_per_video=2)
    draws = [plan.draw(3, slot) for slot in range(8)]
    assert [d.view for d in draws] == [0, 1] * 4
    assert [d.sample for d in draws[::2]] == [d.sample for d in draws[1::2]]
    epoch = Counter(plan.draw(step, slot).sample for step in range(10) for slot in range(8))
    assert epoch == Counter(dict.fromkeys(range(40), 2))


def test_clips_per_video_may_differ_between_sources():
    plan = Plan([Shards([6]), Shards([4], "b")], [1, 1], seed=0, batch_size=8, lanes=2, clips_per_video=[1, 3])
    drawn = Counter((d.source, d.sample, d.view) for step in range(12) for d in [plan.draw(step, s) for s in range(8)])
    assert drawn == Counter({(0, i, 0): 8 for i in range(6)} | {(1, i, view): 4 for i in range(4) for view in range(3)})


def test_digits_are_reversed():
    assert [reverse_digits(i, 8) for i in range(8)] == [0, 4, 2, 6, 1, 5, 3, 7]
    for size in (1, 7, 12, 24, 3072):
        assert sorted(reverse_digits(i, size) for i in range(size)) == list(range(size))


def test_twenty_million_samples_take_little_time_and_memory():
    import time
    import tracemalloc

    tracemalloc.start()
    plan = Plan([Shards([1000] * 22_000)], [1], seed=0, batch_size=3072)
    began = time.process_time()
    first = [plan.draw(100_000, slot) for slot in plan.slots(5, 128)]
    seconds = time.process_time() - began
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({d.sample for d in first}) == 24
    assert seconds < 1
    assert memory < 20e6


@pytest.mark.parametrize(("lanes", "hint"), [(5, "try lanes=4"), (64, "try lanes=8")])
def test_lanes_that_do_not_divide_the_batch_are_refused(lanes: int, hint: str):
    with pytest.raises(BadInput, match=hint):
        Plan([Shards([10])], [1], seed=0, batch_size=8, lanes=lanes)


def test_a_world_that_does_not_divide_the_lanes_is_refused():
    with pytest.raises(BadInput, match="Try 2, 4, 8 ranks"):
        Plan([Shards([10])], [1], seed=0, batch_size=8).slots(0, 5)


def test_an_empty_source_is_refused():
    with pytest.raises(BadInput, match="source b has no samples"):
        Plan([Shards([10]), Shards([0], "b")], [1, 1], seed=0, batch_size=8)


def test_different_streams_have_different_fingerprints():
    """A plan keeps its fingerprint and draws when it is pickled."""
    import pickle

    plans = [
        Plan([Shards([10, 20])], [1], seed=s, batch_size=b, lanes=n) for s, b, n in [(0, 8, 8), (1, 8, 8), (0, 8, 4)]
    ]
    assert len({p.fingerprint for p in plans}) == 3
    again = pickle.loads(pickle.dumps(plans[0]))
    assert again.fingerprint == plans[0].fingerprint
    assert keys(again, 3) == keys(plans[0], 3)
