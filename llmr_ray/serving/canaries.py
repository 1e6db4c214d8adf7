"""Questions by which an old and a new snapshot are compared before the one takes the other's place."""

from pathlib import Path

import pyarrow.parquet as pq

from llmr_ray.data.splits import unit_hash
from llmr_ray.index.collection import snapshots
from llmr_ray.serving.models import EncoderSpec, Prompted


def canary_queries(root: Path, collection: str, spec: EncoderSpec, number: int) -> list[Prompted]:
    """Queries of the data that a collection was first made of, drawn by a hash; none where it came without queries.

    Args:
        root: the artifact root.
        collection: its name.
        spec: the queries' prompts.
        number: how many at the most.
    """
    for manifest in snapshots(root, collection, skip_damaged=True):
        prepare = manifest.get("queries") or manifest["segments"][0]["prepare"]
        parts = sorted((root / prepare / "parts").glob("queries-*.parquet"))
        found: list[tuple[float, Prompted]] = []
        for part in parts:
            for row in pq.read_table(part, columns=["query_id", "task", "query"]).to_pylist():
                if row["task"] in spec.prompts:
                    instruction, max_tokens = spec.prompt(row["task"], "query")
                    drawn = unit_hash("canary of a snapshot", row["query_id"])
                    found.append((drawn, (row["query"], instruction, max_tokens)))
        if found:
            return [prompted for _, prompted in sorted(found)[:number]]
    return []
