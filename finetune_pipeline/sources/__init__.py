"""Read interactions from elsewhere: declared sources (one module per kind), and ingested files with their ledger."""
