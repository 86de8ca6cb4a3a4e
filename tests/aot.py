"""Compiles Triton kernels for sm_90 without a GPU and reads their machine code: no register may spill.

TRITON_INTERPRET holds for a whole process (even Triton's own library is interpreted then), so the compiler
runs in a child.

    from aot import Job, assert_no_spills
    assert_no_spills("kernels.dice", [Job("_kernel", {"x": "*fp32", "n": "i64", "BLOCK": "constexpr"},
                                          {"BLOCK": 1024}, num_warps=4)])
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOOP = r"scf\.(?:while|for .*? iter_args)\s?\((.*?)\) (?::|->)"  # what it carries, "%x = %first, %y = %other"


@dataclass
class Job:
    kernel: str  # the name of a @triton.jit function in the module
    # every argument in order: "*fp32", "*u8", "i32", "i64", "fp32", "constexpr"; pointers are taken as aligned,
    # "i64:16" is an integer known to be a multiple of 16 (the launcher looks)
    signature: dict[str, str]
    constexprs: dict[str, int | None]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    target: int = 90  # the compute capability


def compile_all(module: str, jobs: list[Job]) -> list[dict]:
    """A dict a job: "spills" (instructions on local memory), "registers" a thread, "shared" memory in bytes, "shuffles"
    (exchanges between the threads of a warp), "loads" from global memory by kind, "carried": how many values each loop
    takes from one pass to the next. Skips the test where Triton or a disassembler is missing."""
    disassembler()
    child = subprocess.run(
        [sys.executable, __file__, module],
        input=json.dumps([asdict(job) for job in jobs]),
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout)


def assert_no_spills(module: str, jobs: list[Job]) -> list[dict]:
    results = compile_all(module, jobs)
    spilled = [pair for pair in zip(jobs, results, strict=True) if pair[1]["spills"]]
    assert not spilled, spilled
    return results


def disassembler() -> str:
    triton = pytest.importorskip("triton")
    for folder in (Path(triton.__file__).parent / "backends/nvidia/bin", Path("/usr/local/cuda/bin")):
        if (folder / "nvdisasm").exists():
            return str(folder / "nvdisasm")
    pytest.skip("no nvdisasm to read the machine code with")


def measure(fn, job: Job) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = job.signature.items()
    aligned = [i for i, (_, kind) in enumerate(kinds) if kind[0] == "*" or kind.endswith(":16")]
    source = ASTSource(
        fn,
        {name: kind.removesuffix(":16") for name, kind in kinds},
        job.constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "maxnreg": job.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", job.target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [disassembler(), "-c", cubin.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "registers": 1 + max(int(n) for n in re.findall(r"\bR(\d+)\b", sass)),
        "shuffles": len(re.findall(r"\bSHFL\b", sass)),
        "loads": Counter(re.findall(r"\b(?:LDG|LDGSTS)\.E\S*", sass)),
        "carried": [line.count(" = ") for line in re.findall(LOOP, compiled.asm["ttir"])],
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    kernels = importlib.import_module(sys.argv[1])
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    print(json.dumps([measure(getattr(kernels, job.kernel), job) for job in jobs]))
