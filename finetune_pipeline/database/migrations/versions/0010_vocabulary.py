"""tables and columns take the names of the glossary (docs/reference/glossary.md)"""

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

COMMENTS = {  # of tables and columns, where they change
    ('counters', None): 'events: the newest ingest offset, locked until commit, so commits are in its order. store: a random number that identifies the database.',
    ('interactions', 'history'): 'Messages before the prompt; null if there are none.',
    ('interactions', 'variant'): 'Traffic variant.',
    ('interactions', 'flag'): 'Reason why a person should review the answer.',
    ('interactions', 'seed'): 'Sampling seed; null at temperature 0, or if unknown.',
    ('interactions', 'source'): 'Declared source; null if an application logged it.',
    ('interactions', 'provenance'): 'Where in the source: note, file and line, or row key.',
    ('interactions', 'retracted_offset'): 'Ingest offset at which it was retracted, because its source no longer has it; null if active.',
    ('examples', 'content_hash'): 'Of the normalized prompt and the target.',
    ('examples', 'review'): 'approve, edit or reject; null without a decision.',
    ('loop_counters', None): 'Numbers of rows by kind, updated by the transactions that add them, because counting them is slow.',
    ('erased_events', None): 'Ids of erased events, which are not recorded again even if a log still contains them.',
    ('erased_events', 'id'): 'Of an interaction or a feedback; contains no information about the event.',
    ('erased_events', 'ingest_offset'): 'Snapshots up to here may still contain it.',
    ('review_decisions', 'target'): 'The approved or edited answer.',
    ('review_decisions', 'content_hash'): 'Of the prompt and answer that were shown; null for an undo.',
    ('judged_examples', None): 'Contents of every dataset that was evaluated; they never count as new again.',
    ('ingested_files', 'inode'): 'inode, size, mtime_ns, ctime_ns: from stat, before the file was last read.',
    ('ingested_files', 'prefix_hash'): 'SHA-256 of the bytes before the offset.',
    ('source_cursors', 'cursor'): "Where the next sync continues, in the source's own terms.",
    ('skipped_records', None): 'Records that the last sync of each source skipped, and why.',
    ('published_artifacts', None): 'Every published artifact; a folder that is not listed was edited, or not written by a run.',
    ('published_artifacts', 'sha256'): 'Of its manifest, which contains the hashes of its files.',
    ('check_outcomes', None): 'Latest outcomes of the blocking checks; a promotion requires that all passed.',
    ('check_outcomes', 'sha256'): "Of the artifact's manifest, as in published_artifacts.",
    ('model_versions', 'adapter_path'): 'LoRA adapter as GGUF, applied to gguf_path; null if gguf_path is the merged model.',
    ('model_versions', 'lineage'): 'Versions of the artifacts it was made from, and the watermark.',
    ('model_versions', 'accuracy'): 'Quality: fraction of correct parameters, words or answers.',
    ('model_versions', 'latency_ms'): 'Performance: median time of an answer.',
    ('model_versions', 'retired_at'): 'When it last ceased to be champion; null while it is champion.',
    ('champions', 'model_id'): 'Null if the base model serves.',
    ('comparisons', 'id'): 'Version of the evaluation report.',
    ('comparisons', 'watermark'): 'Newest ingest offset of the evaluated data.',
    ('comparisons', 'report_sha256'): "Of the report's manifest; null if there is no report.",
    ('comparisons', 'after_deployment'): "Id of the loop's newest deployment at that time; 0 if there was none.",
    ('training_jobs', 'run_id'): 'The Dagster run, which has the progress.',
    ('training_jobs', 'initial_adapter'): 'Version of the adapter that it was warm-started from; null for the base model.',
    ('api_keys', 'scopes'): 'infer, feedback, admin; separated by commas.',
}


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
