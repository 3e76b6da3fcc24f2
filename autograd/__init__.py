"""One torch.autograd.Function per kernel pair: forward saves and calls, backward calls and returns."""

if __name__ == "autograd":
    raise ImportError(
        "this folder is fusedloss.autograd; install the project (pip install -e .) and import fusedloss"
    )
