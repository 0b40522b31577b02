"""What differs between operating systems: files, locks, memory, limits, processes."""
