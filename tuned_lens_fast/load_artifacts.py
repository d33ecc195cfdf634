"""Finds the files of a saved lens, in a local folder or on the Hugging Face hub, and pushes them there.

Only finds them; :mod:`tuned_lens_fast.artifacts` reads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tuned_lens_fast.artifacts import MOST_CONFIG, read_json
from tuned_lens_fast.messages import listed, quoted, shortened

#: Tried in this order where the caller names no other checkpoint.
_CHECKPOINTS = ("params.pt", "params.safetensors")
#: Ends of the name of a lens that is one file, a Jacobian lens.
ONE_FILE = (".pt", ".safetensors")
#: Names of that file in a folder: of jlens, of the hub's neuronpedia/jacobian-lens, and of what others convert it to.
_JACOBIAN = ("lens.pt", "*jacobian_lens*.pt", "jlens/*/*jacobian_lens*.pt", "jacobians.safetensors", "lens.safetensors")

#: Where a model's name is another than its published lens's: -> the lens's folder. Lenses of the first Pythia
#: models, which were named by another count of their parameters and since replaced, end in -v0.
ALIASES = {
    **{f"openai-community/{name}": name for name in ("gpt2", "gpt2-large", "gpt2-xl")},
    **{f"huggyllama/llama-{size}": f"facebook/llama-{size}" for size in ("7b", "13b", "30b")},
    **{f"decapoda-research/llama-{size}-hf": f"facebook/llama-{size}" for size in ("7b", "13b", "30b")},
    "lmsys/vicuna-13b-v1.1": "facebook/vicuna-13b",
    **{
        f"NousResearch/{name}": f"meta-llama/{name}"
        for name in (
            *(f"Llama-2-{size}{chat}-hf" for size in ("7b", "13b") for chat in ("", "-chat")),
            *("Meta-Llama-3-8B", "Meta-Llama-3-8B-Instruct"),
        )
    },
    **{
        f"EleutherAI/pythia-{old}-deduped": f"EleutherAI/pythia-{new}-deduped-v0"
        for old, new in (
            *(("19m", "70m"), ("125m", "160m"), ("350m", "410m"), ("800m", "1b")),
            *(("1.3b", "1.4b"), ("2.7b", "2.8b"), ("6.7b", "6.9b"), ("13b", "12b")),
        )
    },
}

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_GO_OFFLINE = "or pass a folder that holds the lens's files"


def available_lens_artifacts(
    repo_id: str,
    repo_type: str,
    revision: str = "main",
    config_file: str = "config.json",
    ckpt_file: str = "params.pt",
    subfolder: str = "lens",
) -> set[str]:
    """The lenses in a repository of the hub, by the names that :func:`load_lens_artifacts` takes.

    Args:
        repo_id, repo_type, revision, config_file, ckpt_file, subfolder: as in :func:`load_lens_artifacts`; of
            ``repo_type`` the plural will do, "spaces".

    Raises:
        FileNotFoundError: no such repository or revision.
        ConnectionError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

    repo_type = repo_type.removesuffix("s")
    place = f"the hub's {repo_type} {quoted(repo_id, 150)} (revision {quoted(revision)})"
    try:
        files = set(HfApi().list_repo_files(repo_id, revision=revision, repo_type=repo_type))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(f"repo_id: {place} does not exist, or is private: {shortened(error)}") from error
    except OSError as error:
        raise ConnectionError(f"repo_id: {place} cannot be listed: {shortened(error)}") from error
    checkpoints = _CHECKPOINTS if ckpt_file == _CHECKPOINTS[0] else (ckpt_file,)
    start = f"{subfolder}/".lstrip("/")
    folders = {file.removeprefix(start).removesuffix(f"/{config_file}") for file in files if file.startswith(start)}
    return {
        folder
        for folder in folders
        if f"{start}{folder}/{config_file}" in files
        and any(f"{start}{folder}/{checkpoint}" in files for checkpoint in checkpoints)
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
        resource_id: a folder, or the name of a lens on the hub, mostly that of its model ("gpt2"). Other names
            of a model (:data:`ALIASES`) and its folder in the hub's cache lead to the same lens. Or one file, .pt or
            .safetensors, that holds a Jacobian lens: a path, or "owner/repository/path of the file" on the hub (the
            last part alone with ``repo_id``).
        repo_id: the hub's repository; by default the environment's TUNED_LENS_REPO_ID, else
            "AlignmentResearch/tuned-lens".
        repo_type: by default the environment's TUNED_LENS_REPO_TYPE, else "space"; "model" for one file.
        revision: branch, tag or commit of the repository.
        config_file, ckpt_file: names of the two files in the lens's folder. Where there is no "params.pt",
            "params.safetensors" is taken.
        subfolder: the repository's folder of lenses.
        cache_dir: where downloads are kept; by default the hub's cache.

    Returns:
        The paths of the config and the checkpoint; twice the same for a Jacobian lens, whose file is both.

    Raises:
        FileNotFoundError: no such lens, or a local folder that holds only a part of one, or several.
        PermissionError: the repository is gated.
        ConnectionError: the hub cannot be reached, and its cache does not hold the lens.
        ValueError: ``resource_id`` is empty.
    """
    if not os.fspath(resource_id):
        raise ValueError("resource_id: it is empty, so no lens can be found by it; pass a folder or a lens's name")
    if os.fspath(resource_id).endswith(ONE_FILE) and not os.path.isdir(resource_id):
        path = _one_file(os.fspath(resource_id), repo_id, repo_type, revision, cache_dir)
        return path, path
    checkpoints = _CHECKPOINTS if ckpt_file == _CHECKPOINTS[0] else (ckpt_file,)
    folder = Path(resource_id)
    here = {checkpoint: folder / checkpoint for checkpoint in checkpoints if os.path.isfile(folder / checkpoint)}
    config = folder / config_file
    # Unlike Path's, these say no for a name that is too long or no name of a file at all.
    is_config = os.path.isfile(config)
    if here and is_config:
        return config, next(iter(here.values()))
    jacobian = [] if here else jacobian_files(folder)
    if len(jacobian) > 1:
        names = [path.relative_to(folder).as_posix() for path in jacobian]
        raise FileNotFoundError(
            f"resource_id: {shortened(folder, 200)} holds several lenses, pass one of {listed(names)}"
        )
    if jacobian:
        return jacobian[0], jacobian[0]

    lacking = " and ".join([config_file] * (not is_config) + [" or ".join(checkpoints)] * (not here))
    problem = f"{shortened(folder, 200)} {f'lacks {lacking}' if os.path.isdir(folder) else 'is no folder'}"
    name = _name_on_hub(resource_id)
    # A folder of the model, which may be named as the model on the hub, says nothing about its lens.
    if here or (is_config and not is_model_config(config)) or name is None:
        raise FileNotFoundError(f"resource_id: no lens at {quoted(os.fspath(resource_id), 150)}: {problem}")

    repo_id = repo_id or os.environ.get("TUNED_LENS_REPO_ID") or "AlignmentResearch/tuned-lens"
    repo_type = repo_type or os.environ.get("TUNED_LENS_REPO_TYPE") or "space"
    lens_folder = f"{subfolder}/{name}".lstrip("/")
    place = (
        f"{shortened(lens_folder, 100)} in the hub's {repo_type} {quoted(repo_id, 150)} (revision {quoted(revision)})"
    )
    sought = f"no lens {quoted(name, 150)}: {problem}, and {place}"

    # A lens in a folder does without the hub's client, which takes a while to import.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

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

    with _hub_errors(sought, repo_id):
        config = download(config_file)
        for checkpoint in checkpoints[:-1]:
            with suppress(EntryNotFoundError):
                return config, download(checkpoint)
        return config, download(checkpoints[-1])


def jacobian_files(folder: Path) -> list[Path]:
    """The files of a folder that are named as Jacobian lenses are."""
    return sorted(path for pattern in _JACOBIAN for path in folder.glob(pattern)) if os.path.isdir(folder) else []


def _one_file(
    name: str, repo_id: str | None, repo_type: str | None, revision: str | None, cache_dir: str | None
) -> Path:
    """The file ``name``, here or on the hub; errors are those of :func:`load_lens_artifacts`."""
    if os.path.isfile(name):
        return Path(name)
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    if repo_id is None and inside and not name.startswith((".", "~", "/")):
        repo_id = f"{owner}/{repository}"
    else:
        inside = name
    if repo_id is None:
        raise FileNotFoundError(
            f"resource_id: no lens at {quoted(name, 150)}: there is no such file; one on the hub is named "
            "owner/repository/path"
        )
    repo_type = repo_type or "model"
    place = f"{quoted(inside, 150)} in the hub's {repo_type} {quoted(repo_id, 150)} (revision {quoted(revision)})"
    from huggingface_hub import hf_hub_download

    with _hub_errors(f"no lens {quoted(name, 150)}: there is no such file here, and {place}", repo_id):
        return Path(
            hf_hub_download(
                filename=inside, repo_id=repo_id, repo_type=repo_type, revision=revision, cache_dir=cache_dir
            )
        )


@contextmanager
def _hub_errors(sought: str, repo_id: str) -> Iterator[None]:
    """Errors of the hub's client, saying what was sought where and what may help."""
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"resource_id: {sought} is not in the cache and cannot be fetched: {shortened(error)}. "
            f"Check the network and HF_HUB_OFFLINE, {_GO_OFFLINE}"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"resource_id: {sought} is gated: {shortened(error)}. Accept its terms on the hub's page of "
            f"{quoted(repo_id, 150)}, then {_LOG_IN}"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"resource_id: {sought} does not exist, or is private: {shortened(error)}. If it is private, {_LOG_IN}"
        ) from error
    except (EntryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"resource_id: {sought} does not exist: {shortened(error)}") from error
    except OSError as error:
        raise ConnectionError(
            f"resource_id: {sought} cannot be fetched: {shortened(error)}. "
            f"Check the network and HF_ENDPOINT, {_LOG_IN} if the hub refuses you, {_GO_OFFLINE}"
        ) from error


