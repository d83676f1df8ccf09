"""From a model to a torch.fx graph that computes the same."""
