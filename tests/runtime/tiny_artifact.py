"""An artifact made by hand: one AOTInductor program with the signature of `step`, its weight file, tokenizer and manifest.

The model is one attention layer over the paged cache in plain torch operators, so that no part of the compiler is needed here.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

from oxfuse.runtime.engine import Engine
from oxfuse.runtime.manifest import (
    FORMAT_VERSION,
    CacheGroup,
    CacheSpec,
    DimRange,
    GenerationSpec,
    Limits,
    Manifest,
    ModelSpec,
    PassRecord,
    ProgramSpec,
    Requirements,
    TensorSpec,
    WeightFile,
    WeightTensor,
    cache_shapes,
)
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.weights import read_header

from .test_text import byte_level

VOCAB, HIDDEN, BLOCK = 4096, 1024, 4
WEIGHTS = "weights.safetensors"
CACHE = CacheSpec(
    block_size=BLOCK, dtype="float32", kv_heads=(1,), head_dim=(HIDDEN,), groups=(CacheGroup(window=0, layers=(0,)),)
)
LIMITS = Limits(max_context=48, max_batch=3, max_step_tokens=32)
INPUTS = "token_ids", "positions", "query_start", "kv_lens", "slots", "block_tables", "rows", "k_cache_0", "v_cache_0"


class TinyStep(nn.Module):
    """One attention layer between an embedding and a head, 2 * 16 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=make), requires_grad=False)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
        self.head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=make) * 2 * HIDDEN**-0.5)
        self.register_buffer("phase", torch.rand(HIDDEN, generator=make))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        query_start: Tensor,
        kv_lens: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        rows: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        x = self.embedding[token_ids] + torch.sin(positions[:, None] * self.phase)
        k_slots, v_slots = k_cache[:, 0].transpose(1, 2), v_cache[:, 0]  # [blocks, BLOCK, HIDDEN]
        place = slots[0] // BLOCK, slots[0] % BLOCK
        k_slots.index_put_(place, x)
        v_slots.index_put_(place, torch.tanh(x))
        token = torch.arange(token_ids.shape[0])
        owner = torch.bucketize(token, query_start, right=True) - 1
        last = kv_lens[owner] - query_start[owner + 1] + token
        keys, values = (cache[block_tables[0]].flatten(1, 2)[owner] for cache in (k_slots, v_slots))
        seen = torch.arange(keys.shape[1]) <= last[:, None]
        scores = torch.einsum("th,tsh->ts", x, keys.masked_fill(~seen[:, :, None], 0)) * HIDDEN**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        mixed = torch.einsum("ts,tsh->th", weights, values.masked_fill(~seen[:, :, None], 0))
        return self.head((x + mixed)[rows])


def compile_step(folder: Path) -> str:
    """Compile TinyStep into `folder` without its weights; return the library's name."""
    sizes = (3,), (3,), (3,), (2,), (1, 3), (1, 2, 5), (2,)
    args = [torch.zeros(size, dtype=torch.long) for size in sizes]  # each its own: export takes one tensor twice for one input
    args += [torch.zeros(7, *shape) for shape in cache_shapes(1, HIDDEN, BLOCK)]
    names = {name: Dim(name, min=1, max=1 << 20) for name in ("T", "N", "N1", "M", "R", "blocks")}
    dims = [{0: "T"}, {0: "T"}, {0: "N1"}, {0: "N"}, {1: "T"}, {1: "N", 2: "M"}, {0: "R"}, {0: "blocks"}, {0: "blocks"}]
    shapes = tuple({axis: names[name] for axis, name in dim.items()} for dim in dims)
    with torch.no_grad():
        program = torch.export.export(TinyStep(), tuple(args), dynamic_shapes=shapes, strict=False)
        options = {
            "aot_inductor.package": True,
            "aot_inductor.package_constants_in_so": False,
            "always_keep_tensor_constants": True,
            "cpp.dynamic_threads": True,
            "aot_inductor.check_lowerbound": False,
            "joint_graph_constant_folding": False,
            "fx_graph_cache": False,
        }
        made = torch._inductor.aot_compile(program.module(check_guards=False), program.example_inputs[0], options=options)
    folder.mkdir(parents=True)
    for path in map(Path, made):
        if path.suffix in (".so", ".json"):
            shutil.copyfile(path, folder / path.name)
    (library,) = folder.glob("*.so")
    return library.name


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def eager_model() -> CompiledModel:
    """The same model without artifact or compiler."""
    step = TinyStep()
    return CompiledModel(Engine(lambda inputs: step(*inputs), CACHE, LIMITS), vocab_size=VOCAB)


def write_artifact(folder: Path) -> Path:
    """Write the artifact into `folder`."""
    library = compile_step(folder / "programs" / "step")
    weights = {name: tensor.contiguous() for name, tensor in TinyStep().state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    extents, header = read_header(folder / WEIGHTS)
    data = (folder / WEIGHTS).read_bytes()
    tensors = {
        name: WeightTensor(
            dtype="float32",
            shape=tuple(tensor.shape),
            source=name,
            layout=(),
            sha256=hashlib.sha256(data[extents[name].begin : extents[name].end]).hexdigest(),
        )
        for name, tensor in weights.items()
    }
    golden_ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(5))
    positions, rows = torch.arange(40), torch.tensor([0, 7, 38, 39])
    logits = eager_model().logits(golden_ids[None])[0][rows]
    golden = {"token_ids": golden_ids, "positions": positions, "rows": rows, "logits": logits}
    save_file(golden, folder / "golden.safetensors")
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "report.json").write_text('{"parity": null}')
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        created_by={"oxfuse": "test"},
        source={"path": "nowhere"},
        model=ModelSpec(model_type="tiny", task="text-generation", dtype="float32", vocab_size=VOCAB, config={"hidden": HIDDEN}),
        generation=GenerationSpec(eos_token_ids=(), bos_token_id=None, pad_token_id=None),
        programs=(
            ProgramSpec(
                name="step",
                target="cpu",
                kind="aoti",
                path="programs/step",
                library=library,
                inputs=(
                    *(TensorSpec(name=name, dtype="int64", shape=("T",)) for name in INPUTS[:7]),
                    *(
                        TensorSpec(name=name, dtype="float32", shape=("B0", *shape))
                        for name, shape in zip(INPUTS[7:], cache_shapes(1, HIDDEN, BLOCK), strict=True)
                    ),
                ),
                outputs=(TensorSpec(name="logits", dtype="float32", shape=("R", VOCAB)),),
                dims={"T": DimRange(min=1, max=32)},
                constants={name: name for name in weights},
                files={path.name: digest(path) for path in (folder / "programs" / "step").iterdir()},
            ),
        ),
        ops_library=None,
        cache=CACHE,
        limits=LIMITS,
        requirements=Requirements(
            torch=".".join(torch.__version__.split(".")[:2]),
            platform=sys.platform,
            machine=platform.machine(),
            cpu_isa="native",
            cpu_features=("fpu",) if platform.machine() == "x86_64" else (),
            glibc="2.17",
            gpu_archs=(),
        ),
        weights=(WeightFile(path=WEIGHTS, bytes=len(data), header_sha256=header, tensors=tensors),),
        passes=(PassRecord(name="insert_cache", count=1, checked=1, max_error=1e-6),),
        numerics={"activations": "exact"},
        tokenizer_files={"tokenizer.json": digest(folder / "tokenizer.json")},
        golden="golden.safetensors",
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder
