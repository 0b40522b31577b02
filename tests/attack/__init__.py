"""What nplora must survive: a table of attacks on its commands, `PYTHONPATH=tests python -m attack`."""
