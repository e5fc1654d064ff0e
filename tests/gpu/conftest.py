"""A test of two devices is collected where there are two."""

import torch

collect_ignore = [] if torch.cuda.device_count() > 1 else ["test_gpu_second_device.py"]
