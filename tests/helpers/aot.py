"""Triton's kernels compiled ahead of time: `report(capability)`, or as a module
run the same in JSON. Needs no GPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from helpers import ROOT, TESTS


@cache
def report(capability: int) -> dict[str, dict[str, int]]:
    """{kernel: {"registers", "stack", "local"}} of cubins built afresh, in a process of its own:
    outside Triton's interpreter.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": folder,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]
            ),
        }
        done = subprocess.run(
            [sys.executable, "-m", "helpers.aot", str(capability)],
            capture_output=True,
            text=True,
            env=env,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compile_kernel(
    kernel, capability: int, types: dict[str, str | tuple[str, ...]], constants: dict, options: dict
) -> dict[str, int]:
    """types: of arguments by name, of a tuple of pointers a tuple; pointers and what is marked "!"
    are multiples of 16. constants: what is known at compile time.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, []
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else types[name]
        signature[name] = kind if isinstance(kind, tuple) else kind.rstrip("!")
        if isinstance(kind, tuple):
            aligned += [(i, j) for j in range(len(kind))]
        elif kind.startswith("*") or kind.endswith("!"):
            aligned.append((i,))
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(
        kernel, signature, constexprs, {place: [["tt.divisibility", 16]] for place in aligned}
    )
    return usage_of(
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    )


def usage_of(compiled) -> dict[str, int]:
    """Registers, stack and local memory of a thread of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        name: int(re.search(rf"{key}:(\d+)", usage)[1])
        for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }


def td_loss(capability: int):
    from tdkern.triton.td_loss import BLOCK, CHUNK, OPTIONS, SUM_BLOCK, chunk_kernel, sum_kernel

    def chunk(net: str, data: str, *, consistency=False, l1=False, stride="i32!", **constants):
        rows = ("F_row", "F_p_row", "x0_row", "x_t_row", "x_tp_row", "dF_row")
        types = {
            **dict.fromkeys(("F", "F_p", "dF"), net),
            **dict.fromkeys(("x0", "x_t", "x_tp"), data),
            **dict.fromkeys(("upstream", "sums", "loss"), "*fp64" if data == "*fp64" else "*fp32"),
            **dict.fromkeys(("n", *rows), stride),
            "coef": "*fp64",
            "inverse_n": "fp64",
            "chunks": "i32",
        }
        sizes = {"CONSISTENCY": consistency, "L1": l1, "CHUNK": CHUNK, "BLOCK": BLOCK}
        return compile_kernel(chunk_kernel, capability, types, {**sizes, **constants}, OPTIONS)

    forward, backward = {"upstream": None}, {"sums": None, "loss": None}
    yield "forward float32", chunk("*fp32", "*fp32", **forward, sums=None, chunks=1)
    yield (
        "forward float32, unaligned, many chunks",
        chunk("*fp32", "*fp32", stride="i64", consistency=True, **forward),
    )
    yield (
        "forward bfloat16 of float32, no dF, no states",
        chunk("*bf16", "*fp32", **forward, sums=None, chunks=1, dF=None, x_t=None, x_tp=None),
    )
    yield "forward float16", chunk("*fp16", "*fp16", **forward)
    yield "forward float64", chunk("*fp64", "*fp64", consistency=True, **forward)
    yield "backward float32", chunk("*fp32", "*fp32", **backward)
    yield "backward bfloat16 of float32", chunk("*bf16", "*fp32", consistency=True, **backward)
    yield (
        "forward float32, l1",
        chunk("*fp32", "*fp32", consistency=True, l1=True, **forward, sums=None, chunks=1),
    )
    types = {
        "sums": "*fp32",
        "coef": "*fp64",
        "loss": "*fp32",
        "inverse_n": "fp64",
        "chunks": "i32",
    }
    yield (
        "sum",
        compile_kernel(
            sum_kernel,
            capability,
            types,
            {"SPAN": SUM_BLOCK, "SUM_BLOCK": SUM_BLOCK},
            {"enable_fp_fusion": True},
        ),
    )


def td_coef(capability: int):
    from tdkern.triton.td_coef import BLOCK, coef_kernel

    types = {
        **dict.fromkeys(coef_kernel.arg_names, "fp64"),
        "noise": "*fp64",
        "coef": "*fp64",
        "levels": "*fp64",
        "batch": "i32",
    }
    for from_index, precond, base_weight, weight in (
        (False, "edm", "karras", "pairwise"),
        (True, "ct", "truncated-snr", "pairwise_x0"),
    ):
        constants = {
            "FROM_INDEX": from_index,
            "PRECOND": precond,
            "BASE_WEIGHT": base_weight,
            "WEIGHT": weight,
            "BLOCK": BLOCK,
        }
        yield (
            precond,
            compile_kernel(coef_kernel, capability, types, constants, {"enable_fp_fusion": True}),
        )


def noise_pair(capability: int):
    from tdkern.triton.noise_pair import BLOCK, OPTIONS, pair_kernel

    def pair(data: str, *, shared=False, flat=True, stride="i32!", **constants):
        types = {
            **dict.fromkeys(pair_kernel.arg_names, "i32"),
            **dict.fromkeys(("x0_row", "out_row", "n", "plane"), stride),
            "x0": data,
            "x_t": data,
            "x_tp": data,
            "seed": "i64",
            "offset": "i64",
            "seed_at": "*i64",
            "offset_at": "*i64",
            **dict.fromkeys(("alpha", "sigma", "alpha_p", "sigma_p"), "*fp64"),
        }
        return compile_kernel(
            pair_kernel,
            capability,
            types,
            {"SHARED": shared, "FLAT": flat, "BLOCK": BLOCK, **constants},
            OPTIONS,
        )

    yield "float32, seed and offset given", pair("*fp32", seed_at=None, offset_at=None)
    yield "bfloat16, shared", pair("*bf16", shared=True)
    yield "float16 in a plane", pair("*fp16", flat=False, stride="i64")
    yield "float64 in a plane", pair("*fp64", flat=False)


