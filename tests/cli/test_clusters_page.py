"""docs/clusters.md: what it says to `tdkern train` is understood."""

import re

import yaml

from helpers import ROOT
from tdkern.cli.train import train
from tdkern.training.presets import PRESETS

PAGE = (ROOT / "docs/clusters.md").read_text()
OF_TORCHRUN = set("standalone nnodes nproc_per_node rdzv-backend rdzv-endpoint rdzv-id".split())
OF_SLURM = {
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "cpus-per-task",
    "time",
    "signal",
    "requeue",
}


def test_its_flags_and_presets_are_there():
    known = {name.lstrip("-") for param in train.params for name in param.opts}
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", PAGE))
    assert flags - OF_TORCHRUN - OF_SLURM - known == set()
    assert {"shard", "compile", "bench", "cache", "ls", "resume"} <= flags
    presets = re.findall(r"--preset (\S+?)[\s)]", PAGE)
    assert presets and set(presets) <= set(PRESETS)


def test_its_yaml_is_a_job():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    job = yaml.safe_load(text)
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert "torchrun -m tdkern.cli train" in container["args"][0]
