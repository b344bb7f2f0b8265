"""Edit head: hidden states of the visual tokens -> conditioning of the UNet.

A small seq2seq transformer with learned queries. Key names are those of the published checkpoint. Knows
nothing of where its input states come from.

Axes: B batch, N visual tokens, D width of the LLM, Q queries (77), C width of the UNet's condition (768).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgie.errors import BundleError


class EditHead(nn.Module):
    """`Linear -> nn.Transformer (pre-norm) with learned queries -> Linear`.

    Source: Fu et al., ICLR 2024, section 3.2 ("edit head"); layer sizes of the published checkpoint.

    Args:
        llm_dim: D. width: Inner width. num_queries: Q. condition_dim: C.
        num_heads, num_layers, feedforward_dim: Of each of the two stacks.
    """

    def __init__(
        self,
        *,
        llm_dim: int,
        condition_dim: int,
        width: int = 512,
        num_queries: int = 77,
        num_heads: int = 4,
        num_layers: int = 4,
        feedforward_dim: int = 2048,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise BundleError(f"edit head width {width} is not divisible by {num_heads} heads")
        self.llm2hid = nn.Linear(llm_dim, width)
        self.query = nn.Parameter(torch.randn(1, num_queries, width))
        encoder_layer = nn.TransformerEncoderLayer(
            width, num_heads, feedforward_dim, dropout=0.0, norm_first=True, batch_first=True
        )
        # Built here only to switch nested tensors off, which norm_first does not support and warns about.
        encoder = nn.TransformerEncoder(encoder_layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.mapper = nn.Transformer(
            width,
            num_heads,
            num_decoder_layers=num_layers,
            dim_feedforward=feedforward_dim,
            dropout=0.0,
            norm_first=True,
            batch_first=True,
            custom_encoder=encoder,
        )
        self.hid2feat = nn.Linear(width, condition_dim)
        self.config: dict[str, int] = {
            "llm_dim": llm_dim,
            "condition_dim": condition_dim,
            "width": width,
            "num_queries": num_queries,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "feedforward_dim": feedforward_dim,
        }

    def forward(self, states: Float[Tensor, "B N D"], embeddings: Float[Tensor, "N D"]) -> Float[Tensor, "B Q C"]:
        """Conditioning from the selected hidden states plus the visual tokens' input embeddings."""
        hidden = self.llm2hid(states + embeddings)
        queries = self.query.expand(states.shape[0], -1, -1)
        condition: Tensor = self.hid2feat(self.mapper(hidden, queries))
        return condition

    def null_condition(self, embeddings: Float[Tensor, "N D"]) -> Float[Tensor, "1 Q C"]:
        """The condition that means "no words": the head applied to zero states."""
        condition: Tensor = self(torch.zeros_like(embeddings)[None], embeddings)
        return condition

    @staticmethod
    def infer_config(weights: dict[str, Tensor], *, num_heads: int = 4) -> dict[str, int]:
        """Constructor arguments read off a state dict; `num_heads` cannot be, the published value is 4.

        Raises:
            BundleError: A key that tells a size is missing.
        """
        try:
            width, llm_dim = weights["llm2hid.weight"].shape
            feedforward_dim = weights["mapper.encoder.layers.0.linear1.weight"].shape[0]
            num_queries, condition_dim = weights["query"].shape[1], weights["hid2feat.weight"].shape[0]
        except KeyError as error:
            raise BundleError(f"the edit head's weights lack {error}") from error
        layers = {key.split(".")[3] for key in weights if key.startswith("mapper.encoder.layers.")}
        return {
            "llm_dim": llm_dim,
            "condition_dim": condition_dim,
            "width": width,
            "num_queries": num_queries,
            "num_heads": num_heads,
            "num_layers": len(layers),
            "feedforward_dim": feedforward_dim,
        }
