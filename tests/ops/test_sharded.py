"""AdamEMA, EMA and the list ops where parameters are shards: FSDP2, tensor-parallel layouts, FSDP1
and ZeroRedundancyOptimizer, on gloo."""

import contextlib
import math
import traceback
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tdkern
from tdkern.ema import EMA
from tdkern.ops import adam_ema_, ema_update_, found_inf
from tdkern.optim import AdamEMA, RAdamEMA
from tdkern.training.distributed import leave

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
)
DECAYS = [0.9, 0.0]


def run(rank, world, folder):
    """All checks in one process after another, as processes are long to start; the first that
    fails ends them."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    try:
        for check in CHECKS:
            name = f"{check.__name__}-{rank}"
            try:
                check(rank, world)
            except BaseException:
                (folder / f"{name}.error").write_text(traceback.format_exc())
                raise
            (folder / name).touch()
    finally:
        leave()


@pytest.fixture(scope="module", params=[2, 3])
def world(request, tmp_path_factory):
    """A number of processes, and the folder where they have left what passed."""
    folder = tmp_path_factory.mktemp(f"world-{request.param}")
    with contextlib.suppress(torch.multiprocessing.ProcessRaisedException):
        torch.multiprocessing.spawn(run, (request.param, folder), request.param)
    return request.param, folder


def network():
    """Its first dimensions, 7, 7, 2 and 2, are no multiples of 2 or 3: shards are uneven, and one
    may be empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def trained(net, averages, steps=4, bad_step=1, kind=AdamEMA):
    """The optimizer after some steps, one of whose gradients has an element that is not finite."""
    optimizer = kind(
        net.parameters(),
        0.02,
        weight_decay=0.1,
        averages=[average.module.parameters() for average in averages],
        decays=DECAYS[: len(averages)],
    )
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        scale = torch.ones(2, dtype=torch.float64)
        if step == bad_step:
            scale[1] = math.inf  # the gradient of the last rows of the second layer
        (
            net(torch.randn(3, 5, generator=random, dtype=torch.float64)) * scale
        ).square().sum().backward()
        optimizer.step()
    return optimizer


def whole(tensors):
    return [
        tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors
    ]


def same(sharded, plain):
    for actual, expected in zip(whole(sharded), plain, strict=True):
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-12, atol=1e-14)


