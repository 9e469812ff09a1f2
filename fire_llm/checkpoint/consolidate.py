"""An ordinary folder made of a checkpoint whose weights lie in shards."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from fire_llm.checkpoint.source import COMPANIONS
from fire_llm.core.errors import UserError
from fire_llm.core.manifest import SHARDED, damage, in_shards
from fire_llm.core.staging import staged
from fire_llm.models import load_model


def consolidate(checkpoint: str | Path, destination: str | Path) -> Path:
    """Make a folder that every program of transformers reads from a checkpoint in shards; return it.

    The host's memory holds the whole weights meanwhile. The checkpoint stays as it is.

    Args:
        checkpoint: Of a model in shards, a step that nothing kept.
        destination: The new folder, with weights, config and tokenizer.

    Raises:
        UserError: There are no shards, they are damaged, or the destination exists.
    """
    source = Path(checkpoint).expanduser()
    if not in_shards(source):
        raise UserError(f"'{source}' holds no weights in shards ({SHARDED}/): name a checkpoint that does")
    if wrong := damage(source):
        raise UserError(f"'{source}' is damaged: {wrong}. Put back a copy of it, or take another step")
    with staged(Path(destination).expanduser()) as folder:
        load_model(source).save_pretrained(folder)
        for path in sorted(source.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in COMPANIONS):
                shutil.copyfile(path, folder / path.name)
    return Path(destination)
