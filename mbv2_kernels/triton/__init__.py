"""The CUDA backend: kernels.py (device code), configs.py (which tile), ops.py (torch), offline.py (for developers).
The same for training: training_kernels.py, training_ops.py, training_offline.py.
gluon_*.py are a second kernel and what belongs to it: GLUON.md.

ops.py is imported with the first CUDA tensor or by set_backend("triton"), so that the package works without Triton.
"""
