"""Small n-best lists, in a store."""

from typing import Dict, List

import numpy as np

from kd_plugin.decoding import Hypothesis
from kd_plugin.sequences import HypothesisStore

HEADER = {"teachers": [{"sha256": "1" * 64, "bytes": 7}], "generation": {"beam": 5}}
SENTENCES = 23
PLAN = [
    np.array(batch) for batch in ([3, 1, 22], [0], [7, 5, 4, 20, 21], [2, 6], list(range(8, 20)))
]


def nbest_of(sentence: int) -> List[Hypothesis]:
    """Lists of different lengths, with what is awkward in JSON and in text among it."""
    words = ['▁"a\\', "b\u2028c", "d\u00a0", "<unk>", "é", "\U0001f600", "\x85"]
    return [
        Hypothesis(" ".join(words[: (sentence + n) % 8]), -0.1 * sentence - n / 3, n != 1)
        for n in range(1 + sentence % 3)
    ]


def lists(batch) -> Dict[int, List[Hypothesis]]:
    return {int(i): nbest_of(int(i)) for i in batch}


def write(folder, shards=1, shard=0, plan=PLAN, **header) -> bool:
    store = HypothesisStore(folder, {**HEADER, **header}, shards, shard)
    if store.complete:
        store.clean_up()
        return True
    store.begin(plan)
    while store.done < len(store.batches):
        store.append(lists(store.batches[store.done]))
    return store.finish()
