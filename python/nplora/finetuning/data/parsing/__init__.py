"""How the fields of a row become an example: one file for each family of kinds."""
