"""Conversion between checkpoints and the model format of Hugging Face transformers, in both directions."""
