"""Read a source in a test."""

from finetune_pipeline.sources.source_record import SourceRecord


def taken(read, source, **options):
    """Return records and reasons of skipped ones, by provenance."""
    records, skipped = {}, {}
    for one in read(source, None, **options):
        place = records if isinstance(one, SourceRecord) else skipped
        assert one.provenance not in place
        place[one.provenance] = one if isinstance(one, SourceRecord) else one.reason
    return records, skipped
