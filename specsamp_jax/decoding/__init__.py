"""The decoding loop: drafters, draft length, one step, whole texts."""
