"""GPU kernels of speculative sampling: arrays in, arrays out. Knows JAX only.

`token`, `token_early_exit`, `sigmoid`, `cutoff` and `sample` hold one kernel each; `types` is what they share with the
plain JAX cores.
"""
