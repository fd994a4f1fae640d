"""Benchmarks of docs/reference/benchmarks.md: `make bench` runs them, `python -m benchmarks NAME` one of them."""
