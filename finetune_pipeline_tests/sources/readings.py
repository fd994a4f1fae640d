"""What a reading of a source gave, for tests."""

from finetune_pipeline.sources.source_record import SourceRecord


def taken(read, source, **options):
    """Items and what was skipped, by provenance."""
    records, skipped = {}, {}
    for one in read(source, None, **options):
        place = records if isinstance(one, SourceRecord) else skipped
        assert one.provenance not in place
        place[one.provenance] = one if isinstance(one, SourceRecord) else one.reason
    return records, skipped
