"""Pushes a folder to the Hugging Face Hub. The token comes from HF_TOKEN or the login, and is never shown."""

import sys
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from torchtitan.checkpoint.manifest import RECORD
from torchtitan.convert.errors import PushError
from torchtitan.logging import logger


def check_push(repo_name: str, *, public: bool) -> str:
    """The full name of the repository, with the user where `repo_name` names no owner.

    Raises:
        ValueError: where the name is not valid, there is no login, or the Hub does not know it or cannot be reached;
            where the repository exists and is public, without `public`.
    """
    try:
        validate_repo_id(repo_name)
    except HFValidationError as error:
        raise ValueError(f"--hf_repo_name {repo_name}: {str(error).splitlines()[0]}") from error
    if get_token() is None:
        raise ValueError("--push_to_hub without a login: set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi()
    try:
        user = api.whoami()["name"]
        full_name = repo_name if "/" in repo_name else f"{user}/{repo_name}"
        exposed = api.repo_exists(full_name) and not api.model_info(full_name).private
    except HfHubHTTPError as error:
        reason = f"{api.endpoint} answers {error.response.status_code}"
        raise ValueError(f"--push_to_hub: the login was refused: {reason}") from error
    except Exception as error:  # whatever the transport raises
        raise ValueError(f"--push_to_hub: {api.endpoint} cannot be reached: {type(error).__name__}") from error
    if exposed and not public:
        raise ValueError(f"--hf_repo_name {full_name}: the repository exists and is public; say so with --public")
    return full_name


def push(folder: Path, repo_name: str, *, public: bool) -> None:
    """Makes the repository where there is none, and uploads the folder without its record.

    What has arrived in an earlier, broken upload is not sent again.

    Raises:
        PushError: where the upload breaks off.
    """
    api = HfApi()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        url = api.create_repo(repo_name, private=not public, exist_ok=True)
        private = api.model_info(repo_name).private
        logger.info(f"pushing to {url} ({'private' if private else 'public'})")
        api.upload_folder(
            repo_id=repo_name, folder_path=folder, ignore_patterns=[RECORD], commit_message=f"Upload {folder.name}"
        )
    except Exception as error:  # whatever the transport raises
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"
        raise PushError(
            f"the push to {repo_name} broke off ({_without_token(reason)}); {folder} is complete, and the same command "
            "again goes on with the push"
        ) from error
    logger.info(f"pushed to {url}")


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "…") if token else text
