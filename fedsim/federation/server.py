"""The Flower ServerApp: plays a strategy's rounds over a Grid."""

from __future__ import annotations

import logging

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsim.federation.grids import RUN_ID
from fedsim.federation.messages import to_record
from fedsim.federation.strategy import FederatedStrategy

_ROUND_SECONDS = 7 * 24 * 3600.0  # Flower's limit on one round; ours never wait for a network


def server_app(strategy: FederatedStrategy) -> ServerApp:
    """The ServerApp that plays the strategy's remaining rounds."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        remaining = len(strategy.plan) - strategy.start_round
        if remaining <= 0:
            return
        strategy.start(
            grid,
            initial_arrays=to_record(strategy.global_vector),
            num_rounds=remaining,
            timeout=_ROUND_SECONDS,
            evaluate_fn=strategy.evaluate,
        )

    return app


def play(strategy: FederatedStrategy, grid: Grid) -> None:
    """Run the ServerApp over the grid, in this process."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)  # the progress display says what Flower would log
    try:
        server_app(strategy)(grid, Context(RUN_ID, 1, {}, RecordDict(), {}))
    finally:
        logger.setLevel(level)
