"""modal_pool and its gradients."""
