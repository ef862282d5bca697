"""Train a Mamba on Python's own standard library, measure it against gzip and xz, resume it, and let it write.

python examples/demo.py                             about 2.5 minutes of training on two cores
python examples/demo.py --trainer.max_steps 20      a glimpse
"""

from __future__ import annotations

import csv
import gzip
import lzma
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from selective_ssm.cli import main as selective_ssm
from selective_ssm.config import from_tagged
from selective_ssm.data import DataConfig, describe_source, held_out_documents
from selective_ssm.errors import UserError, require
from selective_ssm.evaluation import evaluate
from selective_ssm.files import read_json
from selective_ssm.generation import load
from selective_ssm.training.config import KINDS, TrainConfig

RUN = Path("runs/demo")


def command(*words: str) -> None:
    """Run the command line as a person would, and show the command."""
    print(f"\n$ selective-ssm {shlex.join(words)}", flush=True)
    code = selective_ssm(words)
    if code:
        sys.exit(code)


def compare(checkpoint: Path, data: DataConfig) -> None:
    """Print bits per byte of the held-out files: the model's, and those of compressors on the very same bytes."""
    documents = held_out_documents(data)
    text = b"".join(document.text for document in documents)
    print(f"\nheld out of {describe_source(data.source)}: {len(documents)} files, {len(text):,} bytes")
    for document in documents:
        print(f"  {len(document.text):6,}  {document.name}")
    model, tokenizer = load(checkpoint)
    assert tokenizer is not None
    print("\nbits per byte on those bytes")
    print(f"  gzip -9  {8 * len(gzip.compress(text, 9)) / len(text):.3f}")
    print(f"  xz -9e   {8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text):.3f}")
    print(f"  mamba    {evaluate(model, documents, tokenizer).bits_per_byte:.3f}")


def plot(metrics: Path, picture: Path) -> None:
    """Draw the run's bits per byte over its steps."""
    from matplotlib import pyplot

    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for column, style in (("bits_per_byte", {"linewidth": 0.6}), ("held_out_bits_per_byte", {"marker": "o"})):
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        axes.plot(*zip(*points, strict=True), label=column.replace("_", " "), **style)
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 6))
    axes.legend()
    figure.savefig(picture, dpi=150)
    print(f"\nthe losses are drawn in {picture}")


def main(options: Sequence[str]) -> None:
    """Run the demo, with these options for the training."""
    require("matplotlib", "plots").use("agg")
    shutil.rmtree(RUN, ignore_errors=True)
    train = ("train", "--config", "stdlib_bytes", "--trainer.output", str(RUN), *options)
    command(*train)

    last = RUN / "last"
    config = from_tagged(read_json(last / "train.json"), KINDS)
    assert isinstance(config, TrainConfig)
    compare(last, config.data)
    plot(RUN / "metrics.csv", RUN / "loss.png")

    done = int(last.resolve().name.removeprefix("step-"))
    print(f"\nthe same run, taken up again at step {done} for five more:", end="")
    command(*train, "--trainer.max_minutes", "null", "--trainer.max_steps", str(done + 5))
    command("generate", str(last), "--prompt", "def ", "--max-new-tokens", "400", "--temperature", "0.7")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
