"""Prompts, the embedding store and the training stream."""
