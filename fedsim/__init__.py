"""fedsim: federated learning under backdoor attack, and how long the backdoor lives."""

from fedsim.direct import aggregate

__all__ = ["aggregate"]
