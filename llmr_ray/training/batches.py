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
    """The global batch of one step: rows of the groups table, int64 [N]."""

    dataset: str
    epoch: int
    rows: np.ndarray

    def of_rank(self, rank: int, world_size: int) -> range:
        """The positions in `rows` that a rank works on."""
        size = len(self.rows) // world_size
        return range(rank * size, (rank + 1) * size)


class Plan:
    """Which rows each step trains on.

    homogeneous: a block holds one data set; every epoch each data set is shuffled, cut into blocks, and the blocks of
    all data sets are shuffled. A data set occurs `repeat` times per epoch, each time in another order. Rows that do
    not fill a block wait for another epoch, but a data set smaller than a block fills one cyclically: the released
    code loses such a data set altogether.
    mixed: the rows of all data sets together are shuffled and cut.

    Args:
        rows: row numbers of each data set, in a fixed order.
        repeats: how often each data set occurs in an epoch (1 where it is not named).
        batch_size: queries of a block, over all workers.
        batching: homogeneous or mixed.
        seed: of the run.
    """

    def __init__(
        self,
        rows: Mapping[str, np.ndarray],
        *,
        repeats: Mapping[str, int],
        batch_size: int,
        batching: str,
        seed: int,
    ) -> None:
        filled = {name: np.asarray(numbers, dtype=np.int64) for name, numbers in sorted(rows.items()) if len(numbers)}
        times = {name: repeats.get(name, 1) for name in filled}
        if batching == MIXED and filled:
            filled = {MIXED: np.concatenate([np.tile(numbers, times[name]) for name, numbers in filled.items()])}
            times = {MIXED: 1}
        self._sources = [(name, turn) for name in filled for turn in range(times[name])]
        self._rows, self._batch_size, self._seed = filled, batch_size, seed
        self.blocks_per_epoch = sum(max(1, len(filled[name]) // batch_size) for name, _ in self._sources)
        if not self.blocks_per_epoch:
            raise DataError("there is no group to train on. Look at the reasons why queries were left out.")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def block(self, step: int) -> Block:
        """The global batch of a step, counted from 0."""
        epoch, number = divmod(step, self.blocks_per_epoch)
        return self._epoch(epoch)[number]

    def _make_epoch(self, epoch: int) -> list[Block]:
        blocks = []
        for name, turn in self._sources:
            rng = np.random.default_rng(seed_of(self._seed, "rows", epoch, f"{name}/{turn}"))
            shuffled = rng.permutation(self._rows[name])
            if len(shuffled) < self._batch_size:
                shuffled = np.resize(shuffled, self._batch_size)
            for number in range(len(shuffled) // self._batch_size):
                cut = shuffled[number * self._batch_size : (number + 1) * self._batch_size]
                blocks.append(Block(dataset=name, epoch=epoch, rows=cut))
        order = np.random.default_rng(seed_of(self._seed, "blocks", epoch, "")).permutation(len(blocks))
        return [blocks[number] for number in order]
