"""The use cases of the loop, free of Dagster, HTTP and click; every entry point calls these."""
