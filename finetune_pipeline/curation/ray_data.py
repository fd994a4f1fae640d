"""The first pass over a snapshot on the workers of a Ray cluster, by Ray Data; what is found is the same as here.

RAY_ADDRESS   the cluster; without it, one is started on this machine for the time of the pass. Its workers must see the
              snapshot under the same path: one machine, or a shared volume.

What the policy is made of (the benchmark's questions, the schema, the tokenizer) travels with it, and so does this
package. Texts stay where they are read: only hashes and counts come back.
"""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.rules import Policy
from finetune_pipeline.curation.sifting import Identity

if TYPE_CHECKING:
    import pyarrow as pa

    from finetune_pipeline.curation.sifted import Chunk

ADDRESS = "RAY_ADDRESS"
_PACKAGE = Path(__file__).parents[1]
_OBJECT_STORE_BYTES = 300_000_000


def sift(chunks: Sequence["Chunk"], policy: Policy, identity: Identity) -> "Iterator[pa.RecordBatch]":
    """What is known of the rows of these chunks, in their order.

    Raises:
        CurationError: Ray is not installed, or no cluster answers.
    """
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise CurationError(
            "curation.compute is ray, and Ray is not installed; run "
            ".venv/bin/pip install -c constraints.txt -e '.[ray]', or set "
            "compute: local"
        )
    import pyarrow as pa

    with _cluster():
        import ray

        work = ray.put((tuple(chunks), policy, identity))
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        numbers = ray.data.range(len(chunks), override_num_blocks=len(chunks))
        # By tasks: actors for every core would leave none for the reading of the numbers, and wait for ever.
        found = numbers.map_batches(_sift_chunks, batch_size=1, fn_args=([work],))
        for row in found.iter_rows():
            with pa.ipc.open_stream(row["found"]) as batches:
                yield from batches


def _sift_chunks(batch: dict[str, Any], work: list[Any]) -> dict[str, list[bytes]]:
    """Look at chunks by their number, in a worker."""
    import pyarrow as pa
    import ray

    from finetune_pipeline.curation.sifted import sift_chunk
    from finetune_pipeline.curation.sifting import schema

    chunks, policy, identity = ray.get(work[0])
    found = []
    for number in batch["id"].tolist():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema()) as writer:
            for one in sift_chunk(chunks[number], policy, identity):
                writer.write_batch(one)
        found.append(sink.getvalue().to_pybytes())
    return {"found": found}


@contextmanager
def _cluster() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start one here; either way this package goes to the workers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    common: dict[str, Any] = {
        "runtime_env": {"py_modules": [str(_PACKAGE)]},
        "logging_level": "error",
        "logging_config": ray.LoggingConfig(log_level="ERROR"),
    }
    address = os.environ.get(ADDRESS)
    try:
        if address:
            ray.init(address, **common)
        else:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray leaves one in the home folder
            ray.init(
                "local",
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **common,
            )
    except ConnectionError as error:
        raise CurationError(
            f"no Ray cluster answers at {ADDRESS}={address} ({error}); correct it, or unset it to start one here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
