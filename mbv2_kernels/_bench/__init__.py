"""What the command line and the benchmark suite share: inputs, checks, unfused peers, interleaved timing.

Nothing here is imported by `import mbv2_kernels`.
"""
