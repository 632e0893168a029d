"""Sharded and wrapped models: FSDP2 over two processes, and models that accelerate has prepared."""

from __future__ import annotations

import probe_models as models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rhythm_kernels import HeadGroups, RhythmProbe, head_groups

GROUPS = HeadGroups(local=[(0, 0), (2, 1), (2, 3)], global_=[(1, 0), (2, 2), (3, 3)])


def measured(model, batch):
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model(**batch, use_cache=False)
    return probe.waad, probe.fai


def _fsdp2_rank(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        batch = models.padded_batch()
        mine = {name: x[rank::2] for name, x in batch.items()}
        model = models.tiny_model("qwen3")
        expected, groups = measured(model, mine), head_groups(model, [mine])
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(torch.equal(*pair) for pair in zip(measured(model, mine), expected))
        assert head_groups(model, [mine]) == groups
        with RhythmProbe(model.train(), GROUPS) as probe:
            model(**mine, use_cache=False).logits.float().sum().backward()
        torch.testing.assert_close(probe.waad, expected[0])
    finally:
        dist.destroy_process_group()


def test_fsdp2(tmp_path):
    mp.spawn(_fsdp2_rank, (str(tmp_path / "store"),), nprocs=2)


def test_accelerate():
    from accelerate import Accelerator

    batch = models.padded_batch()
    model = models.tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = measured(model, batch)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    waad, fai = measured(prepared, batch)
    assert torch.equal(waad, expected[0])
    assert torch.equal(fai, expected[1])
