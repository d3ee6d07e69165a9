"""The law of sampling from logits: filters, p and q of a row, uniforms, two-level draws."""
