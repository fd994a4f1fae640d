"""tables and columns take the names of the glossary (docs/glossary.md)"""

import sqlalchemy as sa
from alembic import op

revision = '0010'
down_revision = '0009'
branch_labels = None
depends_on = None

TABLES = {
    'tallies': 'loop_counters',
    'forgotten_events': 'erased_events',
    'source_marks': 'source_cursors',
    'skipped_items': 'skipped_records',
    'made_artifacts': 'published_artifacts',
    'models': 'model_versions',
    'deployments': 'deployment_history',
    'model_comparisons': 'comparisons',
}
COLUMNS = {
    'interactions': {'task': 'loop', 'sequence': 'ingest_offset', 'arm': 'variant', 'origin': 'provenance', 'withdrawn': 'retracted_offset'},
    'feedback': {'task': 'loop', 'sequence': 'ingest_offset'},
    'examples': {'task': 'loop', 'sequence': 'ingest_offset'},
    'tallies': {'task': 'loop'},
    'forgotten_events': {'task': 'loop', 'sequence': 'ingest_offset'},
    'review_decisions': {'task': 'loop', 'sequence': 'ingest_offset'},
    'ingested_files': {'task': 'loop'},
    'rejected_lines': {'task': 'loop'},
    'source_marks': {'task': 'loop', 'mark': 'cursor'},
    'skipped_items': {'task': 'loop', 'origin': 'provenance'},
    'model_comparisons': {'after_move': 'after_deployment'},
}

