"""mfd_loss in a single pass."""
