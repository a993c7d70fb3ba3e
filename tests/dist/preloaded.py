"""What the server of the ranks imports once, before it forks them."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import tests.dist.training  # noqa: F401