# begin comments
COMMENTS = {
    ('counters', None): 'events: the newest ingest offset, locked until commit, so commits are in its order. store: a random number that identifies the database.',
    ('counters', 'name'): None,
    ('counters', 'value'): None,
    ('interactions', None): None,
    ('interactions', 'id'): None,
    ('interactions', 'loop'): None,
    ('interactions', 'ingest_offset'): None,
    ('interactions', 'created_at'): None,
    ('interactions', 'prompt'): None,
    ('interactions', 'history'): 'Messages before the prompt; null if there are none.',
    ('interactions', 'output'): None,
    ('interactions', 'model'): None,
    ('interactions', 'confidence'): None,
    ('interactions', 'validation_score'): None,
    ('interactions', 'user'): None,
    ('interactions', 'domain'): None,
    ('interactions', 'kind'): None,
    ('interactions', 'retrieved_context'): None,
    ('interactions', 'variant'): 'Traffic variant.',
    ('interactions', 'flag'): 'Reason why a person should review the answer.',
    ('interactions', 'latency_ms'): None,
    ('interactions', 'prompt_tokens'): None,
    ('interactions', 'completion_tokens'): None,
    ('interactions', 'seed'): 'Sampling seed; null at temperature 0, or if unknown.',
    ('interactions', 'source'): 'Declared source; null if an application logged it.',
    ('interactions', 'provenance'): 'Where in the source: note, file and line, or row key.',
    ('interactions', 'retracted_offset'): 'Ingest offset at which it was retracted, because its source no longer has it; null if active.',
    ('feedback', None): None,
    ('feedback', 'id'): None,
    ('feedback', 'loop'): None,
    ('feedback', 'ingest_offset'): None,
    ('feedback', 'interaction_id'): None,
    ('feedback', 'created_at'): None,
    ('feedback', 'kind'): None,
    ('feedback', 'score'): None,
    ('feedback', 'rating'): None,
    ('feedback', 'reward'): None,
    ('feedback', 'correction'): None,
    ('feedback', 'output_hash'): None,
    ('feedback', 'user'): None,
    ('examples', None): None,
    ('examples', 'interaction_id'): None,
    ('examples', 'loop'): None,
    ('examples', 'ingest_offset'): None,
    ('examples', 'content_hash'): 'Of the normalized prompt and the target.',
    ('examples', 'target'): None,
    ('examples', 'reward'): None,
    ('examples', 'confidence'): None,
    ('examples', 'confirmed'): None,
    ('examples', 'corrected'): None,
    ('examples', 'review'): 'approve, edit or reject; null without a decision.',
    ('loop_counters', None): 'Numbers of rows by kind, updated by the transactions that add them, because counting them is slow.',
    ('loop_counters', 'loop'): None,
    ('loop_counters', 'name'): None,
    ('loop_counters', 'value'): None,
    ('erased_events', None): 'Ids of erased events, which are not recorded again even if a log still contains them.',
    ('erased_events', 'id'): 'Of an interaction or a feedback; contains no information about the event.',
    ('erased_events', 'loop'): None,
    ('erased_events', 'ingest_offset'): 'Snapshots up to here may still contain it.',
    ('review_decisions', None): None,
    ('review_decisions', 'id'): None,
    ('review_decisions', 'loop'): None,
    ('review_decisions', 'ingest_offset'): None,
    ('review_decisions', 'interaction_id'): None,
    ('review_decisions', 'decision'): 'approve, reject or edit.',
    ('review_decisions', 'target'): 'The approved or edited answer.',
    ('review_decisions', 'reviewer'): None,
    ('review_decisions', 'created_at'): None,
    ('review_decisions', 'content_hash'): 'Of the prompt and answer that were shown; null for an undo.',
    ('judged_examples', None): 'Contents of every dataset that was evaluated; they never count as new again.',
    ('judged_examples', 'loop'): None,
    ('judged_examples', 'content_hash'): None,
    ('ingested_files', None): None,
    ('ingested_files', 'loop'): None,
    ('ingested_files', 'path'): None,
    ('ingested_files', 'inode'): 'inode, size, mtime_ns, ctime_ns: from stat, before the file was last read.',
    ('ingested_files', 'size'): None,
    ('ingested_files', 'mtime_ns'): None,
    ('ingested_files', 'ctime_ns'): None,
    ('ingested_files', 'offset'): 'Bytes read so far.',
    ('ingested_files', 'lines'): None,
    ('ingested_files', 'rejected'): None,
    ('ingested_files', 'prefix_hash'): 'SHA-256 of the bytes before the offset.',
    ('ingested_files', 'finished'): None,
    ('rejected_lines', None): None,
    ('rejected_lines', 'loop'): None,
    ('rejected_lines', 'path'): None,
    ('rejected_lines', 'line'): None,
    ('rejected_lines', 'reason'): None,
    ('rejected_lines', 'excerpt'): None,
    ('source_cursors', None): 'How far each declared source was read.',
    ('source_cursors', 'loop'): None,
    ('source_cursors', 'source'): None,
    ('source_cursors', 'cursor'): "Where the next sync continues, in the source's own terms.",
    ('source_cursors', 'read_at'): None,
    ('skipped_records', None): 'Records that the last sync of each source skipped, and why.',
    ('skipped_records', 'loop'): None,
    ('skipped_records', 'source'): None,
    ('skipped_records', 'provenance'): None,
    ('skipped_records', 'reason'): None,
    ('published_artifacts', None): 'Every published artifact; a folder that is not listed was edited, or not written by a run.',
    ('published_artifacts', 'loop'): None,
    ('published_artifacts', 'stage'): None,
    ('published_artifacts', 'version'): None,
    ('published_artifacts', 'sha256'): 'Of its manifest, which contains the hashes of its files.',
    ('published_artifacts', 'created_at'): None,
    ('check_outcomes', None): 'Latest outcomes of the blocking checks; a promotion requires that all passed.',
    ('check_outcomes', 'loop'): None,
    ('check_outcomes', 'stage'): None,
    ('check_outcomes', 'version'): None,
    ('check_outcomes', 'sha256'): "Of the artifact's manifest, as in published_artifacts.",
    ('check_outcomes', 'name'): 'Of a blocking check.',
    ('check_outcomes', 'passed'): None,
    ('check_outcomes', 'run_id'): None,
    ('check_outcomes', 'created_at'): None,
    ('model_versions', None): None,
    ('model_versions', 'id'): "First 16 hex digits of the GGUF's SHA-256.",
    ('model_versions', 'loop'): None,
    ('model_versions', 'major'): None,
    ('model_versions', 'minor'): None,
    ('model_versions', 'patch'): None,
    ('model_versions', 'gguf_path'): None,
    ('model_versions', 'gguf_sha256'): None,
    ('model_versions', 'adapter_path'): 'LoRA adapter as GGUF, applied to gguf_path; null if gguf_path is the merged model.',
    ('model_versions', 'adapter_sha256'): None,
    ('model_versions', 'base_hash'): None,
    ('model_versions', 'mode'): None,
    ('model_versions', 'lineage'): 'Versions of the artifacts it was made from, and the watermark.',
    ('model_versions', 'scores'): None,
    ('model_versions', 'accuracy'): 'Quality: fraction of correct parameters, words or answers.',
    ('model_versions', 'latency_ms'): 'Performance: median time of an answer.',
    ('model_versions', 'tokens_per_second'): None,
    ('model_versions', 'size_bytes'): None,
    ('model_versions', 'deployed_at'): 'Deployment: when it last became champion.',
    ('model_versions', 'retired_at'): 'When it last ceased to be champion; null while it is champion.',
    ('model_versions', 'deleted_at'): 'When its files were deleted.',
    ('model_versions', 'report_path'): None,
    ('model_versions', 'created_at'): None,
    ('champions', None): None,
    ('champions', 'loop'): None,
    ('champions', 'model_id'): 'Null if the base model serves.',
    ('champions', 'updated_at'): None,
    ('deployment_history', None): None,
    ('deployment_history', 'id'): None,
    ('deployment_history', 'loop'): None,
    ('deployment_history', 'action'): 'promote, switch, rollback or force.',
    ('deployment_history', 'model_id'): None,
    ('deployment_history', 'previous_id'): None,
    ('deployment_history', 'actor'): None,
    ('deployment_history', 'reason'): None,
    ('deployment_history', 'comparison_id'): None,
    ('deployment_history', 'created_at'): None,
    ('comparisons', None): None,
    ('comparisons', 'id'): 'Version of the evaluation report.',
    ('comparisons', 'loop'): None,
    ('comparisons', 'challenger_sha256'): None,
    ('comparisons', 'champion_id'): None,
    ('comparisons', 'champion_sha256'): None,
    ('comparisons', 'benchmark_sha256'): None,
    ('comparisons', 'promote'): None,
    ('comparisons', 'reason'): None,
    ('comparisons', 'watermark'): 'Newest ingest offset of the evaluated data.',
    ('comparisons', 'report_path'): None,
    ('comparisons', 'created_at'): None,
    ('comparisons', 'report_sha256'): "Of the report's manifest; null if there is no report.",
    ('comparisons', 'after_deployment'): "Id of the loop's newest deployment at that time; 0 if there was none.",
    ('training_jobs', None): None,
    ('training_jobs', 'id'): 'Version of the adapter.',
    ('training_jobs', 'loop'): None,
    ('training_jobs', 'run_id'): 'The Dagster run, which has the progress.',
    ('training_jobs', 'dataset'): 'Version of the dataset.',
    ('training_jobs', 'initial_adapter'): 'Version of the adapter that it was warm-started from; null for the base model.',
    ('training_jobs', 'method'): None,
    ('training_jobs', 'mode'): None,
    ('training_jobs', 'device'): None,
    ('training_jobs', 'examples'): None,
    ('training_jobs', 'steps'): None,
    ('training_jobs', 'loss_before'): None,
    ('training_jobs', 'loss_after'): None,
    ('training_jobs', 'tokens_per_second'): None,
    ('training_jobs', 'wall_seconds'): None,
    ('training_jobs', 'peak_memory_bytes'): None,
    ('training_jobs', 'watermark'): None,
    ('training_jobs', 'created_at'): None,
    ('api_keys', None): None,
    ('api_keys', 'id'): None,
    ('api_keys', 'name'): None,
    ('api_keys', 'secret_sha256'): None,
    ('api_keys', 'scopes'): 'infer, feedback, admin; separated by commas.',
    ('api_keys', 'created_at'): None,
    ('api_keys', 'revoked_at'): None,
}
# end comments


