"""Trains the bundled checkpoint `tiny-gpt-oss` from the Python standard library's source, so that quickstart prints Python.

In: the running interpreter's library, a seed, a number of steps. Out: a checkpoint folder in the Hugging Face layout with MXFP4
experts, its tokenizer and chat template, and `training.json` with what it learnt from and how well. The experts' weights
are rounded to MXFP4 in the loop, and the rounded bits are exported: the checkpoint loses nothing on its way to disk.

    python -m oxfuse.artifacts.train_tiny_gpt_oss --output FOLDER --work FOLDER [--steps N] [--threads N]

`--work` holds the tokenizer and the state after every 50 steps: the same command resumes after a break.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from oxfuse.artifacts.mxfp4 import fake_quantize, pack
from oxfuse.artifacts.python_corpus import END_OF_TEXT, RETURN, Corpus, chat_turns, read_corpus
from oxfuse.artifacts.python_tokenizer import TOKENIZER_CONFIG, train_tokenizer
from oxfuse.models import load_reference
from oxfuse.models.gpt_oss import GptOssConfig, GptOssForCausalLM
from oxfuse.models.gpt_oss.model import GptOssMLP

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
SLICE_TOKENS = 256
CHAT_TEMPLATE = Path(__file__).parent / "tiny-gpt-oss" / "chat_template.jinja"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the training run depends on besides the corpus."""

    seed: int = 9
    steps: int = 960
    warmup: int = 100
    tokens_per_step: int = 2048
    length: int = 256
    long_length: int = 1024  # the model's whole context, in the last part, so that every position has been seen
    long_from: float = 0.97
    round_from: float = 0.68  # share of the steps after which experts are rounded to MXFP4
    chat_share: float = 0.2
    learning_rate: float = 3e-3
    final_rate: float = 0.03  # share of the learning rate that the cosine ends at
    weight_decay: float = 0.1
    clip: float = 1.0


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the checkpoint's config.json: window 32 and original context 128, so that short tests cross both."""
    layers = 4
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 1024,
        "initial_context_length": 128,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
        "rms_norm_eps": 1e-05,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "eos_token_id": tokenizer.token_to_id(RETURN),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


class RoutedExperts(nn.Module):
    """Runs the reference's experts each on its own tokens only, and rounds their weights to MXFP4 when `rounding` is set.

    The reference computes every expert for every token; here the same code sees one expert and the rows routed to it,
    which costs top_k / num_experts as much.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.rounding = False

    def forward(self, x: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """x [T, H], router_indices and routing_weights [T, k] -> [T, H]."""
        weights: dict[str, Tensor] = dict(self.experts.named_parameters())
        if self.rounding:
            weights |= {name: fake_quantize(weights[name].mT).mT for name in EXPERT_WEIGHTS}
        out = torch.zeros_like(x)
        # One split: the gradients of single slices would each be a whole tensor of zeros but for the slice.
        for expert, parts in enumerate(zip(*(torch.split(weight, 1) for weight in weights.values()), strict=True)):
            rows = (router_indices == expert).any(-1).nonzero().squeeze(-1)
            one = dict(zip(weights, parts, strict=True))
            routed = (x[rows], router_indices[rows], routing_weights[rows], expert)
            out = out.index_add(0, rows, torch.func.functional_call(self.experts, one, routed))
        return out


def build_model(config: GptOssConfig, seed: int) -> GptOssForCausalLM:
    """Return the reference model with fresh weights and routed experts."""
    torch.manual_seed(seed)
    model = GptOssForCausalLM(config)
    into_residual = 1 / math.sqrt(2 * config.num_hidden_layers)  # GPT-2's scaling of what is added to the residual stream
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "layernorm.weight")):
            nn.init.ones_(parameter)
        elif name.endswith(("bias", "sinks")):
            nn.init.zeros_(parameter)
        else:
            scale = into_residual if "o_proj" in name or "down_proj" in name else 1.0
            nn.init.normal_(parameter, std=0.04 * scale)
    for module in list(model.modules()):
        if isinstance(module, GptOssMLP):
            module.register_module("experts", RoutedExperts(module.experts))
    return model


def batches(streams: dict[str, Tensor], recipe: Recipe, first: int) -> Iterator[Tensor]:
    """Yield int64 [B, S] windows from step `first` on; each step draws from its own seed, so a resumed run sees the same ones."""
    for step in range(first, recipe.steps):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        length = recipe.long_length if step >= recipe.long_from * recipe.steps else recipe.length
        rows = []
        for _ in range(recipe.tokens_per_step // length):
            chat = torch.rand((), generator=generator) < recipe.chat_share
            stream = streams["chat" if chat else "source"]
            start = int(torch.randint(len(stream) - length, (), generator=generator))
            rows.append(stream[start : start + length])
        yield torch.stack(rows).long()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of a linear warmup followed by a cosine down to `final_rate`."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW; matrices decay, biases, norms, sinks and embeddings do not."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and not n.endswith("bias")]
    others = [p for p in model.parameters() if not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def train(model: GptOssForCausalLM, streams: dict[str, Tensor], recipe: Recipe, work: Path) -> dict[str, Any]:
    """Train in place, resuming from `work/state.pt`; return steps, tokens, seconds and the mean loss of the last 100 steps."""
    optimizer = make_optimizer(model, recipe)
    state_file = work / "state.pt"
    done, losses, seconds = 0, [], 0.0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, losses, seconds = state["step"], state["losses"], state["seconds"]
    progress = tqdm(total=recipe.steps, initial=done, unit="step", mininterval=10)
    started = time.monotonic() - seconds
    for step, window in enumerate(batches(streams, recipe, done), done):
        for module in model.modules():
            if isinstance(module, RoutedExperts):
                module.rounding = step >= recipe.round_from * recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        out = model(input_ids=window, labels=window, output_router_logits=True, use_cache=False)
        out.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(out.loss.detach() - model.config.router_aux_loss_coef * out.aux_loss.detach()))
        progress.update()
        progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            seconds = time.monotonic() - started
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1, "losses": losses, "seconds": seconds}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    progress.close()
    return {
        "steps": len(losses),
        "tokens": len(losses) * recipe.tokens_per_step,
        "seconds": round(seconds),
        "final_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
    }


@torch.no_grad()
def mean_loss(model: nn.Module, ids: Tensor, length: int) -> float:
    """Return nats a token of ids int64 [T] in windows of `length`; each window begins with its predecessor's last token."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, length - 1):
        window = ids[None, start : start + length]
        total += float(model(input_ids=window, labels=window, use_cache=False).loss) * (window.shape[1] - 1)
        count += window.shape[1] - 1
    return total / count


