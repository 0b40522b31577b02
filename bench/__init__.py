"""Benchmarks against NumPy: `python -m bench` from the repository's root, with nplora installed."""
