"""Merged networks on the Hugging Face hub: pushed with a card, and loaded by the same careful way as from a folder.

    zipped.push_to_hub("me/dogs-and-birds", licence="apache-2.0", private=True)
    zipped = fxzip.load("me/dogs-and-birds", revision="v1")

Of a repository only ``fxzip.json`` and ``model.safetensors`` are downloaded, and they are read as any other folder's
are (`fxzip.io.load`): whatever else lies there, pickles and code, is never looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

from huggingface_hub import (
    HfApi,
    ModelCard,
    PyTorchModelHubMixin,
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)

from fxzip.errors import HubError
from fxzip.folders import PLAN
from fxzip.origins import REPOSITORY, Origin

if TYPE_CHECKING:
    from os import PathLike

    from fxzip.merged import ZippedModel

PREFIX = "hf-hub:"


def located(place: str | PathLike[str], revision: str | None = None) -> Path:
    """The folder that a name stands for, downloaded where it is one of the hub's.

    Args:
        place: A folder, or ``owner/name`` of the hub, where there is no such folder; ``hf-hub:owner/name`` is always
            the hub's.
        revision: A branch, a tag or a commit of the repository.

    Raises:
        HubError: The repository cannot be had, or a folder is given with a revision.
    """
    remote = isinstance(place, str) and place.startswith(PREFIX)
    name = os.fspath(place).removeprefix(PREFIX) if remote else os.fspath(place)
    if remote or (isinstance(place, str) and REPOSITORY.fullmatch(name) and not os.path.lexists(name)):
        return download(name, revision)
    if revision is not None:
        raise HubError(f"revision={revision!r} is of a repository on the hub, and {name} is none: leave it out")
    return Path(place)


def download(repository: str, revision: str | None = None, **options: Any) -> Path:
    """The files of a merged network, from the hub or from what was downloaded before.

    Args:
        repository: ``owner/name``.
        revision: A branch, a tag or a commit; default: the newest of the main branch.
        **options: Of huggingface_hub's ``hf_hub_download``: ``token``, ``cache_dir``, ``force_download``,
            ``local_files_only``.

    Returns:
        A folder in huggingface_hub's cache; both files are of one commit.

    Raises:
        HubError: There is no such repository, revision or file, the hub cannot be reached and the files were not
            downloaded before, or a file is larger than any that is read.
    """
    from fxzip.io import MOST_WEIGHTS, WEIGHTS
    from fxzip.plan.text import MOST_BYTES

    path = Path()
    with _explained(repository, revision):
        for name, most in ((PLAN, MOST_BYTES), (WEIGHTS, MOST_WEIGHTS)):
            if not (options.get("local_files_only") or constants.is_offline_mode()):
                options |= _looked_up(repository, name, most, revision, options.get("token"))
            path = Path(hf_hub_download(repository, name, revision=revision, **options))
            revision = path.parent.name  # the commit: the second file is of the same one
    return path.parent


def _looked_up(repository: str, name: str, most: int, revision: str | None, token: Any) -> dict[str, Any]:
    """Ask for a file's size before it fills the disk.

    Returns:
        Options of the download: without a network what was downloaded before may do.

    Raises:
        HubError: The file is larger than any that is read.
        HfHubHTTPError: The hub refuses it.
    """
    try:
        size = get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), token=token).size
    except (errors.HfHubHTTPError, errors.HFValidationError):
        raise
    except Exception:  # of whichever library for HTTP huggingface_hub uses
        return {"local_files_only": True}
    if size is not None and size > most:
        raise HubError(f"{name} of {repository} has {size:,} bytes, more than the {most:,} that are read")
    return {}


_REFUSALS: tuple[tuple[type[Exception], str], ...] = (
    (errors.HFValidationError, "{repository!r} is no owner/name of the hub: {error}"),
    (errors.GatedRepoError, "{repository} asks for consent: accept its terms on {hub}, and `hf auth login`"),
    (
        errors.RepositoryNotFoundError,
        "there is no folder {repository} here, and no such repository on {hub}, or it is private: `hf auth login`, or "
        "set HF_TOKEN",
    ),
    (errors.RevisionNotFoundError, "{repository} has no revision {revision!r}: give a branch, a tag or a commit"),
    (
        errors.LocalEntryNotFoundError,
        "there is no folder {repository} here, {offline}, and the repository of that name was not downloaded before",
    ),
    (errors.EntryNotFoundError, "{repository} is no merged network: it has no fxzip.json with its weights"),
    (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set: nothing can be sent to the hub"),
    (errors.HfHubHTTPError, "{hub} refused {repository}: {error}"),
    (errors.HfHubHTTPError.__bases__[0], "{hub} cannot be reached: {error}"),  # of whichever library it uses for HTTP
    (OSError, "{hub} cannot be reached: {error}"),
)
"""What each error of huggingface_hub means, the special ones first."""


@contextmanager
def _explained(repository: str, revision: str | None = None) -> Iterator[None]:
    """What goes wrong on the way to the hub, in the user's words.

    Raises:
        HubError: Something did.
    """
    hub = constants.ENDPOINT
    try:
        yield
    except tuple(kind for kind, _ in _REFUSALS) as error:
        text = next(text for kind, text in _REFUSALS if isinstance(error, kind))
        offline = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{hub} cannot be reached"
        said = " ".join(str(error).split())[:300]
        shown = {"repository": repository, "revision": revision, "hub": hub, "offline": offline, "error": said}
        raise HubError(text.format(**shown)) from error


class OnHub(PyTorchModelHubMixin):
    """What makes a merged network one of the hub's: huggingface_hub's mixin with fxzip's own files and card."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """An object without the mixin's record of its arguments, which would go to a ``config.json``."""
        return object.__new__(cls)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """`ZippedModel.save` under the name that the hub's libraries use; files beside it stay.

        Args:
            save_directory: The folder.
            **options: ``push_to_hub=True`` pushes it, too, to ``repo_id`` (default: the folder's name), with the
                further options of `push_to_hub`.

        Returns:
            The address of the commit, where it was pushed.

        Raises:
            SaveError, HubError: As for these.
        """
        push, repository = options.pop("push_to_hub", False), options.pop("repo_id", None)
        _zipped(self).save(save_directory, overwrite=True)
        return self.push_to_hub(repository or Path(save_directory).name, **options) if push else None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        revision: str | None = None,
        device: Any = "cpu",
        **options: Any,
    ) -> ZippedModel:
        """A merged network from the hub or a folder, as `fxzip.load` reads it.

        Args:
            pretrained_model_name_or_path: ``owner/name``, or a folder.
            revision: A branch, a tag or a commit.
            device: Where the network goes.
            **options: ``token``, ``cache_dir``, ``force_download``, ``local_files_only``, as of huggingface_hub.

        Raises:
            HubError: As for `fxzip.hub.download`.
            FileFormatError: As for `fxzip.load`.
        """
        from fxzip.io import load

        place = os.fspath(pretrained_model_name_or_path)
        folder: str | Path = place
        if not os.path.isdir(place):
            folder = download(place.removeprefix(PREFIX), revision, **options)
        return load(Path(folder), device=device)

    def push_to_hub(  # type: ignore[override]  # licence and the like stand where the mixin has patterns of files
        self,
        repo_id: str,
        *,
        licence: str | None = None,
        base_models: Iterable[str] = (),
        datasets: Iterable[str] = (),
        commit_message: str = "A network merged by fxzip",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Push the network with its card to the hub, in one commit.

            zipped.push_to_hub("me/dogs-and-birds", licence="mit", base_models=["me/dogs", "me/birds"])

        Args:
            repo_id: ``owner/name``; it is made where it is missing.
            licence: The licence of the merged networks, as the hub writes it; default: those that are known.
            base_models: What was merged, as ``owner/name``, in the order of the tasks; default: what is known.
            datasets: Data sets that the networks were trained on; default: those that are known.
            commit_message: What the commit says.
            private: Whether a new repository is private.
            token: The token to use; default: that of ``hf auth login`` or of HF_TOKEN.
            branch: The branch; default: the main one.
            create_pr: Open a pull request with the commit.

        Returns:
            The address of the commit.

        Raises:
            HubError: The hub cannot be reached, or refuses it.
            SaveError: As for `ZippedModel.save`.
        """
        told = _told(_zipped(self), licence, tuple(base_models), tuple(datasets))
        with TemporaryDirectory() as scratch, _explained(repo_id, branch):
            folder = told.save(Path(scratch) / "network")
            api = HfApi(token=token)
            name = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
            if branch is not None:
                api.create_branch(repo_id=name, branch=branch, exist_ok=True)
            return str(
                api.upload_folder(
                    repo_id=name,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                )
            )

    def generate_model_card(self, *_args: Any, **_kwargs: Any) -> ModelCard:
        """The network's card, as huggingface_hub reads it."""
        from fxzip.card import model_card

        return ModelCard(model_card(_zipped(self)))


def _zipped(model: Any) -> ZippedModel:
    return cast("ZippedModel", model)


def _told(zipped: ZippedModel, licence: str | None, models: tuple[str, ...], datasets: tuple[str, ...]) -> ZippedModel:
    """The network with what its user says of where it came from.

    Raises:
        HubError: There is not one base model for each network that was merged.
    """
    known = zipped.information
    names = list(known.origins) or list(zipped.names)
    count = len(zipped.report.before)
    if models and len(models) != count:
        raise HubError(f"base_models={list(models)}: give one for each of the {count} networks that were merged")
    if models and len(names) != count:
        names = [f"network{number}" for number in range(count)]
    origins = {}
    for place, name in enumerate(names):
        own = known.origins.get(name, Origin())
        origins[name] = Origin(models[place] if models else own.model, licence or own.licence, datasets or own.datasets)
    if all(origin == Origin() for origin in origins.values()):
        return zipped
    told = zipped.select(zipped.names)
    told.information = replace(known, origins=origins)
    return told
