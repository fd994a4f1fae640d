"""The first pass over a snapshot on the workers of a Ray cluster, by Ray Data; what is found is the same as here.

RAY_ADDRESS   the cluster; without it, one is started on this machine for the time of the pass. Its workers must see the
              snapshot under the same path: one machine, or a shared volume.

What the policy is made of (the benchmark's questions, the schema, the tokenizer) travels with it, and so does this
package. Texts stay where they are read: only hashes and counts come back.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune_pipeline.curation.acceptance import Policy
from finetune_pipeline.curation.sifting import Identity
from finetune_pipeline.ray_session import check_installed, connected

if TYPE_CHECKING:
    import pyarrow as pa

    from finetune_pipeline.curation.sifted import Chunk

_OBJECT_STORE_BYTES = 300_000_000


def sift(chunks: Sequence["Chunk"], policy: Policy, identity: Identity) -> "Iterator[pa.RecordBatch]":
    """What is known of the rows of these chunks, in their order.

    Raises:
        ClusterError: Ray is not installed, or no cluster answers.
    """
    check_installed("curation.compute")
    import pyarrow as pa

    with connected({}, None, _OBJECT_STORE_BYTES):
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
