"""Low-rank adapters (LoRA, 2106.09685): a large model trained through a small product beside each linear layer.

y = W x + (alpha / rank) B A x, where W is frozen, A is random and B starts at zero: the first step computes what the
base does. In the end the products are added to the weights, and what is saved is a plain model that knows nothing of
them.
"""

import peft
import torch
from transformers.pytorch_utils import Conv1D

from llmr_ray.artifacts import seed_of
from llmr_ray.config import LoraConfig
from llmr_ray.errors import ConfigError
from llmr_ray.modeling.text_model import TextModel

ALL_LINEAR = "all-linear"
"""peft's name for every linear layer."""


class Adapters:
    """Adapters within a model's transformer. Within it they alone take a gradient; a head on top of it trains whole.

    Args:
        model: changed in place.
        settings: rank above 0.
        seed: of the run; A depends on it alone.

    Raises:
        ConfigError: the transformer has no linear layer of a name that is asked for.
    """

    def __init__(self, model: TextModel, settings: LoraConfig, seed: int) -> None:
        targets = _checked(settings.target_modules, model.transformer)
        model.module.requires_grad_(False)
        for head in model.heads:
            head.requires_grad_(True)
        torch.manual_seed(seed_of(seed, "adapters"))
        adapted = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets
        )
        self._tuner = peft.LoraModel(model.transformer, adapted, "default")

    def merge(self) -> None:
        """Adds the adapters to the weights and takes them out, in place and layer by layer: no second model in memory.

        What the model computes stays what it was; nothing can be trained further.
        """
        self._tuner.merge_and_unload()


def _checked(targets: list[str], model: torch.nn.Module) -> list[str] | str:
    """The targets as peft takes them. It would pass over a name that nothing has, as long as another fits."""
    if targets == [ALL_LINEAR]:
        return ALL_LINEAR
    layers = [f".{name}" for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    unknown = [target for target in targets if not any(layer.endswith(f".{target}") for layer in layers)]
    if unknown or not targets:
        raise ConfigError(
            f"train.lora.target_modules {unknown} name no linear layer of the model, so nothing of that name would be "
            f"trained. It has {sorted({layer.rpartition('.')[2] for layer in layers})}; [{ALL_LINEAR}] takes all."
        )
    return targets
