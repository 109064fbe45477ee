"""Measures ONNX packages at the 20b layer shape: ours beside that of onnxruntime-genai's own builder, and transformers.

In: an interpreter with onnxruntime-genai, torch and transformers, in an environment of its own. A random MXFP4 checkpoint is
made, compiled for each tier, and given to the builder; all packages run in onnxruntime-genai, turn by turn in one run, ours in
oxfuse's runtime as well. The builder's runs twice: as built, and told to use all cores, as ours are. Out: JSON and Markdown with
medians, floors, ratios, and the peak memory of making each package.

    python -m oxfuse.compiler.bench.onnx_peers --genai VENV/bin/python --json onnx.json --markdown onnx.md
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from oxfuse.compiler.bench.cost import cost_of
from oxfuse.compiler.bench.memory import measure_bare_torch, measure_compile
from oxfuse.compiler.bench.probe import ForeignLoad, matmul_peak, read_bandwidth
from oxfuse.compiler.bench.random_checkpoint import write_checkpoint
from oxfuse.compiler.bench.speed import machine_facts
from oxfuse.compiler.bench.worker_process import Worker, best_implementation, take_quietly
from oxfuse.compiler.lowering.genai import CONFIG
from oxfuse.compiler.process_memory import MemoryWatch
from oxfuse.errors import UserError
from oxfuse.runtime.machine import processors
from oxfuse.runtime.manifest import read_manifest
from oxfuse.runtime.units import size_text

TIERS = ("int4", "int8")
BUILDER, ALL_CORES, TRANSFORMERS = "builder int4", "builder int4, all cores", "transformers bf16"
OWN = "int4 in oxfuse"
BARS: dict[tuple[str, str, str], float | None] = {
    ("int4", "decode", BUILDER): 1.5,
    ("int8", "decode", BUILDER): 1.0,
    ("int4", "decode", ALL_CORES): None,
    ("int8", "decode", ALL_CORES): None,
    ("int4", "prefill", TRANSFORMERS): 1.0,
    ("int8", "prefill", TRANSFORMERS): 1.0,
}
"""How many times as fast as a peer a tier must be; None where it is told, and no bar."""
BLOCK_BYTES = 0.5 + 4 / 32
"""A weight of the builder's: 4 bits, and a share of a float32 scale."""
EXPORT_LIMIT = 2_000_000_000
BUILD = "onnxruntime_genai.models.builder"
PHASES = ("decode", "prefill")


@dataclass(kw_only=True)
class Package:
    """What was made: seconds and peak of anonymous and shared memory over a bare `import torch`, and the folder's bytes."""

    name: str
    seconds: float
    memory: int
    bytes: int


