"""Checkpoints in Hugging Face's layout."""
