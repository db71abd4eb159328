"""Fetches files of the Hub, and puts into words why one cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ngrpo_lora.errors import UserError, first_line

__all__ = ["download", "hub_errors"]


def download(repo: str, name: str, revision: str | None = None, repo_type: str = "model") -> str:
    """The path of a repository's file, downloaded or from the cache, as `hf_hub_download` gives it.

    Where there is no network that would try again for half a minute, for a file that is not in the cache; here one
    request finds it out. What else is wrong with it, such as a busy server, is left to the client.

    Raises:
        LocalEntryNotFoundError: no connection, and the file is not in the cache; or as `hf_hub_download`.
    """
    if try_to_load_from_cache(repo, name, revision=revision, repo_type=repo_type) is None:
        try:
            get_hf_file_metadata(hf_hub_url(repo, name, revision=revision, repo_type=repo_type))
        except Exception as error:
            if type(error).__name__ == "ConnectError":  # of the client's HTTP library, which differs by its version
                raise LocalEntryNotFoundError(first_line(error)) from error
    return hf_hub_download(repo, name, revision=revision, repo_type=repo_type)


@contextmanager
def hub_errors(what: str, repo: str, local: str) -> Iterator[None]:
    """Put the client's errors into words: no such repository, no access to it, no network.

    Args:
        what: the setting and its value, with which the message begins.
        local: what could be given instead, such as `a local folder`.
    Raises:
        UserError: in place of whatever was raised.
    """
    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            f"{what} is gated and this account has no access: accept its licence at https://huggingface.co/{repo}, "
            "then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{what} is not on the Hub, or is private: check the spelling, or `hf auth login` with its account"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{what} is not in the local cache and the Hub cannot be reached ({first_line(error)}); "
            f"download it with `hf download` while online, or give {local}"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(f"{what}: the Hub answered {first_line(error)}; try again later") from None
    except Exception as error:  # the client's network errors (httpx) share no base with the above
        raise UserError(f"{what}: the Hub cannot be reached ({first_line(error)}); go online or give {local}") from None
