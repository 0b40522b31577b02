"""Evaluates a model on data: losses, generated answers, multiple choice, and comparisons of adapters."""
