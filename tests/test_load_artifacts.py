"""Where a lens's files are looked for, and put."""

import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tiny_models import tiny

from tuned_lens_fast import TunedLens, load_artifacts
from tuned_lens_fast.load_artifacts import load_lens_artifacts


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds every lens and remembers what was asked for."""
    asked = []

    def download(**kwargs):
        asked.append(kwargs)
        return str(tmp_path / kwargs["subfolder"] / kwargs["filename"])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.delenv("TUNED_LENS_REPO_ID", raising=False)
    monkeypatch.delenv("TUNED_LENS_REPO_TYPE", raising=False)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("relative", [False, True])
def test_a_local_folder_comes_first(hub, tmp_path, relative):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "c.json").touch()
    (folder / "p.pt").touch()
    place = Path("gpt2") if relative else folder
    for resource in (place, str(place)):
        assert load_lens_artifacts(resource, config_file="c.json", ckpt_file="p.pt") == (
            place / "c.json",
            place / "p.pt",
        )
    assert hub == []


def test_then_the_hub(hub, tmp_path):
    config, ckpt = load_lens_artifacts("facebook/opt-125m", cache_dir="somewhere")
    assert config == tmp_path / "lens/facebook/opt-125m/config.json"
    assert ckpt == tmp_path / "lens/facebook/opt-125m/params.pt"
    assert [asked.pop("filename") for asked in hub] == ["config.json", "params.pt"]
    assert (
        hub[0]
        == hub[1]
        == {
            "repo_id": "AlignmentResearch/tuned-lens",
            "repo_type": "space",
            "revision": "main",
            "subfolder": "lens/facebook/opt-125m",
            "cache_dir": "somewhere",
        }
    )


def test_a_folder_that_holds_the_model_is_no_lens(hub, tmp_path):
    (tmp_path / "gpt2").mkdir()
    for text in (None, '{"model_type": "gpt2"}'):
        if text:
            (tmp_path / "gpt2" / "config.json").write_text(text)
        config, _ = load_lens_artifacts("gpt2")
        assert config == tmp_path / "lens/gpt2/config.json"


@pytest.mark.parametrize("config", ['{"d_model": 3, "num_hidden_layers": 2}', "{", "[]", "3", '{"num_layers": 2}'])
def test_a_part_of_a_local_lens_is_not_completed_from_the_hub(hub, tmp_path, config):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(config)
    with pytest.raises(FileNotFoundError, match=r"gpt2 lacks params\.pt or params\.safetensors"):
        load_lens_artifacts("gpt2")
    with pytest.raises(FileNotFoundError, match=r"gpt2 lacks other\.pt"):
        load_lens_artifacts("gpt2", ckpt_file="other.pt")
    (tmp_path / "gpt2" / "config.json").unlink()
    (tmp_path / "gpt2" / "params.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"gpt2 lacks config\.json"):
        load_lens_artifacts("gpt2")
    assert hub == []


def test_params_pt_comes_before_safetensors(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "params.safetensors").touch()
    assert load_lens_artifacts(tmp_path)[1] == tmp_path / "params.safetensors"
    (tmp_path / "params.pt").touch()
    assert load_lens_artifacts(tmp_path)[1] == tmp_path / "params.pt"
    assert load_lens_artifacts(tmp_path, ckpt_file="params.safetensors")[1] == tmp_path / "params.safetensors"


def test_safetensors_on_the_hub(hub, monkeypatch, tmp_path):
    def download(**kwargs):
        if kwargs["filename"] == "params.pt":
            raise EntryNotFoundError("no entry")
        return tmp_path / kwargs["filename"]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_lens_artifacts("gpt2")[1] == tmp_path / "params.safetensors"
    with pytest.raises(FileNotFoundError):
        load_lens_artifacts("gpt2", ckpt_file="params.pt", config_file="params.pt")


def test_environment_and_arguments(hub, monkeypatch):
    monkeypatch.setenv("TUNED_LENS_REPO_ID", "me/lenses")
    monkeypatch.setenv("TUNED_LENS_REPO_TYPE", "model")
    load_lens_artifacts("gpt2")
    assert (hub[0]["repo_id"], hub[0]["repo_type"]) == ("me/lenses", "model")
    load_lens_artifacts("gpt2", "you/lenses", "dataset", "v1", subfolder="sub")
    asked = hub[-1]
    assert (asked["repo_id"], asked["repo_type"], asked["revision"]) == ("you/lenses", "dataset", "v1")
    assert asked["subfolder"] == "sub/gpt2"


#: Every published lens.
PUBLISHED = {
    *("gpt2", "gpt2-large", "gpt2-xl", "EleutherAI/gpt-neox-20b", "facebook/vicuna-13b"),
    *(f"facebook/opt-{size}" for size in ("125m", "1.3b", "6.7b")),
    *(f"facebook/llama-{size}" for size in ("7b", "13b", "30b")),
    *(
        f"EleutherAI/pythia-{size}-deduped{version}"
        for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
        for version in ("", "-v0")
    ),
    *(f"meta-llama/Llama-2-{size}{chat}-hf" for size in ("7b", "13b") for chat in ("", "-chat")),
    *("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
}


@pytest.mark.parametrize(
    ("name", "lens"), [*load_artifacts.ALIASES.items(), *((name, name) for name in sorted(PUBLISHED))]
)
def test_names_of_models_lead_to_their_lens(hub, name, lens):
    assert lens in PUBLISHED
    load_lens_artifacts(name)
    assert hub[0]["subfolder"] == f"lens/{lens}"


@pytest.mark.parametrize("prefix", ["", "cache/hub/", "/home/me/.cache/huggingface/hub/"])
def test_a_models_folder_in_the_hubs_cache(hub, tmp_path, monkeypatch, prefix):
    for name, lens in (("openai-community--gpt2", "gpt2"), ("gpt2", "gpt2"), ("me--my-model--2", "me/my-model/2")):
        folder = f"{prefix}models--{name}/snapshots/0123abc"
        config, _ = load_lens_artifacts(folder)
        assert config == tmp_path / "lens" / lens / "config.json"
    if not prefix.startswith("/"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text('{"model_type": "gpt2"}')
        assert load_lens_artifacts(folder)[0] == config
        (Path(folder) / "params.pt").touch()
        assert load_lens_artifacts(folder) == (Path(folder) / "config.json", Path(folder) / "params.pt")


def test_a_model_without_a_name(hub, tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "params.pt").touch()
    with pytest.raises(ValueError, match="resource_id: it is empty"):
        load_lens_artifacts("")
    assert load_lens_artifacts("g", subfolder="") == (tmp_path / "g" / "config.json", tmp_path / "g" / "params.pt")


@pytest.mark.parametrize("resource", ["/nowhere/lens", "./lens", "../lens", "~/lens"])
def test_a_path_is_not_asked_of_the_hub(hub, resource):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_lens_artifacts(resource)
    assert hub == []


def test_a_folder_without_its_checkpoint(hub, tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"lacks params\.pt"):
        load_lens_artifacts(tmp_path)


def no_response(kind, message):
    """Its __init__ wants a response of whichever HTTP library the hub's client uses."""
    return kind.__new__(kind, message)


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (lambda: EntryNotFoundError("no entry"), FileNotFoundError, "does not exist"),
        (lambda: no_response(RevisionNotFoundError, "no tag"), FileNotFoundError, "does not exist"),
        (lambda: HFValidationError("bad name"), FileNotFoundError, "does not exist"),
        (
            lambda: no_response(RepositoryNotFoundError, "no repo"),
            FileNotFoundError,
            "is private.*hf auth login.*HF_TOKEN",
        ),
        (
            lambda: no_response(GatedRepoError, "403"),
            PermissionError,
            "is gated.*Accept its terms.*page of 'a/b'.*HF_TOKEN",
        ),
        (lambda: LocalEntryNotFoundError("offline"), ConnectionError, "not in the cache.*HF_HUB_OFFLINE.*folder"),
        (lambda: OfflineModeIsEnabled("offline"), ConnectionError, "cannot be fetched.*folder"),
        (lambda: ConnectionResetError("reset"), ConnectionError, "cannot be fetched.*HF_ENDPOINT.*HF_TOKEN"),
        (lambda: no_response(HfHubHTTPError, "401"), ConnectionError, "cannot be fetched.*HF_TOKEN"),
    ],
)
def test_the_hubs_failures_are_told_apart_and_say_what_to_do(monkeypatch, failure, error, message):
    def download(**_kwargs):
        raise failure()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(error, match=message) as caught:
        load_lens_artifacts("some/model", repo_id="a/b", repo_type="space")
    assert "'some/model'" in str(caught.value)
    assert "lens/some/model" in str(caught.value)
    assert "a/b" in str(caught.value)


