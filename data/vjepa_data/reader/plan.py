"""The plan: a function from (step, slot) to a sample. It is arithmetic only, and nothing is stored or replayed.

    shards of a source        0 1 2 3 4 5 6 7       in the order of the index
    permuted for the epoch    5 2 7 0 3 1 6 4       a function of (seed, source, epoch)
    windows of W shards      [5 2 7 0][3 1 6 4]     samples are shuffled within a window
    the list of the epoch     . . . . . . . . .     all N samples, each once
    cut into L lanes         |   |   |   |   |      N // L samples each or one more; lanes alternate in having more
    lane l                    feeds slots l*q .. l*q+q-1 of every step, q = batch / L

A lane walks through its part of epoch 0, then of epoch 1, and so on. Its position at step `s` is a division. Rank `r`
of `world` owns the lanes `l % world == r`. Lanes and batch size are settings of the run and the world is not, so the
same samples fill the same slots for any number of ranks. Several sources are mixed by a fixed schedule with exact,
evenly spread shares. Its counts are arithmetic too, so the cursor of each source in each lane need not be stored.
"""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, runtime_checkable

import numpy as np

from vjepa_data.errors import BadInput
from vjepa_data.rng import generator

LONGEST_PERIOD = 1 << 16  # positions of the schedule of sources; finer weights are rounded to 1/65536


@runtime_checkable
class SampleSource(Protocol):
    """The samples of a source that the plan may draw, by shard."""

    name: str
    """Description that identifies the source in the fingerprint of the plan."""

    @property
    def counts(self) -> np.ndarray:
        """Number of eligible samples of each shard, int64 [shards]."""
        ...

    def members(self, shard: int) -> np.ndarray:
        """Return the ids of the eligible samples of a shard, int64 [counts[shard]]."""
        ...


@dataclass(frozen=True)
class Draw:
    """A sample drawn for a slot."""

    source: int
    """Number of the source in the mixture."""

    sample: int
    """Id in the index of the source."""

    epoch: int
    """Number of complete passes through the source before this draw."""

    position: int
    """Position in the list of the epoch."""

    view: int = 0
    """Number of this clip among consecutive clips of the video, 0 .. clips_per_video - 1."""

    attempt: int = 0
    """0 for the draw of the plan, and 1, 2, ... for replacements of samples that cannot be decoded."""


