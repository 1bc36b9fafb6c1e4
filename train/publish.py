"""The results of a run: the trained adapter with a description, and their upload to the Hugging Face Hub."""

import json
import logging
from pathlib import Path

from realcustom import RealCustomAdapter
from realcustom.config import DINOV2, SIGLIP
from realcustom.weights import save_adapter

from .config import HubConfig, ModelConfig, TrainConfig
from .results import ADAPTER, CARD, SUMMARY

logger = logging.getLogger(__name__)

_CARD = """---
{base_model}library_name: diffusers
tags: [text-to-image, image-customization, realcustom]
---
# RealCustom++ adapter

Trained with recipe `{name}`: {steps} steps of {batch_size} samples at {resolution} px. `training.json` contains the
complete configuration.

```python
from realcustom import RealCustomPipeline

{code}
```
"""


def write_results(config: TrainConfig, adapter: RealCustomAdapter, steps: int, *, complete: bool) -> None:
    """Write the adapter, the summary and a model card to `config.out`.

    Args:
        adapter: with the EMA weights.
        steps: number of steps done.
        complete: whether `model.base` is a complete RealCustom++ pipeline.
    """
    save_adapter(adapter, config.out / ADAPTER)
    summary = {"steps": steps, "samples": steps * config.batch_size, "config": config.to_dict()}
    (config.out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    local = Path(config.model.base).exists()
    card = _CARD.format(
        base_model="" if local else f"base_model: {config.model.base}\n",
        name=config.name,
        steps=steps,
        batch_size=config.batch_size,
        resolution=config.data.resolution,
        code=_usage(config.model, complete),
    )
    (config.out / CARD).write_text(card)


def _usage(model: ModelConfig, complete: bool) -> str:
    """Code that loads the adapter, for the model card."""
    if complete:
        return (
            f"pipeline = RealCustomPipeline.from_pretrained({json.dumps(model.base)})\n"
            f"pipeline.load_realcustom({json.dumps(ADAPTER)})"
        )
    arguments = [json.dumps(model.base), json.dumps(ADAPTER)]
    for name, default in (("siglip", SIGLIP), ("dinov2", DINOV2), ("variant", None)):
        if (value := getattr(model, name)) != default:
            arguments.append(f"{name}={json.dumps(value)}")
    return f"pipeline = RealCustomPipeline.from_parts({', '.join(arguments)})"


def check_hub(hub: HubConfig) -> None:
    """Check what can be checked before the upload, without a connection.

    Raises:
        ValueError: `repo_id` is not a name of a repository, or there is no token.
    """
    if hub.repo_id is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(hub.repo_id)
    except HFValidationError as error:
        raise ValueError(f"hub.repo_id is {hub.repo_id!r}; write it as NAMESPACE/NAME. {error}") from error
    if get_token() is None:
        raise ValueError(f"hub.repo_id is {hub.repo_id}, but there is no token; run `hf auth login` or set HF_TOKEN.")


def push_to_hub(out: Path, hub: HubConfig) -> None:
    """Upload the results in `out`; without a `repo_id`, does nothing.

    The repository is created if it does not exist. The token is that of `hf auth login` or `HF_TOKEN`.
    """
    if hub.repo_id is None:
        return
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(hub.repo_id, private=hub.private, exist_ok=True)
    api.upload_folder(repo_id=hub.repo_id, folder_path=out, allow_patterns=[ADAPTER, SUMMARY, CARD])
    logger.info("Uploaded the adapter to %s.", hub.repo_id)