@dataclass(kw_only=True)
class Figure:
    """Samples of one engine in one phase, in seconds a token, and the least that it could take."""

    engine: str
    phase: str
    floor: float
    implementation: str = ""
    samples: list[float] = field(default_factory=list)
    disturbed: int = 0

    @property
    def seconds(self) -> float:
        """Return the median."""
        return float(statistics.median(self.samples))


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run; `bandwidth` in bytes and `peak` in floating-point operations a second, of this run."""

    machine: dict[str, Any]
    options: dict[str, Any]
    bandwidth: float
    peak: float
    packages: list[Package]
    engines: dict[str, str]
    missing: dict[str, str]
    figures: list[Figure]

    def ratio(self, engine: str, phase: str, peer: str) -> float | None:
        """Return how many times as fast as the peer the engine is."""
        found: dict[str, float] = {figure.engine: figure.seconds for figure in self.figures if figure.phase == phase}
        return found[peer] / found[engine] if engine in found and peer in found else None

    def to_json(self) -> str:
        """Return everything, samples included."""
        ratios = {f"{tier} {phase} over {peer}": self.ratio(tier, phase, peer) for tier, phase, peer in BARS}
        return json.dumps(asdict(self) | {"ratios": ratios}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return tables of speed and of what making a package takes, and the bars."""
        machine, options = self.machine, self.options
        lines = [
            f"{options['layers']} layers at the 20b shape, vocabulary {options['vocabulary']}, random MXFP4 experts; "
            f"{machine['processor']}, {options['threads']} threads of {machine['cores']} cores, {machine['system']}; "
            f"{'; '.join(sorted(set(self.engines.values())))}. Read bandwidth {self.bandwidth / 1e9:.1f} GB/s, matmul peak "
            f"{self.peak / 1e9:.0f} GFLOP/s. Medians of {options['rounds']} interleaved turns.",
            "",
            f"| engine | decode at {options['context']} (ms) | floor | prefill of {options['prompt']} (tokens/s) | floor |",
            "|---|---:|---:|---:|---:|",
        ]
        for engine in self.engines:
            decode, prefill = (next(f for f in self.figures if (f.engine, f.phase) == (engine, p)) for p in ("decode", "prefill"))
            times = f"{1e3 * decode.seconds:.1f} | {1e3 * decode.floor:.1f} | {1 / prefill.seconds:.0f} | {1 / prefill.floor:.0f}"
            lines.append(f"| {engine} | {times} |")
        lines += ["", "Floors: bytes read over the bandwidth; operations over the peak.", ""]
        lines += ["| bar | wanted | found |", "|---|---:|---:|"]
        for (tier, phase, peer), bar in BARS.items():
            ratio, wanted = self.ratio(tier, phase, peer), "told" if bar is None else f"{bar}×"
            lines.append(f"| {tier}: {phase} over {peer} | {wanted} | {'/' if ratio is None else f'{ratio:.2f}×'} |")
        lines += ["", "| package | made in (s) | peak memory over torch | size |", "|---|---:|---:|---:|"]
        lines += [f"| {p.name} | {p.seconds:.0f} | {size_text(p.memory)} | {size_text(p.bytes)} |" for p in self.packages]
        lines += ["", f"The bar for the memory of making ours is {size_text(EXPORT_LIMIT)}."]
        lines += [f"{name} was not measured: {reason}" for name, reason in self.missing.items()]
        if dirty := sum(figure.disturbed for figure in self.figures):
            lines.append(f"Other processes used the machine during {dirty} turns, which were taken again.")
        return "\n".join(lines) + "\n"


