"""Serving many adapters from one model: fine-tuning jobs in the process that answers."""
