"""Plain data poisoning."""

from __future__ import annotations

from fedsim.attack import Attack
from fedsim.plugins import register


@register("data_poisoning")
class DataPoisoning(Attack):
    """Plain local training on batches of which a share carries the trigger and the target label.

    The baseline every other attack is compared with: nothing but the data differs from an honest client.
    """

    paper = "Gu et al., BadNets, arXiv 1708.06733; in federated learning: Bagdasaryan et al., AISTATS 2020"
    cost = "an honest round"
