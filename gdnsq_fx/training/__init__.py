"""Fine-tuning under a bit budget: loss, constraint, schedule and the loop."""
