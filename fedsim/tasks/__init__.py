"""Task families: data, partition, model and metric."""
