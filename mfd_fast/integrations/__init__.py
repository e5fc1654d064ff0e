"""The losses as a backend of other trainers: one module per trainer.

    from mfd_fast.integrations.transformers import DistillTrainer

Importing this package imports no trainer; importing one of its modules checks that trainer's version and the signatures
of the hooks it uses, and raises ImportError where either is not what the module was written for.
What each one computes, and what it cures, is in ``docs/trainers.md``.
"""

from .shared import align_vocabulary, shift_labels

__all__ = ["align_vocabulary", "shift_labels"]
