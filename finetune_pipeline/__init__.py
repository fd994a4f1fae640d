"""A local language model that gets better from being used: one loop, six assets.

    application --> feedback (JSONL, later gateway) --> store
                                                          |
    raw_logs -> curated_dataset -> lora_adapter -> gguf_model -> eval_report -> promoted_model
    taken in,   good, distinct,    trained in a     merged,       champion and   the gate asked
    snapshot    away from the      process of its   converted,    challenger on  again, then the
    to Parquet  benchmark          own              quantised     one benchmark  champion moves
                                                                                        |
    application <-- the champion serves <-- registry <----------------------------------+

Rooms (feedback, sources, curation, training, export, evaluation, registry) know nothing of each other. Doors (loop for
Dagster, cli for the terminal) put them together. Under the rooms lie inference, database, artifacts, records, settings.
"""
