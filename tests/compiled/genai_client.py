"""Generates with onnxruntime-genai, in a virtual environment that has it: `python genai_client.py FOLDER REQUEST ANSWER`.

REQUEST is a JSON file: `prompts`, token ids each; `count`, tokens to generate; `end`, a token id that no prompt has, at which
texts end, and which pads. ANSWER becomes one: `alone`, by prompt; `logits` of the first prompt's tokens; `in_chunks`, with the
prompts in pieces of 7; `again`, after a rewind into the middle of the prompt; `short`, with a max_length of 16; `batch`, all
prompts in one ragged batch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

folder, request_path, answer_path = sys.argv[1:]
request = json.loads(Path(request_path).read_text())
config = genai.Config(folder)
config.overlay(json.dumps({"model": {"eos_token_id": request["end"], "pad_token_id": request["end"]}}))
model, prompts, count = genai.Model(config), request["prompts"], request["count"]


def generator(max_length, rows=1):
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=max_length, batch_size=rows, do_sample=False)
    return genai.Generator(model, params)


def feed(it, ids):
    it.append_tokens(np.array(ids, np.int32))


def more(it, count):
    for _ in range(count):
        if not it.is_done():
            it.generate_next_token()


def alone(ids, pieces=None):
    it = generator(len(ids) + count)
    for begin in range(0, len(ids), pieces or len(ids)):
        feed(it, ids[begin : begin + (pieces or len(ids))])
    logits = np.array(it.get_output("logits"))
    more(it, count)
    return it, it.get_sequence(0).tolist()[len(ids) :], logits


answer = {"alone": [], "in_chunks": [], "again": []}
for ids in prompts:
    it, tokens, logits = alone(ids)
    answer["alone"].append(tokens)
    answer.setdefault("logits", logits[0].tolist())
    it.rewind_to(len(ids) // 2)
    feed(it, ids[len(ids) // 2 :])
    more(it, count)
    answer["again"].append(it.get_sequence(0).tolist()[len(ids) :])
    answer["in_chunks"].append(alone(ids, 7)[1])

it = generator(16)
feed(it, prompts[0][:6])
more(it, 10)
answer["short"] = it.get_sequence(0).tolist()[6:]

width = max(map(len, prompts))
it = generator(width + count, len(prompts))
feed(it, [ids + [request["end"]] * (width - len(ids)) for ids in prompts])
more(it, count)
answer["batch"] = [it.get_sequence(row).tolist()[width:] for row in range(len(prompts))]

Path(answer_path).write_text(json.dumps(answer))
