"""Generation with a compiled artifact is that of transformers' `generate`, beyond plain greedy text."""

from __future__ import annotations

import torch

import oxfuse

from ..parity.cases import random_ids

PROMPTS = (5, 41, 150)


def test_penalty_and_logprobs_are_those_of_transformers(compiled, tmp_path):
    """Greedy text with a repetition penalty, token by token, and the log-probabilities of the unpenalised logits."""
    case, folder, artifact = compiled("base")
    model, theirs = oxfuse.load(artifact), case.transformers(folder, tmp_path)
    prompts = [random_ids(case, length, seed=length) for length in PROMPTS]
    options = {"max_new_tokens": 40, "repetition_penalty": 1.3}
    found = model.generate([prompt.tolist() for prompt in prompts], **options, logprobs=True, stop_token_ids=[])
    plain = model.generate([prompt.tolist() for prompt in prompts], max_new_tokens=40, stop_token_ids=[])
    for prompt, generation, other in zip(prompts, found, plain, strict=True):
        expected = theirs.generate(
            prompt[None], **options, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True
        )
        assert generation.token_ids == expected.sequences[0, len(prompt) :].tolist() != other.token_ids
        rows = torch.cat(expected.logits).float().log_softmax(-1)
        of_them = rows.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(generation.logprobs), of_them, rtol=0, atol=2e-4)


def test_a_seed_gives_the_same_text_in_any_company(compiled):
    case, _, artifact = compiled("base")
    model = oxfuse.load(artifact)
    prompts = [random_ids(case, length, seed=length).tolist() for length in (3, 60, 200, 1, 17)]
    options = {"max_new_tokens": 40, "temperature": 1.2, "top_p": 0.95, "min_p": 0.01, "seed": 5, "stop_token_ids": []}
    together = [generation.token_ids for generation in model.generate(prompts, **options)]
    assert together == [model.generate(prompt, **options)[0].token_ids for prompt in prompts]
    assert len({tuple(tokens) for tokens in together}) == len(prompts)
