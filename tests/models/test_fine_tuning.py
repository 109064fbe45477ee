"""The references train: a short run on the standard library's source, which the bundled checkpoint learnt, lowers the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from oxfuse.artifacts.python_corpus import read_corpus
from oxfuse.models import load_reference
from oxfuse.models.gpt_neox import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
from oxfuse.runtime.tokenizer import TextTokenizer

BUNDLED = Path(__file__).parents[2] / "artifacts" / "tiny-gpt-oss"
LENGTH, STEPS = 64, 12


@pytest.fixture(scope="module")
def batches() -> Tensor:
    """Token ids of a held-out file, [rows, LENGTH], in the bundled checkpoint's vocabulary."""
    tokenizer = TextTokenizer.open([BUNDLED / "tokenizer.json"])
    assert tokenizer is not None
    text = "".join(read_corpus(0).held_out.values())[:40_000]
    ids = torch.tensor(tokenizer.encode(text))
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def train(model: nn.Module, batches: Tensor, rate: float, **wanted: Tensor) -> tuple[float, float]:
    """Take STEPS steps on 8 rows at a time; return the loss on the same rows before and after."""
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=rate), batches[:8]
    wanted = wanted or {"labels": rows}

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(rows, **wanted).loss)

    before = loss()
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(rows, **wanted).loss.backward()
        optimizer.step()
    return before, loss()


@pytest.mark.slow
def test_the_bundled_checkpoint_goes_on_learning(batches: Tensor) -> None:
    before, after = train(load_reference(BUNDLED), batches, 1e-3)
    assert before < 6 and after < before - 0.5, (before, after)


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
def test_gpt_neox_learns(attention: str, batches: Tensor, tmp_path: Path) -> None:
    """From nothing; then with a new head on the trained body, which tells which rows hold an even first token."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=2048, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=LENGTH, attention_dropout=0.1, hidden_dropout=0.1, attn_implementation=attention,
        pad_token_id=2047,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    before, after = train(model, batches, 5e-3)
    assert before > 7 and after < before - 1.5, (before, after)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no score.weight"):
        classifier = GPTNeoXForSequenceClassification.from_pretrained(tmp_path)
    before, after = train(classifier, batches, 3e-3, labels=batches[:8, 0] % 2)
    assert after < before * 0.7, (before, after)
