"""What a server counts, for Prometheus."""

import calendar
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from llmr_ray.serving.switching import Refused, Switcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """The figures of one process. No label ever holds a text, a filter or a key's secret."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "llmr_retrieve_requests_total", "Requests by route and status.", ("route", "code"), registry=self._registry
        )
        self._latency = Histogram(
            "llmr_retrieve_latency_seconds",
            "Time of a request's stages: queue, encode, search, fetch, rerank, total.",
            ("stage",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stages = {
            stage: self._latency.labels(stage) for stage in ("queue", "encode", "search", "fetch", "rerank", "total")
        }
        self.texts = Counter("llmr_texts_total", "Texts embedded or ranked.", ("route",), registry=self._registry)
        self.working = Gauge("llmr_requests_working", "Requests under way.", registry=self._registry)
        self.waiting = Gauge("llmr_requests_waiting", "Requests that wait.", registry=self._registry)
        self.switches = Counter(
            "llmr_index_switches_total",
            "Attempts to serve another snapshot by outcome: switched or refused.",
            ("outcome",),
            registry=self._registry,
        )
        self._served_id = ""
        self._refused: Refused | None = None
        self._age = Gauge(
            "llmr_index_snapshot_age_seconds", "Time since the served snapshot was made.", registry=self._registry
        )
        self._snapshot = Gauge(
            "llmr_index_snapshot_info", "The served snapshot.", ("snapshot",), registry=self._registry
        )
        self.documents = Gauge("llmr_index_documents", "Documents of the served snapshot.", registry=self._registry)
        self.missing = Gauge(
            "llmr_index_shards_missing", "Shard groups that failed in the latest search.", registry=self._registry
        )
        self.canary = Gauge(
            "llmr_canary_overlap", "Overlap of the ten best of canary queries at the latest switch.",
            registry=self._registry,
        )  # fmt: skip
        self.refused_snapshot = Gauge(
            "llmr_index_current_refused", "1 while the current snapshot could not be served.", registry=self._registry
        )

    def took(self, stage: str, seconds: float) -> None:
        """Counts the time of a stage."""
        self._stages[stage].observe(seconds)

    def watch(self, switcher: "Switcher") -> None:
        """Notes what came of the latest look at the collection."""
        served, refused = switcher.served, switcher.refused
        self.refused_snapshot.set(refused is not None)
        if refused is not None and refused is not self._refused:
            self.switches.labels("refused").inc()
        self._refused = refused
        if served is not None and served.snapshot_id != self._served_id:  # else a refusal was cleared by a roll-back
            self.switches.labels("switched").inc()
        if served is not None:
            self._serves(served.snapshot_id, served.created, served.num_documents)
            if served.canary_overlap is not None:
                self.canary.set(served.canary_overlap)

    def _serves(self, snapshot_id: str, created: str, num_documents: int) -> None:
        self._served_id = snapshot_id
        self._snapshot.clear()
        self._snapshot.labels(snapshot_id).set(1)
        self.documents.set(num_documents)
        made = calendar.timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ"))
        self._age.set_function(lambda: time.time() - made)

    def text(self) -> str:
        """All figures in Prometheus' text form."""
        return generate_latest(self._registry).decode()


def merged(texts: Mapping[str, str]) -> str:
    """Figures of several processes as one page, each line with the name of its process as the label `replica`.

    Each keeps series of its own: a sum would fall when a process is replaced, which Prometheus takes for a restart of
    all.
    """
    helps: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    family = ""
    for replica, text in sorted(texts.items()):
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split()[2]
                known = helps.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif line:
                name, value = line.rsplit(" ", 1)
                name = name[:-1] + "," if name.endswith("}") else name + "{"
                samples.setdefault(family, []).append(f'{name}replica="{replica}"}} {value}')
    return "\n".join(line for name in helps for line in (*helps[name], *samples.get(name, []))) + "\n"
