"""A composed config as plain dictionaries and lists."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from metamask_plugin.errors import UserError


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config with its interpolations resolved, as plain dictionaries and lists.

    Raises:
        UserError: for a ``???`` that is not filled in, or an interpolation that leads nowhere.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key or 'a key'} must be set, got ???; set it on the command line"
        ) from None
    except InterpolationResolutionError as error:
        reason = _first_line(error)
        raise UserError(
            f"{error.full_key or 'the config'} must be an interpolation that resolves, got: {reason}; name a "
            "key that is there, or write the value itself"
        ) from None
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(
            f"the config must resolve, got {type(error).__name__}: {_first_line(error)}"
        ) from None
    except RecursionError:
        raise UserError("the config must resolve, got an interpolation that refers to itself") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
