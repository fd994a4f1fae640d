"""Upload a folder to the Hugging Face Hub, with the user's token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune_pipeline.deployment.target import TargetError
from finetune_pipeline.validation_messages import short_repr

_QUOTED_CHARACTERS = 300


def upload(folder: Path, repo_id: str, message: str, *, public: bool, replaces: Sequence[str] = ()) -> str:
    """Upload a folder as one commit, and return the commit's URL. The repository is created if there is none.

    Args:
        repo_id: `owner/name`.
        message: of the commit.
        public: whether a new repository is public, and whether the upload into one that is public is intended.
        replaces: patterns of files that are deleted in the same commit unless the folder has them.

    Raises:
        TargetError: there is no token, the Hub cannot be reached, or it refuses; no file was uploaded then.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise TargetError(
            "no token of the Hugging Face Hub was found; set HF_TOKEN, or log in once with `hf auth login`. It needs "
            "the right to write"
        )
    api = HfApi(token=token)
    with _plain_errors(repo_id, token):
        api.create_repo(repo_id, private=not public, exist_ok=True)
        if not public and not api.model_info(repo_id).private:
            raise TargetError(
                f"the repository {repo_id} is public, so everybody could read the model; nothing was uploaded. Give "
                "--public if that is intended"
            )
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=[*replaces]
        )
    return str(commit.commit_url)


@contextmanager
def _plain_errors(repo_id: str, token: str) -> Iterator[None]:
    import httpx
    from huggingface_hub import constants, errors

    try:
        yield
    except TargetError:
        raise
    except errors.HFValidationError as error:
        raise TargetError(f"{repo_id} is no name of a repository ({error}); expected owner/name") from error
    except errors.OfflineModeIsEnabled as error:
        raise TargetError("HF_HUB_OFFLINE is set, so the Hub is not asked; unset it to upload") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = short_repr(str(error.server_message or error).replace(token, "..."), _QUOTED_CHARACTERS)
        remedy = {
            401: "the token is not valid; set HF_TOKEN, or log in again with `hf auth login`",
            403: f"the token has no right to write to {repo_id}; make one with that right, or use another owner",
            404: f"{repo_id} does not exist and cannot be created by this token; check the owner's name",
            429: "too many requests; wait some minutes and push again",
        }.get(status, "push again later; files that the Hub has already are not sent again")
        raise TargetError(f"{constants.ENDPOINT} refuses {repo_id}: status {status}, {said}; {remedy}") from error
    except (httpx.HTTPError, OSError) as error:
        raise TargetError(
            f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {str(error).replace(token, '...')}); "
            "check the network and push again"
        ) from error
