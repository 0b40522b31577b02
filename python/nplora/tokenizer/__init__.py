"""Converts text to tokens, tokens to text, and a chat to text, as the model's own tokenizer does.

This package needs the extra "llm": pip install "nplora[llm]".
"""

from nplora.tokenizer.directory import from_directory
from nplora.tokenizer.gguf_vocabulary import from_gguf
from nplora.tokenizer.streaming import StreamDecoder
from nplora.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "from_directory", "from_gguf"]
