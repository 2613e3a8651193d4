"""Write a few lines to score: of held-out prompts, a trajectory of the reference's policy and one of another policy.

make_example.py TRAJECTORIES_DIRECTORY OUTPUT.jsonl
"""

import json
import sys
from pathlib import Path

NUM_PROMPTS = 6


def main() -> None:
    """The first prompts of the first shard."""
    trajectories, output = Path(sys.argv[1]), Path(sys.argv[2])
    with output.open("w") as lines, sorted(trajectories.glob("*.jsonl"))[0].open() as shard:
        for record in [json.loads(line) for line, _ in zip(shard, range(NUM_PROMPTS), strict=False)]:
            reference, same, other = (t["text"] for t in record["trajectories"])  # two of one policy, one of another
            for candidate, text in (("same policy", same), ("another policy", other)):
                line = {"prompt": record["prompt"], "reference": reference, "output": text, "candidate": candidate}
                lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
