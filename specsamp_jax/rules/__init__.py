"""Verification rules as deterministic cores: arrays and uniforms in, a `Verification` out.

A core draws nothing and knows no key, so that a kernel can take its place and be held to the same tokens.
"""
