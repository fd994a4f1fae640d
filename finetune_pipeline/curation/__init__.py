"""Curation: from a snapshot of the logs to the datasets to train on, and when to train.

dataset.py            the entry: filter -> deduplicate -> select -> split -> add replay -> write
  filter.py           first pass: each example alone, cached by shard
    acceptance.py     the policy: which examples may train
    decontamination.py
    redaction.py      secret_patterns.py, personal_data.py, found_values.py
  select.py           tie-breaking, near-duplicates, quotas
    deduplication.py
  dataset_files.py    the files of a dataset, written and read
dataset_card.py, dataset_checks.py, export_formats.py
review.py             which answers a person should review
retrain_trigger.py    when a run starts
"""
