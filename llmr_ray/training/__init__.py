"""Groups, batches, losses, schedules and the DDP training stage."""