class Order:
    """The lists of a source: for each epoch, all samples in an order that is well mixed yet reads few shards at once.

    Only the permutations in use are in memory: the shards of an epoch, and the samples of a window. 22 million samples
    in 22,000 shards take 180 kB per epoch and 8 kB per window.
    """

    def __init__(
        self, counts: np.ndarray, *, seed: int, source: int, window_shards: int, windows_kept: int = 256
    ) -> None:
        """Set up the lists. Permutations are made on demand.

        Args:
            counts: samples of each shard, int64 [shards].
            seed: seed of the run.
            source: number of the source in the mixture, so that two sources have different orders.
            window_shards: shards among which samples are shuffled.
            windows_kept: windows whose permutations stay in memory.
        """
        self.counts = np.asarray(counts, dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self.samples = int(self.first[-1])
        self.seed, self.source, self.window_shards = seed, source, window_shards
        self._shards = functools.lru_cache(maxsize=8)(self._permute_shards)
        self._window = functools.lru_cache(maxsize=windows_kept)(self._shuffle_window)

    def at(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the sample at a position of the list of an epoch.

        Args:
            epoch: 0, 1, ...
            position: 0 .. samples - 1.

        Returns:
            Its shard, and its number among the eligible samples of the shard.
        """
        window, inside = self._locate(epoch, position)
        return self._pick(epoch, window, inside)

    def near(self, epoch: int, position: int, draws: np.random.Generator) -> tuple[int, int]:
        """Draw any sample of the window that contains a position. The shards of this window are being read anyway."""
        window, _ = self._locate(epoch, position)
        starts = self._shards(epoch)[1]
        return self._pick(epoch, window, int(draws.integers(int(starts[window + 1] - starts[window]))))

    def anywhere(self, draws: np.random.Generator) -> tuple[int, int]:
        """Draw any sample of the source."""
        ordinal = int(draws.integers(self.samples))
        shard = int(np.searchsorted(self.first, ordinal, side="right")) - 1
        return shard, ordinal - int(self.first[shard])

    def _locate(self, epoch: int, position: int) -> tuple[int, int]:
        starts = self._shards(epoch)[1]
        window = int(np.searchsorted(starts, position, side="right")) - 1
        return window, position - int(starts[window])

    def _pick(self, epoch: int, window: int, inside: int) -> tuple[int, int]:
        shards, ends, shuffled = self._window(epoch, window)
        ordinal = int(shuffled[inside])
        i = int(np.searchsorted(ends, ordinal, side="right"))
        return int(shards[i]), ordinal - (int(ends[i - 1]) if i else 0)

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of an epoch, and the start of each window in its list, then the end."""
        shards = generator(self.seed, "order of shards", self.source, epoch).permutation(len(self.counts))
        shards = shards[self.counts[shards] > 0].astype(np.int32)
        ends = np.cumsum(self.counts[shards])
        starts = np.concatenate([[0], ends[self.window_shards - 1 :: self.window_shards]])
        if starts[-1] != self.samples:
            starts = np.append(starts, self.samples)
        return shards, starts

    def _shuffle_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the shards of a window, their cumulative sample counts, and a permutation of all samples."""
        a = window * self.window_shards
        shards = self._shards(epoch)[0][a : a + self.window_shards]
        ends = np.cumsum(self.counts[shards])
        total = int(ends[-1])
        shuffled = generator(self.seed, "order in window", self.source, epoch, window).permutation(total)
        return shards, ends, shuffled.astype(np.uint16 if total <= 1 << 16 else np.uint32)


def cut(samples: int, lanes: int, lane: int, cursor: int) -> tuple[int, int]:
    """Return the position of a lane after it has drawn `cursor` samples.

    The list of every epoch is cut into `lanes` parts of `samples // lanes` samples or one more. The lanes alternate in
    having the longer part, so no sample is dropped and no lane falls behind: after `e` epochs lane `l` has drawn
    exactly (e * samples + l) // lanes. With fewer samples than lanes some parts are empty.

    Args:
        samples: length of the list of each epoch.
        lanes: number of lanes.
        lane: 0 .. lanes - 1.
        cursor: samples that this lane has drawn before.

    Returns:
        The epoch, and the position in its list.
    """
    epoch = ((cursor + 1) * lanes - 1 - lane) // samples
    inside = cursor - (epoch * samples + lane) // lanes
    every, rest = divmod(samples, lanes)

    def floors(end: int) -> int:  # the sum of i // lanes over i < end
        quotient, remainder = divmod(end, lanes)
        return lanes * quotient * (quotient - 1) // 2 + quotient * remainder

    turn = epoch * rest
    longer_before = (floors(turn + rest + lane) - floors(turn + rest)) - (floors(turn + lane) - floors(turn))
    return epoch, lane * every + longer_before + inside


class SourceSchedule:
    """An endless sequence of source numbers in which each source has its exact share, spread as evenly as possible.

    In any `n` consecutive positions a source appears its share of `n` times, to within one or two. The sequence repeats
    after `period` positions. Weights that need a period above 65,536 are rounded.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [Fraction(w).limit_denominator(1_000_000) for w in weights]
        scale = math.lcm(*(s.denominator for s in shares))
        parts = [int(s * scale) for s in shares]
        divisor = math.gcd(*parts)
        parts = [p // divisor for p in parts]
        if sum(parts) > LONGEST_PERIOD or min(parts) == 0:
            parts = _apportion(weights, LONGEST_PERIOD)
        self.parts = parts
        self.period = sum(parts)
        # The k-th draw of a source is due in the middle of the k-th of its equal parts of the period.
        due = np.concatenate([(np.arange(p) + 0.5) / p for p in parts])
        owner = np.concatenate([np.full(p, i, dtype=np.int32) for i, p in enumerate(parts)])
        self._sequence = owner[np.lexsort((owner, due))]
        self._places = [np.flatnonzero(self._sequence == i) for i in range(len(parts))]

    def source(self, position: int) -> int:
        """Return the source of a position."""
        return int(self._sequence[position % self.period])

    def count(self, source: int, end: int) -> int:
        """Return how often a source appears in positions 0 .. end - 1."""
        periods, rest = divmod(end, self.period)
        return periods * self.parts[source] + int(np.searchsorted(self._places[source], rest))


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` in proportion to `weights`, at least 1 each, by the method of largest remainders."""
    ideal = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * total
    parts = np.maximum(np.floor(ideal).astype(np.int64), 1)
    while (left := total - int(parts.sum())) != 0:
        change = 1 if left > 0 else -1
        gain = (ideal - parts) * change
        gain[(parts + change) < 1] = -np.inf
        parts[int(np.argmax(gain))] += change
    return [int(p) for p in parts]


def reverse_digits(number: int, size: int) -> int:
    """Write `number` in the mixed radix of the prime factors of `size` and read the digits backwards.

    This permutes 0 .. size - 1 so that numbers that are equal modulo 2, 4, 8, ... (then 3, ...) become neighbours.
    Lanes take their part of the list in this order. The lanes of a rank, which are equal modulo the world, then read
    neighbouring parts and so the same shards, and each rank gets the sources in their true proportions.

        size 8:  0 1 2 3 4 5 6 7  ->  0 4 2 6 1 5 3 7
    """
    reversed_number, rest = 0, number
    for p in _prime_factors(size):
        rest, digit = divmod(rest, p)
        reversed_number = reversed_number * p + digit
    return reversed_number


@functools.lru_cache(maxsize=64)
def _prime_factors(number: int) -> tuple[int, ...]:
    factors, p = [], 2
    while number > 1:
        while number % p == 0:
            factors.append(p)
            number //= p
        p += 1
    return tuple(factors)


class Plan:
    """The order of samples: a function from (step, slot) to a sample. The only state of a run is its step."""

    def __init__(
        self,
        sources: Sequence[SampleSource],
        weights: Sequence[float],
        *,
        seed: int,
        batch_size: int,
        lanes: int | None = None,
        window_shards: int = 4,
        clips_per_video: int | Sequence[int] = 1,
    ) -> None:
        """Set up the plan.

        Args:
            sources: the samples of each source.
            weights: share of the stream of each source, relative to other sources.
            seed: seed of the run.
            batch_size: slots of a step over all ranks.
            lanes: cursors through an epoch. Default: as many as the batch allows.
            window_shards: shards among which samples are shuffled.
            clips_per_video: consecutive clips that a lane takes from a video: a number, or a number per source.

        Raises:
            BadInput: a source is empty, or the lanes do not divide the batch.
        """
        for source in sources:
            if int(np.sum(source.counts)) == 0:
                raise BadInput(f"source {source.name} has no samples; check its folder, split and clip length")
        counts = [clips_per_video] * len(sources) if isinstance(clips_per_video, int) else list(clips_per_video)
        if lanes is None:
            lanes = batch_size // max(counts) if batch_size % max(counts) == 0 else batch_size
        if batch_size % lanes:
            near = max(n for n in range(1, min(lanes, batch_size) + 1) if batch_size % n == 0)
            raise BadInput(f"lanes ({lanes}) must divide batch_size ({batch_size}); try lanes={near}")
        self.sources, self.seed = list(sources), seed
        self.batch_size, self.lanes, self.slots_per_lane = batch_size, lanes, batch_size // lanes
        self.window_shards, self.clips_per_video = window_shards, counts
        self.mixture = SourceSchedule(weights)
        self._order_of_lanes = [reverse_digits(lane, lanes) for lane in range(lanes)]
        self.orders = [
            Order(p.counts, seed=seed, source=i, window_shards=window_shards, windows_kept=max(64, 2 * lanes))
            for i, p in enumerate(sources)
        ]
        self._members = functools.lru_cache(maxsize=1024)(lambda source, shard: self.sources[source].members(shard))

    def slots(self, rank: int, world: int) -> tuple[int, ...]:
        """Return the slots that a rank owns in every step, in ascending order.

        Raises:
            BadInput: the number of ranks does not divide the lanes.
        """
        if self.lanes % world:
            good = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
            near = ", ".join(str(n) for n in sorted(sorted(good, key=lambda n: abs(n - world))[:3]))
            raise BadInput(
                f"the number of ranks ({world}) must divide the {self.lanes} lanes of a batch of {self.batch_size}. "
                f"Try {near} ranks, or another batch_size."
            )
        q = self.slots_per_lane
        return tuple(lane * q + j for lane in range(rank, self.lanes, world) for j in range(q))

    def source(self, step: int, slot: int) -> int:
        """Return the source that fills a slot."""
        lane, j = divmod(slot, self.slots_per_lane)
        return self.mixture.source((self._order_of_lanes[lane] + step) * self.slots_per_lane + j)

    def draw(self, step: int, slot: int) -> Draw:
        """Draw the sample that fills a slot of a step. Every step takes the same time."""
        lane, j = divmod(slot, self.slots_per_lane)
        part = self._order_of_lanes[lane]
        start = part * self.slots_per_lane
        position = start + step * self.slots_per_lane + j
        source = self.mixture.source(position)
        cursor = self.mixture.count(source, position) - self.mixture.count(source, start)
        cursor, view = divmod(cursor, self.clips_per_video[source])
        order = self.orders[source]
        epoch, at = cut(order.samples, self.lanes, part, cursor)
        return Draw(source, self._sample(source, *order.at(epoch, at)), epoch, at, view)

    def redraw(self, step: int, slot: int, attempt: int) -> Draw:
        """Draw a replacement for a sample that cannot be decoded. It is of the same source, and no other slot changes.

        The first eight replacements come from the same window, whose shards are open. If all eight fail, an entire
        shard is probably bad, and later replacements come from anywhere in the source.

        Args:
            step, slot: the slot to fill.
            attempt: 1 for the first replacement.
        """
        first = self.draw(step, slot)
        order = self.orders[first.source]
        draws = generator(self.seed, "replacement", step, slot, attempt)
        near = attempt <= 8
        found = order.near(first.epoch, first.position, draws) if near else order.anywhere(draws)
        return Draw(first.source, self._sample(first.source, *found), first.epoch, first.position, first.view, attempt)

    def _sample(self, source: int, shard: int, number: int) -> int:
        return int(self._members(source, shard)[number])

    @property
    def fingerprint(self) -> str:
        """Hash of 16 hex digits, equal for two ranks, or a run and its resumption, if they draw equal samples."""
        counts = [
            hashlib.sha256(np.ascontiguousarray(o.counts, dtype="<i8").tobytes()).hexdigest() for o in self.orders
        ]
        facts = {
            "sources": [[s.name, c, n] for s, c, n in zip(self.sources, counts, self.mixture.parts, strict=True)],
            "seed": self.seed,
            "batch": self.batch_size,
            "lanes": self.lanes,
            "window": self.window_shards,
            "clips_per_video": self.clips_per_video,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple:
        """Pickle the settings and sources without the caches."""
        settings = {"seed": self.seed, "batch_size": self.batch_size, "lanes": self.lanes}
        settings |= {"window_shards": self.window_shards, "clips_per_video": self.clips_per_video}
        return functools.partial(Plan, self.sources, self.mixture.parts, **settings), ()
