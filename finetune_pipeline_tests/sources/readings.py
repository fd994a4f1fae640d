"""What a reading of a source gave, for tests."""

from finetune_pipeline.sources.source_record import Item


def taken(read, feed, **options):
    """Items and what was skipped, by origin."""
    items, skipped = {}, {}
    for one in read(feed, None, **options):
        place = items if isinstance(one, Item) else skipped
        assert one.origin not in place
        place[one.origin] = one if isinstance(one, Item) else one.reason
    return items, skipped
