"""What `nplora demo` shows: a language model that learns a dictionary, or a network that reads digits."""
