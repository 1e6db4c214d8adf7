"""The plan of batches: a pure function of (seed, epoch), made for the whole job and sliced by rank.

One worker and eight see the same batches, and resuming needs the step alone (methods.md A.6.1, mode `epoch`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llmr_ray.artifacts import seed_of
from llmr_ray.errors import DataError

MIXED = "mixed"
"""The data set's name of a block that draws from all of them."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """The global batch of one step: rows of the groups table, int64 [N]; `dataset` names their source."""

    dataset: str
    epoch: int
    rows: np.ndarray

    def of_rank(self, rank: int, world_size: int) -> range:
        """The positions in `rows` that a rank works on."""
        size = len(self.rows) // world_size
        return range(rank * size, (rank + 1) * size)


class Plan:
    """Which rows each step trains on.

    homogeneous: a block holds one source of rows, a data set or a task. Each source is shuffled and cut into blocks,
    and shuffled anew when they are used up; the blocks of an epoch are shuffled together. A source occurs `repeat`
    times, each time in another order. Rows that do not fill a block wait for another pass, but a source smaller than a
    block fills one cyclically: the released code loses such a data set altogether.
    heterogeneous: a block is several smaller ones of that kind, which follow each other in its rows.
    mixed: the rows of all sources together are shuffled and cut.

    An epoch has as many blocks as all sources together. How many of them each source gets:
      proportional: its own, so that an epoch is one pass over everything (the released mode `epoch`);
      temperature: in proportion to its own to the power of 1 / T, so that small sources are seen more often;
      round_robin: equally many, one of each in turn.

    Args:
        rows: row numbers of each source, in a fixed order.
        repeats: how often each source occurs (1 where it is not named).
        batch_size: queries of a block, over all workers.
        batching: homogeneous, heterogeneous or mixed.
        shares: parts of a heterogeneous block; must divide batch_size.
        seed: of the run.
        mix: proportional, temperature or round_robin.
        mix_temperature: T; 1 is proportional.
        order: of an epoch's blocks: shuffled, or sequential (one source after the other).
    """

    def __init__(
        self,
        rows: Mapping[str, np.ndarray],
        *,
        repeats: Mapping[str, int],
        batch_size: int,
        batching: str,
        seed: int,
        shares: int = 1,
        mix: str = "proportional",
        mix_temperature: float = 1.0,
        order: str = "shuffled",
    ) -> None:
        filled = {name: np.asarray(numbers, dtype=np.int64) for name, numbers in sorted(rows.items()) if len(numbers)}
        if not filled:
            raise DataError("there is no group to train on. Look at the reasons why queries were left out.")
        times = {name: repeats.get(name, 1) for name in filled}
        if batching == MIXED:
            filled = {MIXED: np.concatenate([np.tile(numbers, times[name]) for name, numbers in filled.items()])}
            times = {MIXED: 1}
        self._shares = shares if batching == "heterogeneous" else 1
        self._rows, self._part_size, self._seed = filled, batch_size // self._shares, seed
        self._takes_turns, self._is_sequential = mix == "round_robin", order == "sequential"
        sources = [(name, turn) for name in filled for turn in range(times[name])]
        self._num_parts = {source: max(1, len(filled[source[0]]) // self._part_size) for source in sources}
        self._quotas = _quotas(self._num_parts, mix, mix_temperature)
        self.parts_per_epoch = sum(self._quotas.values())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def block(self, step: int) -> Block:
        """The global batch of a step, counted from 0."""
        parts = [self._part(place) for place in range(step * self._shares, (step + 1) * self._shares)]
        names = {part.dataset for part in parts}
        return Block(
            dataset=names.pop() if len(names) == 1 else MIXED,
            epoch=parts[0].epoch,
            rows=np.concatenate([part.rows for part in parts]),
        )

    def _part(self, place: int) -> Block:
        epoch, number = divmod(place, self.parts_per_epoch)
        return self._epoch(epoch)[number]

    def _make_epoch(self, epoch: int) -> list[Block]:
        of_source = [self._of_source(source, epoch) for source in self._quotas]
        rng = np.random.default_rng(seed_of(self._seed, "blocks", epoch, ""))
        if self._takes_turns:
            orders = [rng.permutation(len(of_source)) for _ in of_source[0]]
            return [of_source[place][turn] for turn, order in enumerate(orders) for place in order]
        blocks = [block for blocks in of_source for block in blocks]
        if self._is_sequential:
            return blocks
        return [blocks[number] for number in rng.permutation(len(blocks))]

    def _of_source(self, source: tuple[str, int], epoch: int) -> list[Block]:
        """The source's next blocks: its passes follow each other, whatever the epochs."""
        (name, turn), quota, num_blocks = source, self._quotas[source], self._num_parts[source]
        size, passes, blocks = self._part_size, dict[int, np.ndarray](), []
        for place in range(epoch * quota, (epoch + 1) * quota):
            number_of_pass, number = divmod(place, num_blocks)
            if number_of_pass not in passes:
                rng = np.random.default_rng(seed_of(self._seed, "rows", number_of_pass, f"{name}/{turn}"))
                shuffled = rng.permutation(self._rows[name])
                passes[number_of_pass] = np.resize(shuffled, max(size, len(shuffled)))
            cut = passes[number_of_pass][number * size : (number + 1) * size]
            blocks.append(Block(dataset=name, epoch=epoch, rows=cut))
        return blocks


def _quotas(num_blocks: dict[tuple[str, int], int], mix: str, temperature: float) -> dict[tuple[str, int], int]:
    """Blocks of each source in an epoch; at least one."""
    total = sum(num_blocks.values())
    if mix == "proportional":
        return num_blocks
    if mix == "round_robin":
        return dict.fromkeys(num_blocks, -(-total // len(num_blocks)))
    counts = np.asarray(list(num_blocks.values()), dtype=np.float64)
    weights = (counts / counts.max()) ** (1 / temperature)
    exact = total * weights / weights.sum()
    quotas = np.floor(exact).astype(int)
    # The blocks that rounding left over go to the largest remainders, ties to the first.
    for place in np.argsort(-(exact - quotas), kind="stable")[: total - quotas.sum()]:
        quotas[place] += 1
    return {source: max(1, int(quota)) for source, quota in zip(num_blocks, quotas, strict=True)}
