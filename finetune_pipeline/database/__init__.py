"""The database: tables, migrations and connections. SQLite by default, PostgreSQL by URL."""

from finetune_pipeline.database.connection import Database, DatabaseError, connect

__all__ = ["Database", "DatabaseError", "connect"]
