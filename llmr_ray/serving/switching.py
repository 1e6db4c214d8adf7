"""Which snapshot is served, and the change to another while requests go on.

The server looks at what the collection names as current. A new snapshot is opened beside the old one everywhere, must
have been made by the same encoder, and answers canary queries well enough; then one assignment switches all requests
that come in from then on. Those under way keep the snapshot that they began with. One that cannot be served leaves the
old one serving, is told of, and is tried again after ever longer waits and whenever the collection names another.

A server that starts does the same: it opens the snapshot before the current one first, and goes on from there. Else
every restart would bring what the running servers refuse. Two kinds of change need no overlap, because an operator
wants them: one that was accepted (collection.accept), and one to an older snapshot, which is a roll-back.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmr_ray.errors import DataError
from llmr_ray.index.snapshot import Named, folder_of, named, read_manifest
from llmr_ray.serving.engine import Engine
from llmr_ray.serving.models import EncoderSpec, Prompted, vector_settings
from llmr_ray.serving.settings import ServingSettings

CANARY_DEPTH = 10
"""Results of a canary query that are compared."""

KEEP_SECONDS = 10.0
"""How often is said again which snapshots are to stay open: a process that takes another's place does not know it."""

FIRST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 300.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Served:
    """The snapshot that is served."""

    snapshot_id: str
    num_documents: int
    dimension: int
    created: str
    since: float
    canary_overlap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A snapshot that is named as current and cannot be served."""

    snapshot_id: str
    reason: str
    attempts: int
    retry_at: float


class Switcher:
    """Keeps a server at the collection's current snapshot.

    Args:
        root: the artifact root.
        settings: of the server.
        engine: opens and searches.
        spec: how queries are embedded.
        canaries: queries for the comparison of two snapshots.
        changed: called after each switch and refusal.
    """

    def __init__(
        self,
        root: Path,
        settings: ServingSettings,
        engine: Engine,
        spec: EncoderSpec,
        canaries: Sequence[Prompted] = (),
        changed: Callable[["Switcher"], None] = lambda _: None,
    ) -> None:
        self._root, self._settings, self._engine, self._spec = root, settings, engine, spec
        self._canaries, self._changed = list(canaries), changed
        self._canary_QD: np.ndarray | None = None
        self._collection = folder_of(root, settings.collection)
        self._one_at_a_time = asyncio.Lock()
        self.served: Served | None = None
        self.refused: Refused | None = None
        self._before: str | None = None
        self._kept_at = 0.0
        self._tried: Named | None = None
        self._overlaps: dict[tuple[str | None, str], float] = {}
        """Of the two snapshots last compared. They do not change, so what is tried again need not be opened again."""

    async def start(self) -> None:
        """Opens the current snapshot, as one that follows the one before it; where that fails, the one before it.

        Raises:
            DataError: neither can be served.
        """
        state = await asyncio.to_thread(named, self._collection)
        earlier = state.previous
        if earlier is not None and self._must_overlap(earlier, state.current, state.accepted):
            try:
                async with asyncio.timeout(self._settings.load_timeout_s):
                    self.served = await self._opened(earlier, None)
            except Exception as error:
                log.warning("the current snapshot is compared with nothing, as %s cannot be opened: %r", earlier, error)
        await self.look()
        if self.served is None and earlier is not None:
            await self._try(earlier, None, still_refused=self.refused)
        if self.served is None:
            reason = self.refused.reason if self.refused else "it names none."
            raise DataError(
                f"the collection '{self._settings.collection}' has no snapshot that can be served: {reason}"
            )

    async def watch(self) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            try:
                await self.look()
                async with self._one_at_a_time:
                    if time.monotonic() >= self._kept_at + KEEP_SECONDS:
                        await self._keep()
            except Exception:
                # Whatever is wrong with what is new, the old snapshot goes on being served.
                log.exception("looking for a new snapshot failed")

    async def look(self, *, again: bool = False) -> None:
        """Switches to the snapshot that is named as current, unless that is served already.

        Args:
            again: try a refused one without waiting.
        """
        async with self._one_at_a_time:
            try:
                state = await asyncio.to_thread(named, self._collection)
            except DataError as error:
                if self.served is None:
                    raise
                log.warning("the served snapshot stays: %s", error)
                return
            if self.served is not None and state.current == self.served.snapshot_id:
                if self.refused is not None:  # rolled back to what is served
                    self.refused = None
                    self._changed(self)
                return
            is_new = again or self.refused is None or self._tried != state
            if is_new or (self.refused is not None and time.monotonic() >= self.refused.retry_at):
                self._tried = state
                await self._try(state.current, state.accepted)

    async def _try(self, snapshot_id: str, accepted: str | None, still_refused: Refused | None = None) -> None:
        try:
            async with asyncio.timeout(self._settings.load_timeout_s):
                served = await self._opened(snapshot_id, accepted)
        except Exception as error:
            attempts = self.refused.attempts + 1 if self.refused and self.refused.snapshot_id == snapshot_id else 1
            wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (attempts - 1))
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self.refused = Refused(
                snapshot_id=snapshot_id, reason=reason, attempts=attempts, retry_at=time.monotonic() + wait
            )
            log.error("snapshot %s is not served: %s", snapshot_id, reason)
            self._changed(self)
        else:
            old = self.served.snapshot_id if self.served else None
            self.served, self.refused, self._before = served, still_refused, old
            self._changed(self)
            log.warning("serving snapshot %s of %d documents (before: %s)", snapshot_id, served.num_documents, old)
        await self._keep()

    async def _keep(self) -> None:
        """Keeps what is served, and the one before for the requests that began with it and for a roll-back.

        What was refused is closed, unless another server that shares the shard groups serves it.
        """
        await self._engine.keep([item for item in (self.served and self.served.snapshot_id, self._before) if item])
        self._kept_at = time.monotonic()

    def _must_overlap(self, old: str, new: str, accepted: str | None) -> bool:
        """Whether canary queries have to find the same in a new snapshot as in an old one; ids are in order of age."""
        is_gated = bool(self._canaries) and self._settings.canary_min_overlap > 0
        return is_gated and old < new and new != accepted

    async def _opened(self, snapshot_id: str, accepted: str | None) -> Served:
        old = self.served.snapshot_id if self.served else None
        must_overlap = old is not None and self._must_overlap(old, snapshot_id, accepted)
        if must_overlap:
            self._check_overlap(self._overlaps.get((old, snapshot_id)))
        manifest = await asyncio.to_thread(read_manifest, self._collection, snapshot_id)
        if manifest["encoder"] != self._spec.encoder:
            raise DataError("it was embedded by another model than the server's. Start a server for it.")
        spec = vector_settings(self._root, manifest)
        own = self._spec.prompts
        other = any(own.get(task, it) != it for task, it in spec.prompts.items())
        if other or spec.max_tokens != self._spec.max_tokens:
            raise DataError("its texts were cut or instructed otherwise than the server's. Start a server for it.")
        what = await self._engine.load(snapshot_id)
        if what["encoder"] != self._spec.encoder:
            raise DataError("its shards were embedded by another model than the server's.")
        overlap = await self._overlap(snapshot_id, what["dimension"])
        if must_overlap and overlap is not None:
            self._overlaps = {(old, snapshot_id): overlap}
            self._check_overlap(overlap)
        return Served(
            snapshot_id=snapshot_id,
            num_documents=what["num_documents"],
            dimension=what["dimension"],
            created=str(manifest.get("created", "")),
            since=time.time(),
            canary_overlap=overlap,
        )

    def _check_overlap(self, overlap: float | None) -> None:
        """Raises DataError where too little is found again; None: nothing was compared."""
        least = self._settings.canary_min_overlap
        if overlap is not None and overlap < least:
            raise DataError(
                f"canary queries find other documents than before: the ten best overlap by {overlap:.2f}, at least "
                f"{least:.2f} is asked for (serving.canary_min_overlap). Is that meant? Then: llmr index accept "
                f"{self._settings.collection}. Else go back: llmr index rollback {self._settings.collection}."
            )

    async def _overlap(self, snapshot_id: str, dimension: int) -> float | None:
        """Mean share of the old snapshot's best that the new one finds too; None where there is nothing to compare."""
        if self._canary_QD is None:
            probes = self._canaries or [("a", "", self._spec.max_tokens["query"])]
            self._canary_QD = await self._engine.encoder.encode(probes)
        if self._canary_QD.shape[1] != dimension:
            raise DataError(f"its vectors have {dimension} values, queries have {self._canary_QD.shape[1]}.")
        if not self._canaries:
            return None
        new = await self._best(snapshot_id)
        if self.served is None:
            return None
        old = await self._best(self.served.snapshot_id)
        shares = [len(set(a) & set(b)) / len(a) for a, b in zip(old, new, strict=True) if a]
        return sum(shares) / len(shares) if shares else None

    async def _best(self, snapshot_id: str) -> list[list[str]]:
        assert self._canary_QD is not None
        nothing = [None] * len(self._canary_QD)
        rows_QK, _ = await self._engine.search(snapshot_id, self._canary_QD, CANARY_DEPTH, nothing)
        return await self._engine.doc_ids(snapshot_id, rows_QK)
