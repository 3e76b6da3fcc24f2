"""Triton kernels and their launchers: canonical tensors in, fresh tensors out.

Importing this package imports no Triton: `operators` registers every launcher as an operator, and the
kernel modules are loaded at the first launch.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is fusedloss.kernels; install the project (pip install -e .) and import fusedloss"
    )
