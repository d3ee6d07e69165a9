"""Whisper in Flax NNX."""
