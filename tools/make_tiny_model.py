"""Make a tiny model folder in Hugging Face format that learns arithmetic on a CPU in minutes.

python tools/make_tiny_model.py --architecture pangu --output /tmp/tiny-pangu
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before installation, too

from r2vpo_megatron.testbed.tiny_model import ARCHITECTURES, make_tiny_model


def main() -> int:
    """Parse the command line, make the folder, print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="pangu")
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and training")
    parser.add_argument(
        "--tied",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="share the LM head's weight with the embedding",
    )
    parser.add_argument(
        "--warm-start",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train it to 15-35%% sampled accuracy",
    )
    arguments = parser.parse_args()
    try:
        manifest = make_tiny_model(
            arguments.output,
            arguments.architecture,
            arguments.tied,
            arguments.seed,
            arguments.warm_start,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    embeddings = "tied" if manifest["tied"] else "untied"
    print(
        f"{arguments.output}: {manifest['architecture']}, {manifest['num_parameters']:,} "
        f"parameters, {embeddings} embeddings, seed {manifest['seed']}, {manifest['seconds']} s"
    )
    if manifest["warm_start"]:
        sampled = manifest["warm_start"]["held_out_accuracy_sampled"]
        greedy = manifest["warm_start"]["held_out_accuracy_greedy"]
        print(f"held-out accuracy: {sampled:.3f} at temperature 1.0, {greedy:.3f} greedy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
