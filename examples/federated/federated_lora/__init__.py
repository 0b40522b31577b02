"""Federated LoRA fine-tuning: clients train adapters with nplora, and a Flower server aggregates them."""
