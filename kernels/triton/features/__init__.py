"""feature_loss and its gradients."""
