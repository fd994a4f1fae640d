"""Ingest from elsewhere: declared sources, each a module of its kind, and files through a ledger."""
