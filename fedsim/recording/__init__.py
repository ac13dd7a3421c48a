"""What a run leaves on disk: tables, checkpoints, summary, manifest."""