def lists(capability: int):
    """ema_update_ and adam_ema_."""
    from tdkern.triton.adam_ema import adam_kernel
    from tdkern.triton.ema_update import BLOCK, ema_kernel

    types = {"param": "*bf16", "averages": ("*fp32", "*fp32"), "decays": "*fp64", "n": "i32!"}
    yield "averages", compile_kernel(ema_kernel, capability, types, {"BLOCK": BLOCK}, {})
    for storage, averages in (
        ("*fp32", ("*fp32", "*fp32")),
        ("*bf16", ("*fp32",)),
        ("*fp64", ("*fp64", "*fp64")),
        ("*fp16", None),
    ):
        types = {
            **dict.fromkeys(("grad", "exp_avg", "exp_avg_sq", "param"), storage),
            "averages": averages,
            "decays": "*fp64",
            "s": "*fp64",
            "skip": "*i32",
            "n": "i32!",
        }
        constants = {
            "BLOCK": BLOCK // 2 if storage == "*fp64" else BLOCK,
            **({} if averages else {"averages": None}),
        }
        yield f"adam {storage}", compile_kernel(adam_kernel, capability, types, constants, {})


def unet(capability: int):
    from tdkern.triton import branch_sum, group_norm
    from tdkern.triton.tiles import COLUMNS, COUNTS, OPTIONS, ROWS

    names = {**dict.fromkeys(COUNTS, "i32"), "channels": "i32!", "weight_row": "i32!"}
    names |= dict.fromkeys(("scale", "eps"), "fp32")

    def kernel(which, constants: dict, storage: str, options: dict = OPTIONS):
        images = dict.fromkeys(("x", "add", "y", "branch", "upstream", "dx"), storage)
        every = {**dict.fromkeys(which.arg_names, "*fp32"), **names, **images}
        return compile_kernel(which, capability, every, constants, options)

    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    of_norm = {**tile, "SILU": True}
    tiled = [
        (group_norm.sums_kernel, tile),
        (group_norm.result_kernel, of_norm),
        (group_norm.backward_sums_kernel, of_norm),
        (group_norm.backward_kernel, of_norm),
        (branch_sum.branch_sum_kernel, tile),
        (branch_sum.branch_sum_backward_kernel, tile),
    ]
    for which, constants in tiled:
        for storage in ("*fp32", "*bf16", "*fp16"):
            yield f"{which.__name__} {storage}", kernel(which, constants, storage)
    for which, constants in tiled[:4]:
        plain = {name: False if name == "SILU" else each for name, each in constants.items()}
        built = kernel(which, {**plain, "add": None}, "*bf16")
        yield f"{which.__name__}, nothing added, no silu", built
    for size in (4, 16, group_norm.SUMS):
        held = {"TILES": group_norm.SUMS // size, "SIZE": size}
        for which, constants in (
            (group_norm.groups_kernel, {**held, "ROWS": ROWS}),
            (group_norm.backward_groups_kernel, held),
        ):
            built = kernel(which, constants, "*fp32", group_norm.ONE_WARP)
            yield f"{which.__name__} of {size}", built


# The kernels of these were chosen by hand: every branch of them is in one. Of the other ops, what
# their example calls launch.
CHOSEN = {
    "td_loss": td_loss,
    "td_coef": td_coef,
    "noise_pair": noise_pair,
    "ema_update": lists,
    "adam_ema": lists,
    "unet": unet,
}


class NoDevice:
    """Triton's driver for compiling alone."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launched_by(op, capability: int):
    """What the op's example calls launch, in each dtype: compiled, and not launched."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(NoDevice(capability))
    run, kernels = JITFunction.run, {}

    def compiled(kernel, *args, warmup, **options):
        built = run(kernel, *args, warmup=True, **options)
        kernels[f"{kernel.__name__} {dtype}"] = built
        return built

    JITFunction.run = compiled
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            op.results(op.example(dtype=dtype), backend="triton")
    finally:
        JITFunction.run = run
    for name, built in kernels.items():
        yield name, usage_of(built)


def builds(capability: int):
    """(name, facts) of the kernels of every op there is, and of unet."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from tdkern.ops import OPS, _backends

    _backends.interpreted = lambda: True  # Triton's overloads take CPU tensors
    _backends.MISSING["triton"] = ""
    import tdkern.triton  # noqa: F401  (without a GPU the package does not import it by itself)

    stems = dict.fromkeys([*(op.stem for op in OPS.values()), "unet"])
    for chosen in dict.fromkeys(CHOSEN[stem] for stem in stems if stem in CHOSEN):
        for name, facts in chosen(capability):
            yield f"{chosen.__name__} {name}", facts
    for op in OPS.values():
        if op.stem not in CHOSEN:
            for name, facts in launched_by(op, capability):
                yield f"{op.name} {name}", facts


if __name__ == "__main__":
    print(json.dumps(dict(builds(int(sys.argv[1])))))
