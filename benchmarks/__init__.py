"""The figures of the README, measured: `make bench`, or `python -m benchmarks NAME` for one of them."""
