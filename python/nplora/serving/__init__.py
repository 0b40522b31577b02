"""Serving: one model answers many requests at the same time. Each request may use a different adapter."""

from nplora.lm.answer import Guide
from nplora.serving.conversation import Conversation
from nplora.serving.encoder_engine import EncoderEngine
from nplora.serving.engine import Engine, QueueFullError
from nplora.serving.metrics import Histogram, Metrics
from nplora.serving.ticket import Chunk, Ticket, Token, TopToken, Usage

__all__ = [
    "Chunk",
    "Conversation",
    "EncoderEngine",
    "Engine",
    "Guide",
    "Histogram",
    "Metrics",
    "QueueFullError",
    "Ticket",
    "Token",
    "TopToken",
    "Usage",
]
