"""What a reading of a source gave, for tests."""

from finetune_pipeline.sources.source_record import Item


def taken(read, feed, **options):
    """Items and what was skipped, by provenance."""
    items, skipped = {}, {}
    for one in read(feed, None, **options):
        place = items if isinstance(one, Item) else skipped
        assert one.provenance not in place
        place[one.provenance] = one if isinstance(one, Item) else one.reason
    return items, skipped
