"""Makes examples from the fields of rows. Each file reads a few similar kinds of rows."""
