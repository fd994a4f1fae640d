"""Alembic's entry: it runs on the connection that `finetune_pipeline.database.connection` hands over."""

from alembic import context

from finetune_pipeline.database.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=False,
    render_as_batch=True,
)
context.run_migrations()
