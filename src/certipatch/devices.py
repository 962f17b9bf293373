"""Where networks run, unless the caller says."""

import torch


def default() -> torch.device:
    """The accelerator that torch sees, if it knows float64, which margins need; else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or found.type == "mps" else found