def fully_sharded(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    plain = network()
    plain_averages = [EMA(plain) for _ in DECAYS]
    expected = trained(plain, plain_averages)
    net = network()
    averages = [EMA(net) for _ in DECAYS]
    for module in (net, *(average.module for average in averages)):
        fully_shard(module, mesh=mesh)
    optimizer = trained(net, averages)
    assert optimizer.skipped.item() == expected.skipped.item() == 1
    same(net.parameters(), plain.parameters())
    for average, plain_average in zip(averages, plain_averages, strict=True):
        same(average.module.parameters(), plain_average.module.parameters())
    for param, plain_param in zip(net.parameters(), plain.parameters(), strict=True):
        same([optimizer.state[param]["exp_avg"]], [expected.state[plain_param]["exp_avg"]])
    versions = [param._version for param in averages[0].module.parameters()]
    averages[0].update(net, 0.25)
    plain_averages[0].update(plain, 0.25)
    same(averages[0].module.parameters(), plain_averages[0].module.parameters())
    assert all(
        param._version > version
        for param, version in zip(averages[0].module.parameters(), versions, strict=True)
    )


def radam_fully_sharded(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, net = network(), network()
    averages, plain_averages = [EMA(net)], [EMA(plain)]
    for module in (net, averages[0].module):
        fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    # past the five steps that are not rectified
    expected = trained(plain, plain_averages, steps=9, kind=RAdamEMA)
    optimizer = trained(net, averages, steps=9, kind=RAdamEMA)
    assert optimizer.skipped.item() == expected.skipped.item() == 1
    same(net.parameters(), plain.parameters())
    same(averages[0].module.parameters(), plain_averages[0].module.parameters())


def target_of_a_sharded_network(rank, world):
    """A target is only ever called forward, after which FSDP2's root keeps its whole parameters:
    an update must reach the next call, whoever made it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    x = torch.ones(3, 5, dtype=torch.float64)
    for by_optimizer in (False, True):
        plain, net = network(), network()
        targets = EMA(plain), EMA(net)
        fully_shard(net, mesh=mesh)
        fully_shard(targets[1].module, mesh=mesh)
        with pytest.raises(ValueError, match="EMA: net must be copied before fully_shard"):
            EMA(net)
        optimizers = [
            AdamEMA(each.parameters(), 0.1, averages=[target.module.parameters()], decays=[0.5])
            for each, target in zip((plain, net), targets, strict=True)
        ]
        for _ in range(2):
            answers = []
            for each, target, optimizer in zip((plain, net), targets, optimizers, strict=True):
                with torch.no_grad():
                    answers.append(target.module(x))
                optimizer.zero_grad()
                each(x).square().sum().backward()
                if by_optimizer:
                    optimizer.step()
                    target.copy_buffers(each)
                else:
                    torch.optim.SGD(each.parameters(), 0.1).step()
                    with torch.no_grad():
                        each(x)  # now the network's parameters are whole too
                    target.update(each, 0.5)
            torch.testing.assert_close(answers[1], answers[0], rtol=1e-12, atol=1e-14)
        assert not torch.equal(answers[0], network()(x))


def tensor_parallel(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    for backend in ("cpp", "reference"):
        random = torch.Generator().manual_seed(0)
        columns = [
            [torch.randn(7, 5, generator=random, dtype=torch.float64).abs() for _ in range(3)]
            for _ in range(5)
        ]
        layouts = [[Shard(0)], [Shard(1)], [Replicate()]]
        sharded = [
            [
                distribute_tensor(tensor.clone(), mesh, layout)
                for tensor, layout in zip(column, layouts, strict=True)
            ]
            for column in columns
        ]
        # a gradient that is laid otherwise than its parameter
        sharded[1][2] = distribute_tensor(columns[1][2], mesh, [Shard(0)])
        steps = [[torch.zeros(()) for _ in range(3)] for _ in range(2)]
        for (params, grads, m, v, average), counts in ((columns, steps[0]), (sharded, steps[1])):
            adam_ema_(params, grads, m, v, counts, [average], [0.9], lr=0.1, backend=backend)
            tdkern.ema_update_([average], params, torch.tensor([0.5]), backend=backend)
        for column, plain in zip(sharded, columns, strict=True):
            same(column, plain)
        bad = distribute_tensor(
            torch.full((7, 5), math.nan) if rank == 0 else torch.zeros(7, 5),
            mesh,
            [Shard(0)],
            src_data_rank=None,
        )
        # of rank 0's rows alone
        assert found_inf([sharded[0][0], bad], backend=backend).item() == 1
        assert found_inf(sharded[0], backend=backend).item() == 0
        part = torch.distributed.tensor.DTensor.from_local(
            torch.full((2,), math.inf if rank == 0 else -math.inf), mesh, [Partial()]
        )
        assert found_inf([part], backend=backend).item() == 1
        for averages, message in (
            ([torch.zeros(7, 5, dtype=torch.float64)], "a plain Tensor"),
            ([distribute_tensor(columns[0][0], mesh, [Shard(1)])], "a DTensor of"),
        ):
            with pytest.raises(
                ValueError,
                match=r"ema_update_: averages\[0\]\[0\] must be distributed as its parameter is, "
                rf".*, got {message}",
            ):
                tdkern.ema_update_([averages], sharded[0][:1], [0.5], backend=backend)
        with pytest.raises(ValueError, match="heun_step: F must be a plain tensor, got a DTensor"):
            tdkern.heun_step(
                sharded[0][0], columns[0][0], torch.ones(6, dtype=torch.float64), backend="cpp"
            )


def plain_beside_sharded(rank, world):
    """As a loss's own parameters beside a sharded network's, in either order."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    shards = partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])

    def optimizers(first):
        """Of parameters of which one is sharded, and of the same that are plain."""
        for shard in (shards, lambda tensor: tensor):
            values = [shard(torch.arange(14.0).reshape(7, 2)), torch.ones(3)]
            params = [nn.Parameter(each) for each in values]
            averages = [each.detach().clone() for each in params]
            params[0].grad, params[1].grad = shard(torch.ones(7, 2)), torch.full((3,), 2.0)
            if first == "plain":
                params, averages = params[::-1], averages[::-1]
            yield AdamEMA(params, 0.1, averages=[averages], decays=[0.5]), params, averages

    for first in ("plain", "sharded"):
        found = []
        for optimizer, params, averages in optimizers(first):
            optimizer.step(clip=torch.tensor(0.5))
            ema_update_([averages], [param.detach() for param in params], [0.25])
            assert optimizer.skipped.item() == 0
            found.append([params, averages])
        for sharded, plain in zip(*found, strict=True):
            same(sharded, plain)


def flags_of_all_processes(rank, world):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    net = FullyShardedDataParallel(nn.Linear(4, 8, bias=False), device_id=torch.device("cpu"))
    optimizer = AdamEMA(net.parameters(), 1e-2)
    scale = torch.ones(8)
    scale[7] = math.inf  # a row of the last shard
    (net(torch.randn(3, 4)) * scale).sum().backward()
    before = next(net.parameters()).detach().clone()
    optimizer.step()
    assert torch.equal(before, next(net.parameters()).detach()) and optimizer.skipped.item() == 1

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = ZeroRedundancyOptimizer(net.parameters(), AdamEMA, lr=1e-2)
    for bad in (True, False):
        optimizer.zero_grad()
        net(torch.ones(3, 4)).sum().backward()
        if bad:
            net[0].weight.grad[0, 0] = math.nan
        before = [param.detach().clone() for param in net.parameters()]
        optimizer.step()
        moved = [not torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True)]
        assert moved == [not bad] * 4, (rank, moved)

    # one parameter for two or three processes: some have none, and count all the same
    one = nn.Parameter(torch.ones(2))
    optimizer = ZeroRedundancyOptimizer([one], AdamEMA, lr=1e-2)
    one.grad = torch.tensor([1.0, math.inf])
    optimizer.step()
    assert optimizer.optim.skipped.item() == 1 and one.tolist() == [1, 1]

    # some of the parameters in each process, by hand
    mine = nn.Parameter(torch.ones(2))
    mine.grad = torch.full((2,), math.nan if rank == 0 else 1.0)
    optimizer = AdamEMA([mine], 1e-2, flag_group=dist.group.WORLD)
    optimizer.step()
    assert optimizer.skipped.item() == 1 and mine.tolist() == [1, 1]


def plain_parameters_ask_nobody(rank, world):
    """Gradients that are no shards are this process's own: the others need not step at all."""
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.full((2,), math.nan if rank == 0 else 1.0)
    if rank < 2:
        AdamEMA([param], 0.1).step()
    assert (param.tolist() == [1, 1]) == (rank != 1)

    net = nn.parallel.DistributedDataParallel(network())  # the same in all processes, as they come
    optimizer = AdamEMA(net.parameters(), 0.1)
    calls = []
    real = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs)
    try:
        x = torch.ones(3, 5, dtype=torch.float64)
        (net(x) * (math.nan if rank == world - 1 else 1.0)).sum().backward()
        optimizer.step()
    finally:
        dist.all_reduce = real
    assert optimizer.skipped.item() == 1 and not calls


CHECKS = [
    fully_sharded,
    radam_fully_sharded,
    target_of_a_sharded_network,
    tensor_parallel,
    plain_beside_sharded,
    flags_of_all_processes,
    plain_parameters_ask_nobody,
]


@pytest.mark.xdist_group("sharded")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_processes(check, world):
    count, folder = world
    passed = [(folder / f"{check.__name__}-{rank}").exists() for rank in range(count)]
    errors = [file.read_text() for file in sorted(folder.glob("*.error"))]
    assert all(passed), "\n".join(errors)
