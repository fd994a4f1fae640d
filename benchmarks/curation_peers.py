"""The peers of near-duplicate removal, for `benchmarks/curation.py`: run in an environment that has only them.

    python curation_peers.py datasketch|semhash ROWS.json

ROWS.json has a list of `[prompt, answer, request]`; rows of one request are near-duplicates of each other.
"""

import json
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[list[str]]


def measure(method: Callable[[Rows], list[int]], path: str) -> None:
    """Print time, recall and precision of a method that gives the places it keeps."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    started = time.perf_counter()
    kept = method(rows)
    print(json.dumps(_told(rows, kept, time.perf_counter() - started)))


def _told(rows: Rows, kept: list[int], seconds: float) -> dict[str, Any]:
    """Recall and precision by the requests that the rows are, or are copies of."""
    groups = {row[2] for row in rows}
    planted, taken = len(rows) - len(groups), len(rows) - len(kept)
    right = len(rows) - len(groups) - (len(kept) - len({rows[place][2] for place in kept}))
    return {"rows": len(rows), "seconds": seconds, "recall": right / planted, "precision": right / max(taken, 1)}


def datasketch(rows: Rows) -> list[int]:
    """MinHash LSH as its documentation has it: a row is kept if none before it is in its buckets."""
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found]

    index, kept = MinHashLSH(threshold=0.8, num_perm=128), []
    for place, row in enumerate(rows):
        text = " ".join(row[0].casefold().split())
        sketch = MinHash(num_perm=128)
        sketch.update_batch([text[i : i + 5].encode() for i in range(max(1, len(text) - 4))])
        if not index.query(sketch):
            kept.append(place)
            index.insert(place, sketch)
    return kept


def semhash(rows: Rows) -> list[int]:
    """Its self-deduplication with its default threshold."""
    import numpy as np
    from semhash import SemHash  # type: ignore[import-not-found]

    class Pieces:
        def encode(self, texts: Any, **_: Any) -> Any:
            made = np.zeros((len(texts), 256), np.float32)
            for place, text in enumerate(texts):
                for length in (3, 4, 5):
                    for at in range(len(text) - length + 1):
                        made[place, zlib.crc32(text[at : at + length].encode()) % 256] += 1
            return made

    records = [{"text": row[0], "place": str(place)} for place, row in enumerate(rows)]
    found = SemHash.from_records(records, columns=["text"], model=Pieces()).self_deduplicate()
    return [int(record["place"]) for record in found.selected]


if __name__ == "__main__":
    measure({"datasketch": datasketch, "semhash": semhash}[sys.argv[1]], sys.argv[2])
