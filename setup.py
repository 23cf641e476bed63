"""Builds ``fastnas._C`` on torch's stable ABI and records how; everything else is in pyproject.toml."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    raise SystemExit("fastnas: install torch first (pip install torch), then use --no-build-isolation") from None

ROOT = Path(__file__).parent
# ninja from the same environment is found even when that environment is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
# The oldest torch whose stable ABI the sources use; the library then loads in every later torch.
TORCH_TARGET = "0x020b000000000000"


def compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def toolkit_problem() -> str:
    """What is missing to build for the CUDA that torch was built with; empty when nothing is."""
    home = cpp_extension.CUDA_HOME
    if torch.version.cuda is None or home is None:
        return "nvcc or a CUDA build of torch is missing"
    nvcc = Path(home, "bin", "nvcc")
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False) if nvcc.exists() else None
    release = re.search(r"release (\d+)\.\d+", done.stdout if done else "")
    if release is None:
        return f"{nvcc} does not run, set CUDA_HOME to the toolkit"
    if release[1] != torch.version.cuda.partition(".")[0]:
        return f"nvcc is of CUDA {release[1]} and torch of CUDA {torch.version.cuda}"
    if not Path(home, "include", "cuda_runtime.h").exists():
        return f"{home} has no CUDA headers, set CUDA_HOME to the toolkit"
    return ""


def choose_cuda(sources: list[str]) -> tuple[bool, str]:
    """Whether to build the CUDA sources, and why."""
    wish = os.environ.get("FASTNAS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"fastnas: FASTNAS_CUDA={wish} is not understood, use 0 or 1")
    if wish == "0":
        return False, "FASTNAS_CUDA=0"
    if missing := toolkit_problem() if sources else "there are no CUDA sources in this version":
        return False, f"FASTNAS_CUDA=1 was asked for, but {missing}" if wish == "1" else missing
    if wish == "1":
        return True, "FASTNAS_CUDA=1"
    if torch.cuda.is_available():
        return True, "toolchain found, GPU visible"
    return False, "no GPU visible (FASTNAS_CUDA=1 builds for one anyway)"


def version_of(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0] or path


# One library for each instruction set, with the macro that its sources see; fastnas/_ext.py loads the best one.
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"baseline": None} | ({"avx2": "FASTNAS_AVX2", "avx512": "FASTNAS_AVX512"} if X86 else {})

cpp_sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
cu_sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu"))
cxx = compiler()
with_cuda, cuda_reason = choose_cuda(cu_sources)
with_cuda = with_cuda and cxx is not None

facts = {
    "torch": torch.__version__,
    "torch_target": "2.11",
    "python": platform.python_version(),
    "compiler": version_of(cxx) if cxx else None,
    "native": cxx is not None,
    "native_reason": cxx or "no C++ compiler found (c++, g++, clang++ or $CXX): reference backends only",
    "cuda": with_cuda,
    "cuda_reason": cuda_reason,
    "cuda_toolkit": torch.version.cuda if with_cuda else None,
    "instruction_sets": list(INSTRUCTION_SETS) * (cxx is not None),
    "sources": cpp_sources * (cxx is not None) + cu_sources * with_cuda,
}

print("fastnas build decisions")
print(f"  torch    {facts['torch']} (library loads in torch >= {facts['torch_target']})")
print(f"  native   {'yes' if facts['native'] else 'no'}: {facts['native_reason']}")
print(f"  for      {', '.join(facts['instruction_sets']) or 'none'}")
print(f"  CUDA     {'yes' if facts['cuda'] else 'no'}: {facts['cuda_reason']}", flush=True)


def write_facts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        write_facts(ROOT / "fastnas" if self.editable_mode else Path(self.build_lib) / "fastnas")


class BuildExt(cpp_extension.BuildExtension):
    def build_extension(self, ext) -> None:
        # The same sources make other objects for each library.
        shared, self.build_temp = self.build_temp, str(Path(self.build_temp, ext.name))
        super().build_extension(ext)
        self.build_temp = shared

    def run(self) -> None:
        super().run()
        write_facts(ROOT / "fastnas" if self.inplace else Path(self.build_lib) / "fastnas")


def extension(kind, name: str, sources: list[str], macros: list[tuple[str, str | None]]):
    cxx_flags = ["-O3", "-g0", "-std=c++20", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    # tests/nvcc_check.sh has the same flags.
    nvcc_flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-Wall,-fopenmp-simd,-fvisibility=hidden"]
    return kind(
        f"fastnas._C.{name}",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(p) for pattern in ("*.h", "*.cuh") for p in (ROOT / "csrc").rglob(pattern)),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), *macros],
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        py_limited_api=True,
    )


def extensions() -> list:
    if not facts["native"]:
        return []
    libraries = [
        extension(cpp_extension.CppExtension, name, cpp_sources, [(macro, None)] if macro else [])
        for name, macro in INSTRUCTION_SETS.items()
    ]
    if with_cuda:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # with a GPU torch takes that one
        sources = ["csrc/module.cpp", *cu_sources]
        libraries.append(extension(cpp_extension.CUDAExtension, "cuda", sources, [("USE_CUDA", None)]))
    return libraries


setup(
    ext_modules=extensions(),
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if facts["native"] else {},
)
