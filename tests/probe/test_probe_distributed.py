"""Sharded and wrapped models: DDP, FSDP 1 and 2 and tensor parallelism over two processes, and accelerate."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rhythm_kernels import HeadGroups, RhythmProbe, head_groups

from . import probe_models as models

GROUPS = HeadGroups(local=[(0, 0), (2, 1), (2, 3)], global_=[(1, 0), (2, 2), (3, 3)])


def measured(model, batch):
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model(**batch, use_cache=False)
    return probe.waad, probe.fai


def _data_parallel_rank(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        batch = models.padded_batch()
        mine = {name: x[rank::2] for name, x in batch.items()}
        model = models.tiny_model("qwen3")
        expected, groups = measured(model, mine), head_groups(model, [mine])
        wrapped = torch.nn.parallel.DistributedDataParallel(model.train())
        with RhythmProbe(wrapped, GROUPS) as probe:
            wrapped(**mine, use_cache=False).logits.float().sum().backward()
        assert torch.equal(probe.waad, expected[0])
        assert torch.equal(probe.fai, expected[1])
        assert head_groups(wrapped, [mine]) == groups
        model = models.tiny_model("qwen3")
        wrapped = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0])}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        assert head_groups(wrapped, [mine]) == groups  # its very first forward
        assert all(torch.equal(*pair) for pair in zip(measured(wrapped, mine), expected))
        model = models.tiny_model("qwen3")
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert head_groups(model, [mine]) == groups
        assert all(torch.equal(*pair) for pair in zip(measured(model, mine), expected))
        with RhythmProbe(model.train(), GROUPS) as probe:
            model(**mine, use_cache=False).logits.float().sum().backward()
        torch.testing.assert_close(probe.waad, expected[0])
    finally:
        dist.destroy_process_group()


def test_ddp_and_fsdp(tmp_path):
    """Each of two processes measures its own rows of the batch."""
    mp.spawn(_data_parallel_rank, (str(tmp_path / "store"),), nprocs=2)


def _tensor_parallel_rank(rank: int, folder: str) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        batch = models.padded_batch()
        whole = models.tiny_model("llama")
        expected, groups = measured(whole, batch), head_groups(whole, [batch], layers="all", by="receiver")
        plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **plan).eval()
        for mine, want in zip(measured(model, batch), expected):
            torch.testing.assert_close(mine, want, atol=1e-4, rtol=0)
        assert head_groups(model, [batch], layers="all", by="receiver") == groups
    finally:
        dist.destroy_process_group()


@pytest.mark.long
def test_tensor_parallel(tmp_path):
    """Each of two processes has two of the four heads; one all-reduce gives both of them the whole."""
    models.tiny_model("llama").save_pretrained(tmp_path)
    mp.spawn(_tensor_parallel_rank, (str(tmp_path),), nprocs=2)


def test_accelerate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # there is one a process, and trainers leave theirs
    batch = models.padded_batch()
    model = models.tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = measured(model, batch)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    waad, fai = measured(prepared, batch)
    assert torch.equal(waad, expected[0])
    assert torch.equal(fai, expected[1])
