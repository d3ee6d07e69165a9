"""The decoding loop: drafters, draft lengths, a single step, and generation of whole texts."""