def make_packages(
    work: Path, genai: Path, layers: int, vocabulary: int, context: int
) -> tuple[Path, dict[str, Path], list[Package]]:
    """Return the checkpoint, the packages by name, and what making them took. A checkpoint of an earlier run is used again."""
    checkpoint, packages, made = work / "checkpoint", dict[str, Path](), list[Package]()
    if not checkpoint.exists():
        write_checkpoint(
            checkpoint, layers, vocab_size=vocabulary, max_position_embeddings=context, eos_token_id=0, pad_token_id=0
        )
        with as_file(files("oxfuse.artifacts") / "tiny-gpt-oss") as bundled:  # the builder wants some tokenizer
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(bundled / name, checkpoint)
    bare = measure_bare_torch().unavoidable
    for tier in TIERS:
        place = work / tier
        watch, seconds = measure_compile(checkpoint, place, "--target", "onnx", "--experts", tier, "--force")
        packages[tier] = place
        made.append(Package(name=tier, seconds=seconds, memory=watch.peak.unavoidable - bare, bytes=_bytes(place)))
    place = work / "builder"
    shutil.rmtree(place, ignore_errors=True)
    command = [
        str(genai),
        "-m",
        BUILD,
        "-i",
        str(checkpoint),
        "-o",
        str(place),
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        str(work / "cache"),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with MemoryWatch(root=process.pid) as watch:
        _, errors = process.communicate()
    if process.returncode == 0:
        packages |= {BUILDER: place, ALL_CORES: _with_all_cores(place, work / "builder-all-cores")}
        seconds = time.perf_counter() - began
        made.append(Package(name=BUILDER, seconds=seconds, memory=watch.peak.unavoidable - bare, bytes=_bytes(place)))
    else:
        print(f"The builder failed: {errors[-500:]}", file=sys.stderr)
    return checkpoint, packages, made


def _with_all_cores(built: Path, place: Path) -> Path:
    """Return a folder with links to a package's files, but for a configuration that lets onnxruntime count the cores."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for file in built.iterdir():
        (place / file.name).symlink_to(file)
    config = json.loads((built / CONFIG).read_text("utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 0
    (place / CONFIG).unlink()
    (place / CONFIG).write_text(json.dumps(config), "utf-8")
    return place


def _floors(artifacts: dict[str, Path], options: dict[str, Any], bandwidth: float, peak: float) -> dict[tuple[str, str], float]:
    """Return the least seconds a token by engine and phase; artifacts are those of our tiers."""
    costs = {tier: cost_of(read_manifest(artifacts[tier])) for tier in TIERS}
    cost, context = costs["int4"], options["context"]
    numbers = cost.dense + cost.head + cost.share * cost.experts
    read = {tier: own.decode_bytes(context) for tier, own in costs.items()}
    read |= {OWN: read["int4"], TRANSFORMERS: cost.decode_bytes(context, bfloat16=True)}
    read |= dict.fromkeys((BUILDER, ALL_CORES), BLOCK_BYTES * numbers)
    prefill = cost.prefill_operations(options["prompt"]) / options["prompt"] / peak
    return {(name, phase): size / bandwidth if phase == "decode" else prefill for name, size in read.items() for phase in PHASES}


def measure(checkpoint: Path, packages: dict[str, Path], made: list[Package], genai: Path, options: dict[str, Any]) -> Result:
    """Run all engines turn by turn."""
    threads, missing = options["threads"], dict[str, str]()
    bandwidth, peak = read_bandwidth(threads), matmul_peak(threads)
    floors = _floors(packages, options, bandwidth, peak)
    with contextlib.ExitStack() as stack:
        workers = dict[str, Worker]()
        script = [str(genai), str(Path(__file__).with_name("genai_worker.py"))]
        for name, folder in {**packages, OWN: packages["int4"], TRANSFORMERS: checkpoint}.items():
            engine = {OWN: "oxfuse", TRANSFORMERS: "transformers"}.get(name, "genai")
            try:
                workers[name] = Worker(engine, folder, threads, program=script if engine == "genai" else None)
                stack.callback(workers[name].close)
            except UserError as error:
                missing[name] = str(error)
        figures = [Figure(engine=name, phase=phase, floor=floors[name, phase]) for phase in PHASES for name in workers]
        for phase in PHASES:
            turns = [(workers[figure.engine], figure) for figure in figures if figure.phase == phase]
            load = ForeignLoad(patience=30.0, processes=(os.getpid(), *(worker.process.pid for worker in workers.values())))
            for worker, figure in turns:
                if worker.implementations:
                    figure.implementation = best_implementation(worker, phase, options["prompt"])
                    worker.ask(do="choose", implementation=figure.implementation)
                worker.ask(do="context", tokens=options["context"])
                if phase == "prefill":
                    worker.ask(do="prefill", tokens=options["prompt"])
            for number in range(options["rounds"]):
                for worker, figure in turns if number % 2 == 0 else turns[::-1]:

                    def take(worker: Worker = worker, phase: str = phase) -> float:
                        if phase == "prefill":
                            whole: float = worker.ask(do="prefill", tokens=options["prompt"])["seconds"]
                            return whole / float(options["prompt"])
                        return float(statistics.median(worker.ask(do="decode", tokens=options["tokens"])["seconds"]))

                    value, disturbed = take_quietly(take, load)
                    figure.samples.append(value)
                    figure.disturbed += disturbed
        engines = {name: worker.name for name, worker in workers.items()}
    return Result(
        machine=machine_facts(),
        options=options,
        bandwidth=bandwidth,
        peak=peak,
        packages=made,
        engines=engines,
        missing=missing,
        figures=figures,
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="ONNX packages beside onnxruntime-genai's builder and transformers.")
    parser.add_argument("--genai", type=Path, required=True, help="an interpreter with onnxruntime-genai, torch, transformers")
    parser.add_argument("--work", type=Path, help="where checkpoint and packages go, and stay; else a temporary folder")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1008)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    names = ("layers", "vocabulary", "prompt", "context", "tokens", "rounds")
    options = {name: getattr(given, name) for name in names} | {"threads": processors().threads}
    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oxfuse-bench-")))
        work.mkdir(parents=True, exist_ok=True)
        checkpoint, packages, made = make_packages(work, given.genai, given.layers, given.vocabulary, 2048)
        result = measure(checkpoint, packages, made, given.genai, options)
    for path, text in ((given.json, result.to_json()), (given.markdown, result.to_markdown())):
        if path is not None:
            path.write_text(text, "utf-8")
    print(result.to_markdown(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
