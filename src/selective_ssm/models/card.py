"""The README.md of a checkpoint: what the model is, what it read, how good it is, and under which licence it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from selective_ssm.config import to_tagged
from selective_ssm.files import read_text, write_text
from selective_ssm.models.config import LanguageModelConfig

CARD = "README.md"
_OURS = "<!-- selective-ssm writes this file anew with the model; remove this line to keep what you add -->"
_LICENCE = re.compile(r"^license: *(\S.*)$", re.M)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model's config does not say of it.

    Args:
        data: what it was trained on.
        metrics: what was measured, by name.
        licence: an identifier of the hub's such as "apache-2.0"; None for the one that a card in the folder names.
    """

    data: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    licence: str | None = None

    def text(self, config: LanguageModelConfig, parameters: int) -> str:
        """The card of a model of so many parameters, in Markdown with the hub's header."""
        kinds = " and ".join(dict.fromkeys(mixer.kind for mixer in config.layers))
        sizes = f"{config.n_layer} layers ({kinds}) of width {config.d_model} over {config.vocab_size:,} tokens"
        figures = "\n".join(f"| {name} | {value:.6g} |" for name, value in self.metrics.items())
        return _TEXT.format(
            licence=self.licence or "unknown",
            ours=_OURS,
            sizes=f"{parameters:,} parameters: {sizes}",
            config=json.dumps(to_tagged(config), indent=2),
            data=self.data or "Not said.",
            metrics=f"| metric | value |\n| --- | --- |\n{figures}" if figures else "None given.",
        )


def write_card(folder: Path, card: Card, config: LanguageModelConfig, parameters: int) -> None:
    """Write the README.md of a checkpoint's folder, but for one that somebody else wrote, or changed for good."""
    path = folder / CARD
    before = read_text(path) if path.exists() else None
    if before is not None and _OURS not in before:
        return
    licence = card.licence or licence_in(before or "")
    kept = Card(data=card.data, metrics=card.metrics, licence=licence)
    write_text(path, kept.text(config, parameters))


def licence_in(text: str) -> str | None:
    """The licence that the header of a card names."""
    found = _LICENCE.search(text)
    return found[1].strip() if found else None


_TEXT = """\
---
license: {licence}
pipeline_tag: text-generation
tags:
- mamba
- selective-ssm
---
{ours}

# A selective state space model

{sizes}.

## Config

```json
{config}
```

## Data

{data}

## Metrics

{metrics}

## Use

```python
from selective_ssm import load

model, tokenizer = load("the folder of this file")
```
"""