def export_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the checkpoint's tensors: experts' matrices as MXFP4 blocks and scales, everything else in bf16."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        name = name.replace(".experts.experts.", ".experts.")
        if name.endswith(EXPERT_WEIGHTS):  # [E, in, out]; the format's rows are output features
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack(parameter.mT.contiguous())
        else:
            tensors[name] = parameter.to(torch.bfloat16).contiguous()
    return tensors


def round_model(model: nn.Module) -> None:
    """Give the model the values that `export_weights` writes, so that its loss can be compared with the checkpoint's."""
    for name, parameter in model.named_parameters():
        rounded = fake_quantize(parameter.mT).mT if name.endswith(EXPERT_WEIGHTS) else parameter.to(torch.bfloat16).float()
        parameter.data.copy_(rounded)


def write_checkpoint(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, corpus: Corpus, recipe: Recipe, run: dict[str, Any]
) -> None:
    """Write the checkpoint, measure it as loaded back, and record both.

    The chat template is the bundled one, written by hand; so is README.md, which describes one run and is not copied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(tokenizer)
    stop = [tokenizer.token_to_id(RETURN), tokenizer.token_to_id(END_OF_TEXT)]
    generation = {"do_sample": True, "eos_token_id": stop, "pad_token_id": config["pad_token_id"]}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / CHAT_TEMPLATE.name).write_text(CHAT_TEMPLATE.read_text())
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", TOKENIZER_CONFIG | {"model_max_length": config["max_position_embeddings"]}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file(export_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner reads

    text = END_OF_TEXT.join(["", *corpus.held_out.values()])
    ids = torch.tensor(tokenizer.encode(text).ids)
    round_model(model)
    trained = mean_loss(model.eval(), ids, recipe.length)
    loaded = load_reference(folder)
    held_out = mean_loss(loaded, ids, recipe.length)
    size = sum(len(text.encode()) for text in corpus.held_out.values())
    sample = next(text for text in corpus.held_out.values() if len(text) > 8000)[2000:]
    sample_ids = tokenizer.encode(sample).ids[:SLICE_TOKENS]
    record = {
        "recipe": dataclasses.asdict(recipe),
        "run": run | {"torch": torch.__version__},
        "data": {
            "python": platform.python_version(),
            "files": len(corpus.train),
            "bytes": sum(len(text.encode()) for text in corpus.train.values()),
            "held_out_files": list(corpus.held_out),
            "held_out_bytes": size,
            "held_out_tokens": len(ids),
            "sha256": corpus.digest(),
        },
        "held_out": {
            "loss": round(held_out, 5),
            "loss_in_training": round(trained, 5),
            "bits_per_byte": round(held_out * (len(ids) - 1) / size / math.log(2), 4),
        },
        "slice": {
            "token_ids": sample_ids,
            "text": tokenizer.decode(sample_ids),
            "loss": round(mean_loss(loaded, torch.tensor(sample_ids), SLICE_TOKENS), 5),
        },
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Run the whole recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-gpt-oss", help="checkpoint folder")
    parser.add_argument("--work", type=Path, required=True, help="folder of the tokenizer and the resumable state")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-only", action="store_true", help="write the checkpoint of the state in --work as it is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(steps=options.steps)
    options.work.mkdir(parents=True, exist_ok=True)

    corpus = read_corpus(recipe.seed)
    turns = chat_turns(corpus.train)
    tokenizer = train_tokenizer(corpus.train.values(), options.work / "tokenizer.json")
    streams = {
        name: torch.tensor([i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids], dtype=torch.int32)
        for name, texts in (("source", [END_OF_TEXT + text for text in corpus.train.values()]), ("chat", turns))
    }
    print({name: len(stream) for name, stream in streams.items()}, "tokens", flush=True)
    model = build_model(GptOssConfig(**model_config(tokenizer)), recipe.seed)
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    run = train(model, streams, dataclasses.replace(recipe, steps=0) if options.export_only else recipe, options.work)
    write_checkpoint(options.output, model, tokenizer, corpus, recipe, run)


if __name__ == "__main__":
    main()
