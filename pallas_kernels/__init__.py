"""GPU kernels of speculative sampling: arrays in, arrays out. Imports JAX only.

Kernels: `token`, `token_early_exit`, `token_filtered`, `block` and `sigmoid` verify; `sample`, `sample_filtered` and
`sample_unfiltered` sample a token per row; `cutoffs` finds the cutoffs of rows. The other modules hold parts of them.
`types` has the types that they share with the plain JAX cores.
"""