# --- pushing ---


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A hub whose repositories are folders."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, *, repo_type, private, exist_ok):
            assert exist_ok
            folder = root / repo_type / repo_id
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "made").write_text(f"{self.token} {private}")

        def upload_folder(self, *, repo_id, repo_type, folder_path, path_in_repo, **options):
            shutil.copytree(folder_path, root / repo_type / repo_id / path_in_repo, dirs_exist_ok=True)
            return f"commit {options}"

    def download(*, filename, repo_id, repo_type, revision, subfolder, cache_dir):
        path = root / repo_type / repo_id / subfolder / filename
        if not path.is_file():
            raise EntryNotFoundError(str(path))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


@pytest.mark.parametrize("ckpt", ["params.pt", "params.safetensors"])
def test_pushed_and_pulled(local_hub, ckpt):
    model = tiny("gpt2")
    model.config.name_or_path = "openai-community/gpt2"
    lens = TunedLens.from_model(model)
    torch.nn.init.normal_(lens[1].weight)
    assert lens.push_to_hub("me/lenses", ckpt=ckpt) == "commit {}"
    folder = local_hub / "model" / "me" / "lenses"
    assert (folder / "made").read_text() == "None None"
    assert sorted(path.name for path in (folder / "lens" / "gpt2").iterdir()) == ["config.json", ckpt]
    pulled = TunedLens.from_model_and_pretrained(model, repo_id="me/lenses", repo_type="model")
    assert torch.equal(pulled[1].weight, lens[1].weight)
    assert pulled.config == lens.config


