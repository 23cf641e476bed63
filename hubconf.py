"""For `torch.hub.load(".../fastnas", "trained", "runs/mine", source="local")`."""

dependencies = ["torch"]

from fastnas import load_network as trained  # noqa: E402, F401
