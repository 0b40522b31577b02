"""Makes examples from the fields of rows: one file for each family of kinds."""
