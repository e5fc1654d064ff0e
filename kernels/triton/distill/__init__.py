"""distill_loss between two rows of logits: divergences, statistics, values, gradients, kernels."""
