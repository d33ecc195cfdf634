"""Finds the two files of a saved lens, in a local folder or on the Hugging Face hub.

Only finds them; :class:`~tuned_lens_fast.nn.TunedLens` reads them.
"""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

#: A model's present name on the hub -> the folder its published lens is in.
ALIASES = {
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-large": "gpt2-large",
    "openai-community/gpt2-xl": "gpt2-xl",
}


def load_lens_artifacts(
    resource_id: str | os.PathLike[str],
    repo_id: str | None = None,
    repo_type: str | None = None,
    revision: str | None = "main",
    config_file: str = "config.json",
    ckpt_file: str = "params.pt",
    subfolder: str = "lens",
    cache_dir: str | None = None,
) -> tuple[Path, Path]:
    """The config and the checkpoint of a lens: from a local folder if there is one, else from the hub.

    Args:
        resource_id: a folder, or the name of a lens on the hub, mostly that of its model ("gpt2").
        repo_id: the hub's repository; by default the environment's TUNED_LENS_REPO_ID, else
            "AlignmentResearch/tuned-lens".
        repo_type: by default the environment's TUNED_LENS_REPO_TYPE, else "space".
        revision: branch, tag or commit of the repository.
        config_file, ckpt_file: names of the two files in the lens's folder.
        subfolder: the repository's folder of lenses.
        cache_dir: where downloads are kept; by default the hub's cache.

    Returns:
        The paths of the config and the checkpoint.

    Raises:
        FileNotFoundError: no such lens.
        ConnectionError: the hub cannot be reached, and its cache does not hold the lens.
    """
    folder = Path(resource_id)
    missing = [name for name in (config_file, ckpt_file) if not (folder / name).is_file()]
    if not missing:
        return folder / config_file, folder / ckpt_file
    here = f"{folder} lacks {' and '.join(missing)}" if folder.is_dir() else f"there is no folder {folder}"
    if folder.is_absolute() or os.fspath(resource_id).startswith((".", "~")):
        raise FileNotFoundError(f"resource_id: no lens at {os.fspath(resource_id)!r}: {here}")

    repo_id = repo_id or os.environ.get("TUNED_LENS_REPO_ID") or "AlignmentResearch/tuned-lens"
    repo_type = repo_type or os.environ.get("TUNED_LENS_REPO_TYPE") or "space"
    name = folder.as_posix()
    lens_folder = f"{subfolder}/{ALIASES.get(name, name)}"
    place = f"{lens_folder} in the hub's {repo_type} {repo_id} (revision {revision})"
    sought = f"no lens {name!r}: {here}, and {place}"

    def download(filename: str) -> Path:
        return Path(
            hf_hub_download(
                filename=filename,
                repo_id=repo_id,
                repo_type=repo_type,
                revision=revision,
                subfolder=lens_folder,
                cache_dir=cache_dir,
            )
        )

    try:
        return download(config_file), download(ckpt_file)
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"resource_id: {sought} is not in the cache and cannot be fetched: {error}") from error
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"resource_id: {sought} does not exist: {error}") from error
    except OSError as error:
        raise ConnectionError(f"resource_id: {sought} cannot be fetched: {error}") from error
