"""fedsim: federated learning under backdoor attack, and how long the backdoor lives."""

from fedsim.direct import aggregate, local_attack

__all__ = ["aggregate", "local_attack"]
