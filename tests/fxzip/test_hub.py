"""The hub: what is pushed is what is loaded, and a repository can do no more than a folder can."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, constants
from typer.testing import CliRunner

import fxzip
from fxzip import cli, hub, io
from fxzip.errors import FileFormatError, HubError
from fxzip.origins import origin_of
from tests.fxzip import hub_server
from tests.fxzip.served import Small, run_fresh, zipped_small

NAME = "me/dogs-and-birds"


@pytest.fixture(scope="module")
def zipped() -> fxzip.ZippedModel:
    torch.manual_seed(0)
    images = [torch.randn(64, 3, 12, 12) for _ in range(2)]
    options: dict[str, Any] = {"names": ("dogs", "birds"), "method": "zip", "cut": "conv2", "progress": False}
    return fxzip.zip(Small(3), Small(4), images, **options, verify=False)


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub_server.Hub]:
    with hub_server.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield found


def same(a: fxzip.ZippedModel, b: fxzip.ZippedModel) -> bool:
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        return a.names == b.names and all(map(torch.equal, a(x), b(x)))


def test_what_is_pushed_is_what_is_loaded(zipped: fxzip.ZippedModel, server: hub_server.Hub) -> None:
    assert isinstance(zipped, PyTorchModelHubMixin)
    url = zipped.push_to_hub(NAME, licence="mit", base_models=["me/dogs", "me/birds"], datasets=["me/pictures"])
    assert url.startswith(f"{server.url}/{NAME}/commit/")
    (digest, files) = server.files(NAME, "main") or ("", {})
    assert sorted(files) == [".gitattributes", "README.md", "fxzip.json", "model.safetensors"]
    assert url.endswith(digest)
    server.asked.clear()
    again = fxzip.load(NAME)
    assert same(zipped, again)
    assert not any("README" in path or "config.json" in path or "bin" in path for path in server.asked)
    assert all(same(zipped, each) for each in (fxzip.load(f"hf-hub:{NAME}"), fxzip.ZippedModel.from_pretrained(NAME)))
    assert again.information.origins["birds"] == fxzip.Origin("me/birds", "mit", ("me/pictures",))
    assert zipped.information.origins == {}  # it was told of the copy that was pushed


def test_the_card_is_one_of_the_hub(zipped: fxzip.ZippedModel, server: hub_server.Hub) -> None:
    told = zipped.select(zipped.names)
    origins = {"dogs": fxzip.Origin("me/dogs", "mit"), "birds": fxzip.Origin("you/birds", "cc-by-nc-4.0", ("nabirds",))}
    labels = {"dogs": ("a", "b", "c"), "birds": ("w", "x", "y", "z")}
    preparation = fxzip.Preparation(mean=(0.5,) * 3, std=(0.2,) * 3)
    told.information = fxzip.Information(preparation, labels, origins=origins)
    told.push_to_hub(NAME)
    (_, files) = server.files(NAME, "main") or ("", {})
    text = files["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert data == ModelCard.load(NAME).data.to_dict() == told.generate_model_card().data.to_dict()
    assert data["base_model"] == ["me/dogs", "you/birds"]
    assert (data["base_model_relation"], data["library_name"]) == ("merge", "fxzip")
    assert (data["license"], data["datasets"], data["pipeline_tag"]) == ("other", ["nabirds"], "image-classification")
    assert {"fxzip", "merge"} <= set(data["tags"])
    fidelity = zipped.report.fidelity
    assert fidelity is not None
    results = data["model-index"][0]["results"]
    values = {(each["task"]["name"], m["type"]): m["value"] for each in results for m in each["metrics"]}
    for answer in fidelity.answers:
        name = f"fidelity of {answer.task} to its parent"
        assert values[name, "agreement"] == pytest.approx(answer.agreement, abs=1e-5)
        assert values[name, "unexplained"] == pytest.approx(answer.unexplained, abs=1e-5)
    assert "Use it as all of these licences allow." in text
    recipe = text.partition("## Recipe")[2]
    assert "method: zip(" in recipe
    assert "cut: conv2" in recipe


def test_revisions(zipped: fxzip.ZippedModel, server: hub_server.Hub) -> None:
    other = zipped.select(["birds"])
    zipped.push_to_hub(NAME)
    first = server.branches[NAME]["main"]
    other.push_to_hub(NAME, branch="birds")
    other.push_to_hub(NAME)
    assert fxzip.load(NAME).names == ("birds",)
    assert fxzip.load(NAME, revision="birds").names == ("birds",)
    assert same(zipped, fxzip.load(NAME, revision=first))
    with pytest.raises(HubError, match="has no revision 'v9': give a branch"):
        fxzip.load(NAME, revision="v9")


def test_without_a_network(zipped: fxzip.ZippedModel, server: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped.push_to_hub(NAME)
    fxzip.load(NAME)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert same(zipped, fxzip.load(NAME))
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the repository of that"):
            fxzip.load("me/other")
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set: nothing can be sent"):
            zipped.push_to_hub(NAME)
    point_to("http://127.0.0.1:9", monkeypatch)
    assert same(zipped, fxzip.load(NAME))  # what was downloaded before does
    with pytest.raises(HubError, match=r"no folder me/other here, http://127\.0\.0\.1:9 cannot be reached"):
        fxzip.load("me/other")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        zipped.push_to_hub(NAME)


def test_what_is_not_there(
    zipped: fxzip.ZippedModel, server: hub_server.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(HubError, match="no folder me/nothing here, and no such repository"):
        fxzip.load("me/nothing")
    server.commit("me/other", "main", {"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(HubError, match=r"me/other is no merged network: it has no fxzip\.json"):
        fxzip.load("me/other")
    with pytest.raises(HubError, match="is no owner/name of the hub"):
        fxzip.load("hf-hub:a/b/c")
    with pytest.raises(HubError, match="revision='main' is of a repository on the hub"):
        fxzip.load(tmp_path, revision="main")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"refused me/x|no such repository|private"):
        zipped.push_to_hub("me/x")
    with pytest.raises(HubError, match="give one for each of the 2 networks"):
        zipped.push_to_hub("me/x", base_models=["me/dogs"])


def test_commands_take_it(zipped: fxzip.ZippedModel, server: hub_server.Hub, tmp_path: Path) -> None:
    zipped.push_to_hub(NAME)
    done = CliRunner().invoke(cli.app, ["draw", f"hf-hub:{NAME}", str(tmp_path / "m.mmd")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "m.mmd").stat().st_size > 0
    done = CliRunner().invoke(cli.app, ["draw", "hf-hub:me/nothing", str(tmp_path / "n.mmd")])
    assert "fxzip: error: there is no folder me/nothing here" in done.stderr


def test_a_folder_comes_before_the_hub(
    zipped: fxzip.ZippedModel, server: hub_server.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    zipped.save_pretrained("me/dogs")
    assert same(zipped, fxzip.load("me/dogs"))
    assert same(zipped, fxzip.ZippedModel.from_pretrained("me/dogs"))
    assert server.asked == []
    url = zipped.save_pretrained("dogs-and-birds", push_to_hub=True)
    assert url is not None
    assert same(zipped, fxzip.load("me/dogs-and-birds"))


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/fxzip_hub_was_here"),)


def test_a_repository_can_do_no_more_than_a_folder(
    zipped: fxzip.ZippedModel, server: hub_server.Hub, tmp_path: Path
) -> None:
    """Pickles beside the network are not read, and what is altered is refused, with hashes that are right, too."""
    zipped.push_to_hub(NAME)
    evil = pickle.dumps(Evil())
    server.commit(NAME, "main", {"pytorch_model.bin": evil, "config.json": b'{"report": {}}', "__init__.py": b"1/0"})
    assert same(zipped, fxzip.load(NAME))
    (_, files) = server.files(NAME, "main") or ("", {})
    server.commit(NAME, "main", {"model.safetensors": evil})
    with pytest.raises(FileFormatError, match=r"model\.safetensors was cut short|altered"):
        fxzip.load(NAME)
    plan = json.loads(files["fxzip.json"])
    node = next(node for node in plan["heads"][0]["nodes"] if node["op"].startswith("call_"))
    node["op"], node["target"] = "call_function", "os.system"
    plan["sha256"] = io.plan_hash(plan)
    server.commit(
        NAME, "main", {"fxzip.json": json.dumps(plan).encode(), "model.safetensors": files["model.safetensors"]}
    )
    with pytest.raises(FileFormatError, match=r"fxzip\.json"):
        fxzip.load(NAME)
    assert not Path("/tmp/fxzip_hub_was_here").exists()


def test_files_too_large_are_not_downloaded(zipped: fxzip.ZippedModel, server: hub_server.Hub) -> None:
    zipped.push_to_hub(NAME)
    server.sizes["model.safetensors"] = io.MOST_WEIGHTS + 1
    with pytest.raises(HubError, match=r"more than the .* that are read"):
        fxzip.load(NAME)
    assert not any(path.startswith("GET") and "safetensors" in path for path in server.asked)


def test_where_models_come_from() -> None:
    """timm's configs name weights that nobody has loaded: only what the hub gave is told."""
    model: Any = Small()
    model.pretrained_cfg = {"hf_hub_id": "timm/", "architecture": "resnet18", "license": "apache-2.0"}
    assert origin_of(model) is None
    model.pretrained_cfg = {"hf_hub_id": "me/dogs@v1", "source": "hf-hub", "license": "mit"}
    assert origin_of(model) == fxzip.Origin("me/dogs", "mit")
    model = Small()
    model.config = SimpleNamespace(_name_or_path="google/vit")
    assert origin_of(model) == fxzip.Origin("google/vit")
    model.config = SimpleNamespace(_name_or_path="/home/me/vit")
    assert origin_of(model) is None


def test_origins_travel_and_are_bounded(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    told = zipped.select(["dogs"])
    told.information = replace(told.information, origins={"birds": fxzip.Origin("me/birds", "mit")})
    assert fxzip.load(told.save(tmp_path / "m")).information.origins == told.information.origins
    for wrong in (fxzip.Origin("no name"), fxzip.Origin(licence="x" * 300), fxzip.Origin(datasets=("x",) * 200)):
        told.information = replace(told.information, origins={"birds": wrong})
        with pytest.raises(fxzip.SaveError, match="information on images and models"):
            told.save(tmp_path / "n")


def test_nothing_of_the_hub_is_asked_for_folders() -> None:
    assert hub.located(Path("a/b")) == Path("a/b")
    assert hub.located("a/b/c") == Path("a/b/c")
    assert zipped_small(3, 4)._hub_mixin_config is None  # type: ignore[attr-defined]
    code = "import fxzip.cli, sys; print('huggingface_hub' in sys.modules)"
    assert run_fresh(code).strip() == "False"
