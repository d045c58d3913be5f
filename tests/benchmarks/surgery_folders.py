"""The folders of `surgery`: a random Mixtral with a tokenizer, two copies of it, and a text.

python -m tests.benchmarks.surgery_folders FOLDER SIZE
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests import tiny
from tests.benchmarks.upcycle_folders import write

# Parameters of the Mixtral -> the dense model that it is made from.
SIZES = {
    "0.10 B": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 7},
    "0.39 B": {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 7},
    "1.02 B": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 11},
}
OTHERS = {"vocab_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 4}


def main(folder: Path, size: str) -> None:
    """Write them."""
    write(folder / "dense", SIZES[size] | OTHERS)
    tiny.save_tokenizer(folder / "dense")
    tiny.save_jsonl(folder / "text.jsonl", repeat=100)
    command = ["upcycle", folder / "dense", folder / "moe", "--verify", "none", "--quiet"]
    subprocess.run([sys.executable, "-m", "moetool", *map(str, command)], check=True)
    shutil.rmtree(folder / "dense")
    for name in ("moe-2", "moe-3"):
        shutil.copytree(folder / "moe", folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
