"""The machine: what it is, and its floors, as measured here and now, which all later times are held against."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import torch

from .document import Row
from .lab import Lab, matmul_rate, median, read_bandwidth, times
from .worker import Fact, Found, Item, Note

PACKAGES = ("torch", "triton", "transformers", "kernels", "flash-attn", "safetensors", "numpy", "click")
QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "ecc.mode.current",
    "compute_mode", "mig.mode.current",
)  # fmt: skip


def items() -> Sequence[Item]:
    """Return the section's items."""
    return (
        Item(name="versions", seconds=4, run=versions),
        Item(name="floors", seconds=8, run=floors),
    )


def versions(lab: Lab) -> Iterator[Found]:
    """Tell what the machine is."""
    properties = torch.cuda.get_device_properties(lab.device)
    facts = {
        "GPU": f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} multiprocessors",
        "memory": f"{properties.total_memory:,} bytes",
        "L2": f"{getattr(properties, 'L2_cache_size', 0):,} bytes",
        "CUDA of torch": str(torch.version.cuda),
        "host": f"{platform.machine()}, {platform.processor() or processor()}, Linux {platform.release()}, "
        f"glibc {platform.libc_ver()[1]}",
        "g++": first_line(["g++", "--version"]),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    for name, value in zip(
        QUERY, first_line(["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]).split(","), strict=False
    ):
        facts[f"nvidia-smi {name}"] = value.strip()
    for name, value in facts.items():
        yield Row(table="", cells={"what": name, "found": value})


def floors(lab: Lab) -> Iterator[Found]:
    """Measure how fast memory is read and copied, and how fast products are."""
    device = lab.device
    bandwidth, product = read_bandwidth(device), matmul_rate(device)
    yield Fact(name="bandwidth", value=bandwidth)
    yield Fact(name="matmul", value=product)
    lab.facts |= {"bandwidth": bandwidth, "matmul": product}
    source = torch.zeros(2 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median(times([lambda: target.copy_(source)], rounds=7))
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    upload = host.numel() / median(times([lambda: target[: host.numel()].copy_(host, non_blocking=True)], rounds=5))
    tiny = torch.zeros(1, device=device)
    launch = median(times([lambda: tiny.add_(1)] * 20, rounds=9))
    half = matmul_rate(device, dtype=torch.float16)
    for what, value, unit in (
        ("read of a large buffer", bandwidth / 1e12, "TB/s"),
        ("copy on the device, read and written", copy / 1e12, "TB/s"),
        ("pinned host memory to the device", upload / 1e9, "GB/s"),
        ("bf16 product, 8192³", product / 1e12, "TFLOP/s"),
        ("fp16 product, 8192³", half / 1e12, "TFLOP/s"),
        ("a launch from Python", launch * 1e6, "µs"),
    ):
        yield Row(table="Floors", cells={"what": what, "measured": value, "unit": unit})
    clocks = first_line(["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"])
    yield Note(text=f"Clocks and power right after the products: {clocks}.")


def first_line(command: Sequence[str]) -> str:
    """Return the first line that a command prints, or why there is none."""
    if shutil.which(command[0]) is None:
        return f"no {command[0]}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)[:100]
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else ""


def processor() -> str:
    """Return the processor's name as /proc/cpuinfo has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""
