"""Attacks that nplora's commands must survive: `PYTHONPATH=tests python -m attack`."""
