"""A local language model that improves from use: one fine-tuning loop of six Dagster assets.

    application --> gateway / event files --> event store
                                                  |
    raw_logs -> curated_dataset -> lora_adapter -> gguf_model -> eval_report -> promoted_model
    ingest and  filter, decon-     train with     merge,        compare with   apply the gate,
    snapshot    taminate, dedupe,  TRL and PEFT   convert,      the champion   move the champion
    to Parquet  split                             quantize      on a benchmark       |
                                                                                     |
    application <-- gateway serves the champion <-- model registry <-----------------+

Layers, each importing only those below it:

    entry points     orchestration (Dagster), serving (HTTP), cli (terminal)
    use cases        pipeline
    domain packages  feedback, sources, curation, training, export, evaluation, registry; none imports another
    infrastructure   database, inference, artifacts, records, settings, schemas, ...
"""
