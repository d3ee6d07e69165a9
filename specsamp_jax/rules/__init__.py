"""Verification rules as deterministic functions (cores): arrays and uniforms in, a `Verification` out.

A core takes uniforms instead of a key, so that a kernel can replace it and be tested for equal tokens.
"""
