"""Two gloo processes: DistributedDataParallel and fully_shard over fused blocks with SyncBatchNorm."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from training_blocks import DenseLayer

import mbv2_kernels as mbv2
from mbv2_kernels import FusedInvertedResidual

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
STEPS = 3


def network() -> nn.Module:
    """Nothing whose statistics torch computes: its own SyncBatchNorm does not run on CPU."""
    torch.manual_seed(0)
    return nn.Sequential(
        DenseLayer(3, 6, stride=1),
        FusedInvertedResidual(6, 8, expand_ratio=4),
        FusedInvertedResidual(8, 8),
        FusedInvertedResidual(8, 12, stride=2, expand_ratio=1, momentum=None),
        DenseLayer(12, 24, 1, stride=1, momentum=None),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 3, 10, 9, generator=generator), torch.randint(4, (6,), generator=generator)


def train(model: nn.Module, share: slice, accumulate: int = 1) -> None:
    """STEPS steps of SGD on a share of each batch of 6, in `accumulate` pieces; the loss is a mean over the share."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimiser.zero_grad()
        x, labels = (t[share] for t in data(step))
        for piece, target in zip(x.chunk(accumulate), labels.chunk(accumulate), strict=True):
            (nn.functional.cross_entropy(model(piece), target) / accumulate).backward()
        optimiser.step()


def _ddp(model: nn.Module, rank: int) -> nn.Module:
    """In channels_last, where gradients must have the weights' strides also in dimensions of size 1."""
    # DistributedDataParallel refuses SyncBatchNorm on CPU, as torch's own does not run there: so it comes in after.
    ddp = nn.parallel.DistributedDataParallel(model.to(memory_format=torch.channels_last))
    mbv2.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model), strict=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Grad strides do not match bucket view strides")
        train(ddp, slice(3 * rank, 3 * rank + 3))
    return model


def _fsdp(model: nn.Module, rank: int) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    mbv2.fuse(model, strict=True, memory="lean")
    for block in model[:5]:
        fully_shard(block)
    fully_shard(model)
    train(model, slice(3 * rank, 3 * rank + 3))
    return model


def _unequal_shares(model: nn.Module, rank: int) -> nn.Module:
    """Gradients are averaged by hand, weighted with the share; one process has a single image."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    mbv2.fuse(model, strict=True)
    for step in range(STEPS):
        x, labels = (t[:5] if rank == 0 else t[5:] for t in data(step))
        model.zero_grad()
        (nn.functional.cross_entropy(model(x), labels, reduction="sum") / 6).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.sub_(0.1 * parameter.grad)
    return model


WAYS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "ddp": _ddp,
    "fully_shard": _fsdp,
    "unequal_shares": _unequal_shares,
}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, way in WAYS.items():
        model = way(network(), rank)
        rows = list(mbv2.summary(model))
        assert [row.backend for row in rows] == ["cpu"] * 5, rows
        state = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in model.state_dict().items()}
        torch.save(state, f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each way's weights of both processes, which are started once: importing torch takes the longest."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(_work, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one_with_the_large_batch(way: str, trained: Path) -> None:
    """The same weights and running statistics, in every process, as unfused training in float64."""
    states = [torch.load(trained / f"{way}{rank}.pt") for rank in range(2)]
    one = mbv2.unfuse(network()).double()
    optimiser = torch.optim.SGD(one.parameters(), lr=0.1)
    for step in range(STEPS):
        optimiser.zero_grad()
        x, labels = data(step)
        nn.functional.cross_entropy(one(x.double()), labels).backward()
        optimiser.step()
    for name, expected in one.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        assert torch.allclose(states[0][name].double(), expected.double(), rtol=1e-4, atol=1e-5), name


def test_gradient_accumulation() -> None:
    """Two halves, gradients added up: as unfused."""
    models = [mbv2.fuse(network()), mbv2.unfuse(network())]
    for model in models:
        train(model, slice(0, 6), accumulate=2)
    ours, theirs = (copy.deepcopy(model.state_dict()) for model in models)
    for name, expected in theirs.items():
        assert torch.allclose(ours[name], expected, rtol=1e-4, atol=1e-5), name
