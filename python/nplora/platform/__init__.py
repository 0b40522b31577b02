"""Functions that differ between operating systems: files, locks, memory, limits, processes."""
