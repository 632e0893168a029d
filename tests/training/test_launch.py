"""`training/launch/`: files that accelerate reads, that start what their names say, and explain each value."""

from __future__ import annotations

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from training.recipe import ROOT

FILES = {path.stem: path for path in sorted((ROOT / "training" / "launch").glob("*.yaml"))}


def launched(name, *words):
    """The arguments of a launch, as accelerate completes them from the file."""
    words = ["--config_file", str(FILES[name]), *words, "-m", "training", "train", "RECIPE.yaml"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def test_the_files():
    assert set(FILES) == {"cpu", "ddp", "ddp_nodes", "fsdp2", "fsdp2_nodes", "zero3"}


@pytest.mark.parametrize("name", FILES)
def test_each_value_is_explained_and_known(name):
    text = FILES[name].read_text(encoding="utf-8")
    head, *_ = text.split("\n\n")
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"training/launch/{name}.yaml" in head and "-m training train RECIPE.yaml" in head
    values = 3  # since the last comment, which may be of several
    for line in text.removeprefix(head).split("\n"):
        if line.strip().startswith("#"):
            values = 0
        elif line.strip() and not line.endswith("_config:"):
            values += 1
            assert values <= 3, line
    config = load_config_from_file(str(FILES[name]))  # refuses keys that it does not know
    known = vars(launch_command_parser().parse_args(["SCRIPT"]))
    inner = {**config.fsdp_config, **config.deepspeed_config}
    assert set(inner) <= {*known, "gradient_accumulation_steps"}
    assert yaml.safe_load(text)["mixed_precision"] == ("bf16" if name == "zero3" else "no")


def test_what_they_start():
    cpu, ddp, sharded, zero3 = (launched(name) for name in ("cpu", "ddp", "fsdp2", "zero3"))
    assert (cpu.multi_gpu, cpu.use_cpu, cpu.num_processes) == (True, True, 2)
    assert (ddp.multi_gpu, ddp.use_cpu, ddp.num_processes, ddp.num_machines) == (True, False, 8, 1)
    assert (sharded.use_fsdp, sharded.num_processes) == (True, 8)
    assert (zero3.use_deepspeed, zero3.zero_stage, str(zero3.zero3_init_flag).lower()) == (True, 3, "false")
    environment = prepare_multi_gpu_env(sharded)
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    for name in ("ddp_nodes", "fsdp2_nodes"):
        node = launched(name, "--machine_rank", "1", "--main_process_ip", "HOST")
        assert (node.num_machines, node.num_processes, node.machine_rank, node.main_process_ip) == (2, 16, 1, "HOST")
