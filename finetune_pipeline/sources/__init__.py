"""Ingest from elsewhere: event files now, read line by line through a ledger."""