def upgrade() -> None:
    connection = op.get_bind()
    for table in dict.fromkeys([*COLUMNS, *TABLES]):
        columns, new_table = COLUMNS.get(table, {}), TABLES.get(table, table)
        found = sa.inspect(connection)
        indexes = [(one['name'], one['column_names'], one['unique']) for one in found.get_indexes(table)]
        primary_key = found.get_pk_constraint(table)['name']
        uniques = [(one['name'], one['column_names']) for one in found.get_unique_constraints(table)]
        # Renaming a column or a table rewrites no row, in SQLite and in PostgreSQL.
        for old, new in columns.items():
            op.execute(sa.text(f'ALTER TABLE "{table}" RENAME COLUMN "{old}" TO "{new}"'))
        if new_table != table:
            op.rename_table(table, new_table)
        for name, names, unique in indexes:
            if name.startswith('ix_'):
                op.drop_index(name, new_table)
                names = [columns.get(one, one) for one in names]
                op.create_index(f'ix_{new_table}_{"_".join(names)}', new_table, names, unique=unique)
        for name, names in uniques:
            names = [columns.get(one, one) for one in names]
            new = f'uq_{new_table}_{"_".join(names)}'
            if new != name:  # SQLite copies the table for this
                with op.batch_alter_table(new_table) as batch:
                    batch.drop_constraint(name, type_='unique')
                    batch.create_unique_constraint(new, names)
        if connection.dialect.name == 'postgresql' and primary_key == f'pk_{table}' != f'pk_{new_table}':
            op.execute(sa.text(f'ALTER TABLE "{new_table}" RENAME CONSTRAINT "{primary_key}" TO "pk_{new_table}"'))
    if connection.dialect.name == 'postgresql':  # SQLite has no comments
        for (table, column), comment in COMMENTS.items():
            what = f'COLUMN "{table}"."{column}"' if column else f'TABLE "{table}"'
            text = "'" + comment.replace("'", "''") + "'" if comment else 'NULL'
            op.execute(sa.text(f'COMMENT ON {what} IS {text}'.replace(':', chr(92) + ':')))


def downgrade() -> None:
    raise NotImplementedError("the older version reads other names; restore a copy of the database from before instead")
