"""Benchmarks against NumPy, torch and PEFT: `python -m bench` in the repository, with nplora installed."""
