"""What several test modules need and no fixture gives; imported as ``tests.support`` (pyproject.toml: pythonpath)."""
