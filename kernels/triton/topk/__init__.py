"""distill_loss with a teacher that lists its largest classes."""
