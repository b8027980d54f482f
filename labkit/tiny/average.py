"""Averages the weights of a model and of the one it began with: `python -m labkit.tiny.average`.

The mean of two points of one training often answers better than either of them (Wortsman et al.,
"Model soups", 2022): what each has forgotten, the other still knows.
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def average(earlier: Path, later: Path, share: float, out: Path) -> None:
    """Writes `share` of the later model's weights plus the rest of the earlier one's to `out`.

    Everything else is the later model's. Raises KeyError where the two networks differ.
    """
    shutil.copytree(later, out, dirs_exist_ok=True)
    others = {}
    for shard in earlier.glob("*.safetensors"):
        others |= load_file(shard)
    for shard in later.glob("*.safetensors"):
        weights = {
            name: (share * value.float() + (1 - share) * others[name].float()).to(value.dtype)
            for name, value in load_file(shard).items()
        }
        save_file(weights, out / shard.name, metadata={"format": "pt"})
    path = out / "training.json"
    notes = json.loads(path.read_text(encoding="utf-8")) | {"share_of_this_run": share}
    path.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line of the averaging."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("earlier", type=Path)
    parser.add_argument("later", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the later model")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    average(options.earlier, options.later, options.share, options.out)


if __name__ == "__main__":
    main()
