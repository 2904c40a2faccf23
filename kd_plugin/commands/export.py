"""``fairseq-kd-export``: average checkpoints into one without optimizer state."""

import argparse
import sys
from typing import List, Optional

from ..checkpoint import CheckpointError, average, read_checkpoint, write_for_inference


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="fairseq-kd-export", description=__doc__)
    parser.add_argument(
        "--path", required=True, help="checkpoints to average, with ':' between them"
    )
    parser.add_argument(
        "--average", action="store_true", help="average the checkpoints' weights", required=True
    )
    parser.add_argument("--output", required=True, help="the checkpoint to write")
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="open the checkpoints with the full pickle machinery, which runs whatever code they "
        "ask for",
    )
    options = parser.parse_args(arguments)
    try:
        paths = options.path.split(":")
        states = [read_checkpoint(path, options.trust_checkpoint) for path in paths]
        write_for_inference({**states[-1], "model": average(states)}, options.output)
    except (CheckpointError, OSError) as error:
        print("fairseq-kd-export: {}".format(error), file=sys.stderr)
        return 1
    print("averaged {} checkpoints into {}".format(len(states), options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
