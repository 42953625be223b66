"""Which model and which scheduler a schedule was calibrated for. No tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MadeFor:
    """What a schedule was calibrated for. Weights are left out: a fine-tuned model may use its base model's."""

    model: str
    """Class of the UNet."""
    model_config: str
    """Digest of its configuration."""
    scheduler: str
    """Class of the scheduler."""
    scheduler_config: str
    """Its configuration, as JSON with sorted keys."""

    @staticmethod
    def of(unet: Any, scheduler: Any) -> MadeFor:
        """What describes this UNet and this scheduler, optimised or not."""
        config = json.dumps(plain(_config(scheduler)), sort_keys=True)
        return MadeFor(type(unet).__name__, _model_digest(unet), type(scheduler).__name__, config)

    def differences(self, unet: Any, scheduler: Any = None) -> list[str]:
        """In what a UNet, and a scheduler where there is one, differ from these; for people. Empty where in nothing.

        Of the scheduler's configuration only what both have is compared: other versions of diffusers have other
        entries.
        """
        found = []
        if (name := type(unet).__name__) != self.model:
            found.append(f"the model is {name}, not {self.model}")
        elif _model_digest(unet) != self.model_config:
            found.append(f"this {name} is configured otherwise")
        if scheduler is None:
            return found
        if (name := type(scheduler).__name__) != self.scheduler:
            return [*found, f"the scheduler is {name}, not {self.scheduler}"]
        theirs, ours = json.loads(self.scheduler_config), plain(_config(scheduler))
        return found + [
            f"{key} of the {name} is {ours[key]!r}, not {theirs[key]!r}"
            for key in sorted(theirs.keys() & ours.keys())
            if theirs[key] != ours[key]
        ]


def _config(part: Any) -> dict[str, Any]:
    config = getattr(part, "config", None)
    return {str(k): v for k, v in config.items() if not str(k).startswith("_")} if isinstance(config, Mapping) else {}


def _model_digest(unet: Any) -> str:
    """Of the entries that say something; of the shapes of the weights where there is no configuration."""
    config = {key: value for key, value in _config(unet).items() if value is not None and value is not False}
    known = config or {name: list(value.shape) for name, value in unet.named_parameters()}
    return hashlib.sha256(json.dumps(plain(known), sort_keys=True).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """What comes back from JSON for this value; text for what JSON does not know."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else repr(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else repr(value)
