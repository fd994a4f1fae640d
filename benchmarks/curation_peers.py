"""Run the peers of near-duplicate removal for `benchmarks/curation.py`, in an environment that has only them.

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
    """Print time, recall and precision of a method that returns the indices it keeps."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    started = time.perf_counter()
    kept = method(rows)
    seconds = time.perf_counter() - started
    groups = {row[2] for row in rows}
    planted, removed = len(rows) - len(groups), len(rows) - len(kept)
    correct = planted - (len(kept) - len({rows[index][2] for index in kept}))
    result = {
        "rows": len(rows),
        "seconds": seconds,
        "recall": correct / planted,
        "precision": correct / max(removed, 1),
    }
    print(json.dumps(result))


def datasketch(rows: Rows) -> list[int]:
    """Deduplicate by MinHash LSH as in its documentation: keep a row if no kept row shares a bucket with it."""
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found]

    lsh, kept = MinHashLSH(threshold=0.8, num_perm=128), []
    for index, row in enumerate(rows):
        text = " ".join(row[0].casefold().split())
        sketch = MinHash(num_perm=128)
        sketch.update_batch([text[i : i + 5].encode() for i in range(max(1, len(text) - 4))])
        if not lsh.query(sketch):
            kept.append(index)
            lsh.insert(index, sketch)
    return kept


def semhash(rows: Rows) -> list[int]:
    """Deduplicate by its self-deduplication with the default threshold."""
    import numpy as np
    from semhash import SemHash  # type: ignore[import-not-found]

    class CharacterNgrams:
        def encode(self, texts: Any, **_: Any) -> Any:
            vectors = np.zeros((len(texts), 256), np.float32)
            for row, text in enumerate(texts):
                for length in (3, 4, 5):
                    for at in range(len(text) - length + 1):
                        vectors[row, zlib.crc32(text[at : at + length].encode()) % 256] += 1
            return vectors

    records = [{"text": row[0], "index": str(index)} for index, row in enumerate(rows)]
    found = SemHash.from_records(records, columns=["text"], model=CharacterNgrams()).self_deduplicate()
    return [int(record["index"]) for record in found.selected]


if __name__ == "__main__":
    measure({"datasketch": datasketch, "semhash": semhash}[sys.argv[1]], sys.argv[2])
