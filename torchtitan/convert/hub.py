"""Pushes a folder to the Hugging Face Hub. The token comes from HF_TOKEN or the login, and is never shown."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from torchtitan.checkpoint.folders import RECORD
from torchtitan.convert.errors import PushError
from torchtitan.logging import logger


def check_login(repo_name: str) -> str:
    """The full name of the repository, with the user where `repo_name` names no owner.

    Raises:
        ValueError: where the name is not valid, there is no login, or the Hub does not know it or cannot be reached.
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
    except HfHubHTTPError as error:
        reason = f"{api.endpoint} answers {error.response.status_code}"
        raise ValueError(f"--push_to_hub: the login was refused: {reason}") from error
    except Exception as error:  # whatever the transport raises
        raise ValueError(f"--push_to_hub: {api.endpoint} cannot be reached: {type(error).__name__}") from error
    return repo_name if "/" in repo_name else f"{user}/{repo_name}"


def push(folder: Path, repo_name: str, *, public: bool) -> str:
    """Makes the repository where there is none, uploads the folder without its record, and returns the URL.

    What has arrived in an earlier, broken upload is not sent again.

    Raises:
        ValueError: where the repository exists and is public, without `public`.
        PushError: where the upload breaks off.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_name, private=not public, exist_ok=True)
        private = api.model_info(repo_name).private
        if private or public:
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
    if not private and not public:
        raise ValueError(f"--hf_repo_name {repo_name}: the repository exists and is public; say so with --public")
    logger.info(f"pushed to {url} ({'private' if private else 'public'})")
    return str(url)


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "…") if token else text
