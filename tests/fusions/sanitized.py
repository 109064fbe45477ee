"""Calls the C++ ops of a library on their contract cases, with one thread and with several.

    python sanitized.py BUILD    a pickled OpsBuild; test_sanitizers.py preloads a sanitizer's runtime

The runtime ends the process where it finds something. torch's own ops run on one thread: a sanitizer does not follow its pool.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from test_contract import CPP_CALLS, assert_rounds_once, assert_same_for_threads

from oxfuse.passes.fusions.build import OpsBuild, load_ops


def main(path: str) -> None:
    made: OpsBuild = pickle.loads(Path(path).read_bytes())
    load_ops(made)
    torch.set_num_threads(1)
    calls = [call for call in CPP_CALLS if call.values[0].op in made.names]
    for call in calls:
        print(call.id, flush=True)
        case, dtype = call.values
        assert_same_for_threads(case, dtype, made, (1, 2, 3))
        assert_rounds_once(case, dtype, made)
    print(f"{len(calls)} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
