"""Chooses where kernels run: on the GPU, or in Triton's interpreter where there is none."""

import os

import pytest
import torch

torch.set_num_threads(1)  # the tests are small: threads would only wait for each other
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, hence here


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


def pytest_runtest_setup(item):
    if not GPU and item.get_closest_marker("gpu"):
        pytest.skip("needs a GPU")