def push_lens_artifacts(
    folder: str | Path,
    resource_id: str,
    repo_id: str,
    *,
    repo_type: str = "model",
    subfolder: str = "lens",
    private: bool | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Puts the files of ``folder`` where :func:`load_lens_artifacts` with the same names finds them.

    Args:
        folder: holds the config and the checkpoint.
        resource_id: the lens's name in the repository.
        repo_id: the hub's repository, "owner/name"; made if it does not exist.
        repo_type, subfolder: as in :func:`load_lens_artifacts`.
        private: whether a repository that is made here is private.
        token: the hub's access token; by default the one you are logged in with.
        options: others of ``huggingface_hub.HfApi.upload_folder``, such as ``revision`` or ``commit_message``.

    Returns:
        The commit's address.

    Raises:
        ValueError: ``resource_id`` is a path.
    """
    name = _name_on_hub(resource_id)
    if name is None:
        raise ValueError(
            f"resource_id: {quoted(resource_id, 150)} is a path; pass the name the lens shall have on the hub"
        )
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        repo_type=repo_type,
        folder_path=folder,
        path_in_repo=f"{subfolder}/{name}".lstrip("/"),
        **options,
    )
    return str(commit)


def _name_on_hub(resource_id: str | os.PathLike[str]) -> str | None:
    """The folder of a lens among the hub's lenses; None for what can only be a local path."""
    path = Path(resource_id)
    # Where the hub's cache keeps a model, which is the name of a model that was loaded from there.
    cached = re.search(r"(?:^|/)models--([^/]+)/snapshots/", f"{path.as_posix()}/")
    is_path = path.is_absolute() or os.fspath(resource_id).startswith((".", "~"))
    # No folder has a longer name, and no address of the hub could hold it.
    if not cached and (is_path or len(os.fspath(resource_id)) > 255):
        return None
    name = cached[1].replace("--", "/") if cached else path.as_posix()
    return ALIASES.get(name, name)


def is_model_config(path: Path) -> bool:
    """Whether a file is the config of a model, which names its type or its code; a lens's does neither."""
    try:
        values = read_json(path)
    except ValueError:
        return path.stat().st_size > MOST_CONFIG
    return isinstance(values, dict) and not {"model_type", "auto_map"}.isdisjoint(values)
