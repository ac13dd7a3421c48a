"""The federation: Flower apps, the strategy, the schedule, and the grids they run on."""
