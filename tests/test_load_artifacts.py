"""Where a lens's files are looked for."""

from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from tuned_lens_fast import load_artifacts
from tuned_lens_fast.load_artifacts import load_lens_artifacts


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds every lens and remembers what was asked for."""
    asked = []

    def download(**kwargs):
        asked.append(kwargs)
        return str(tmp_path / kwargs["subfolder"] / kwargs["filename"])

    monkeypatch.setattr(load_artifacts, "hf_hub_download", download)
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
    (tmp_path / "gpt2" / "config.json").touch()
    config, _ = load_lens_artifacts("gpt2")
    assert config == tmp_path / "lens/gpt2/config.json"


def test_environment_and_arguments(hub, monkeypatch):
    monkeypatch.setenv("TUNED_LENS_REPO_ID", "me/lenses")
    monkeypatch.setenv("TUNED_LENS_REPO_TYPE", "model")
    load_lens_artifacts("gpt2")
    assert (hub[0]["repo_id"], hub[0]["repo_type"]) == ("me/lenses", "model")
    load_lens_artifacts("gpt2", "you/lenses", "dataset", "v1", subfolder="sub")
    asked = hub[-1]
    assert (asked["repo_id"], asked["repo_type"], asked["revision"]) == ("you/lenses", "dataset", "v1")
    assert asked["subfolder"] == "sub/gpt2"


@pytest.mark.parametrize("name", ["gpt2", "gpt2-large", "gpt2-xl"])
def test_names_of_the_hub_are_resolved(hub, name):
    load_lens_artifacts(f"openai-community/{name}")
    assert hub[0]["subfolder"] == f"lens/{name}"


@pytest.mark.parametrize("resource", ["/nowhere/lens", "./lens", "../lens", "~/lens"])
def test_a_path_is_not_asked_of_the_hub(hub, resource):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_lens_artifacts(resource)
    assert hub == []


def test_a_folder_without_its_checkpoint(hub, tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"lacks params\.pt"):
        load_lens_artifacts(tmp_path)


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (lambda: EntryNotFoundError("no entry"), FileNotFoundError, "does not exist"),
        # Its __init__ wants a response of whichever HTTP library the hub's client uses.
        (
            lambda: RepositoryNotFoundError.__new__(RepositoryNotFoundError, "no repo"),
            FileNotFoundError,
            "does not exist",
        ),
        (lambda: LocalEntryNotFoundError("offline"), ConnectionError, "not in the cache"),
        (lambda: OfflineModeIsEnabled("offline"), ConnectionError, "cannot be fetched"),
        (lambda: ConnectionResetError("reset"), ConnectionError, "cannot be fetched"),
    ],
)
def test_the_hubs_failures_are_told_apart(monkeypatch, failure, error, message):
    def download(**_kwargs):
        raise failure()

    monkeypatch.setattr(load_artifacts, "hf_hub_download", download)
    with pytest.raises(error, match=message) as caught:
        load_lens_artifacts("some/model", repo_id="a/b", repo_type="space")
    assert "'some/model'" in str(caught.value)
    assert "lens/some/model" in str(caught.value)
    assert "a/b" in str(caught.value)
