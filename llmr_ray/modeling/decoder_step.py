"""The pooling of T5 retrievers: what their decoder makes of a text in its first step (AAR, methods.md D).

Tensor legend: B texts of a batch, L tokens, D embedding.
"""

from pathlib import Path
from typing import Any

import torch

from llmr_ray.errors import ConfigError


class DecoderStep(torch.nn.Module):
    """The decoder of an encoder-decoder model, given its start token alone; stands where a pooling layer would.

    Args:
        path: the folder of the whole model.

    Raises:
        ConfigError: the model has no decoder beside its encoder.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoConfig, AutoModel

        super().__init__()
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        if not config.is_encoder_decoder or config.decoder_start_token_id is None:
            raise ConfigError(
                f"pooling is 'decoder', but {path} is no encoder-decoder model with a start token (T5). Take cls, mean "
                "or last."
            )
        model = AutoModel.from_pretrained(str(path), local_files_only=True, use_safetensors=True)
        self.decoder = model.get_decoder()
        self._start, self._dimension = int(config.decoder_start_token_id), int(config.hidden_size)

    def get_embedding_dimension(self) -> int:
        """D, as sentence-transformers asks its modules for it."""
        return self._dimension

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds `sentence_embedding` [B, D], from `token_embeddings` [B, L, D] and `attention_mask` [B, L]."""
        token_BLD, mask_BL = features["token_embeddings"], features["attention_mask"]
        output = self.decoder(
            input_ids=mask_BL.new_full((len(mask_BL), 1), self._start),
            encoder_hidden_states=token_BLD,
            encoder_attention_mask=mask_BL,
            use_cache=False,
        )
        features["sentence_embedding"] = output.last_hidden_state[:, 0]
        return features