def test_where_to_is_up_to_the_caller(local_hub):
    model = tiny("gpt2")
    lens = TunedLens.from_model(model)
    with pytest.raises(ValueError, match="does not know its model's name"):
        lens.push_to_hub("me/lenses")
    with pytest.raises(ValueError, match="resource_id: '/data/gpt2' is a path"):
        lens.push_to_hub("me/lenses", "/data/gpt2")
    assert not local_hub.exists()
    options = {"repo_type": "dataset", "subfolder": "", "private": True, "token": "t", "commit_message": "new"}
    assert lens.push_to_hub("me/lenses", "mine", config="c.json", **options) == "commit {'commit_message': 'new'}"
    folder = local_hub / "dataset" / "me" / "lenses"
    assert (folder / "made").read_text() == "t True"
    assert sorted(path.name for path in (folder / "mine").iterdir()) == ["c.json", "params.pt"]
    place = {"repo_id": "me/lenses", "repo_type": "dataset", "subfolder": ""}
    assert len(TunedLens.from_model_and_pretrained(model, "mine", config_file="c.json", **place)) == len(lens)


def test_the_real_hubs_client_takes_what_it_is_given(monkeypatch, tmp_path):
    """Its own signatures, without its network."""
    api = mock.create_autospec(HfApi)
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    load_artifacts.push_lens_artifacts(tmp_path, "gpt2", "me/lenses", private=False, revision="v1", token="t")
    api.assert_called_once_with(token="t")
    api().create_repo.assert_called_once_with("me/lenses", repo_type="model", private=False, exist_ok=True)
    assert api().upload_folder.call_args.kwargs["path_in_repo"] == "lens/gpt2"
    with pytest.raises(TypeError, match="banana"):
        load_artifacts.push_lens_artifacts(tmp_path, "gpt2", "me/lenses", banana=1)
