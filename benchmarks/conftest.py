"""Benchmarks compare two ways to the same result in one run; each group's table shows the ratio in brackets."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
