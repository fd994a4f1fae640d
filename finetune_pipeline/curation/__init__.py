"""What may train, and when: the rule, deduplication, splits, the dataset, the trigger."""
