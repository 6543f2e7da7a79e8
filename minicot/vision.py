"""Pictures for the decoder: a vision tower, a projector, and the language model that reads what they make.

LLaVA (Liu et al., arXiv:2304.08485; its two-layer projector: arXiv:2310.03744) as transformers lays it out.
A vision transformer (Dosovitskiy et al., arXiv:2010.11929) turns a picture into one vector a patch, the
projector maps each to the width of the language model, and they take the places of the picture's n
placeholder tokens. Two towers: CLIP's (Radford et al., arXiv:2103.00020) and SigLIP's (Zhai et al.,
arXiv:2303.15343). As in model.py, modules carry Hugging Face's names: the keys of state_dict() are the names
in a Llava folder.

Letters:
    I  images                     N  rows of a batch      E  hidden_size of the tower
    C  channels of a picture      T  tokens of a row      D  hidden_size of the language model
    S  positions in the tower     n  tokens an image      V  vocab_size
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from minicot.model import ModelConfig, Transformer

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
    "gelu": F.gelu,  # open_clip's CLIPs; the projector
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),  # SigLIP
}


@dataclass(frozen=True)
class VisionConfig:
    """A vision_config, checked and without gaps, in Hugging Face's names (families.parse_vision)."""

    model_type: str  # "clip_vision_model" or "siglip_vision_model"
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # height and width of every picture, in pixels
    patch_size: int  # pixels that no whole patch covers, right and below, are not seen
    num_channels: int
    hidden_act: str  # of ACTIVATIONS
    layer_norm_eps: float
    vision_use_head: bool = False  # SigLIP: whether the folder also holds the pooling head's weights
    initializer_range: float = 0.02  # standard deviation of random weights: the patch embedding's
    # and the position embedding's: 0.02 in Hugging Face's CLIP. A small tower that starts from nothing learns
    # far sooner where positions are visible from the first step; 0.5 did well, 0.02 was slow.
    position_initializer_range: float = 0.02

    @property
    def class_token(self) -> bool:
        return self.model_type == "clip_vision_model"

    @property
    def num_positions(self) -> int:
        """S: the patches and, in CLIP, the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token


@dataclass(frozen=True)
class VisionLanguageConfig:
    """A Llava config.json, checked and without gaps (families.parse_llava)."""

    text: ModelConfig
    vision: VisionConfig
    image_token_id: int  # the placeholder; it need not be in the vocabulary
    vision_feature_layer: int = -2  # 0 is what enters the tower's first layer, -1 what leaves the last
    vision_feature_select_strategy: str = "default"  # "default" drops the first position, "full" does not
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True

    @property
    def image_seq_length(self) -> int:
        """n: how many placeholders an image takes."""
        return self.vision.num_positions - (self.vision_feature_select_strategy == "default")


class VisionEmbeddings(nn.Module):
    """Patches as vectors (a convolution whose windows do not overlap), a class token (CLIP), positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        E, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(E)) if config.class_token else None
        self.patch_embedding = nn.Conv2d(config.num_channels, E, patch, patch, bias=not config.class_token)
        self.position_embedding = nn.Embedding(config.num_positions, E)

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # row by row, top left first
        if self.class_embedding is not None:
            x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1)
        return x + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Every position looks at every position: no mask, no rotation, as many kv heads as heads, biases."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads, E = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # not model.attend: without a mask it is causal, and with one CUDA has no flash kernel
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class VisionBlock(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: weights that a folder brings and gets back, which no feature depends on."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)


class VisionEncoder(nn.Module):
    """The vision tower, CLIP's or SigLIP's: pixels (I,C,H,W) -> any of its hidden states (I,S,E).

    They differ in what VisionConfig says and in three things: CLIP has a class token before the patches, a
    norm before the first layer (whose published name is misspelt) and no bias in the patch embedding.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        norm = lambda: nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.vision_model = nn.ModuleDict(
            {
                "embeddings": VisionEmbeddings(config),
                "pre_layrnorm": norm() if config.class_token else nn.Identity(),
                "encoder": nn.ModuleDict({"layers": layers}),
                "post_layernorm": norm(),  # this and the head serve the pooled vector, which LLaVA skips
                "head": PoolingHead(config) if config.vision_use_head else nn.Identity(),
            }
        )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """CLIP's scheme in Hugging Face's code, here for SigLIP's tower as well: normal with deviations that
        shrink as 1 / sqrt(E) and, where a layer reads its input, 1 / sqrt(2 layers); biases 0, norms 1."""
        config, width = self.config, self.config.hidden_size**-0.5
        inner = width * (2 * config.num_hidden_layers) ** -0.5
        deviations = {
            "patch_embedding.weight": config.initializer_range,
            "position_embedding.weight": config.position_initializer_range,
            "q_proj.weight": inner,
            "k_proj.weight": inner,
            "v_proj.weight": inner,
            "fc1.weight": width * 2**-0.5,
            "fc2.weight": inner,
        }
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                std = deviations.get(".".join(name.split(".")[-2:]), width)
                parameter.normal_(0.0, std, generator=generator)

    def forward(self, pixels: torch.Tensor, layer: int) -> torch.Tensor:
        """Hidden state number `layer`: 0 enters the first layer, -1 leaves the last, before post_layernorm.
        The layers behind it are not computed."""
        size = (self.config.num_channels, self.config.image_size, self.config.image_size)
        assert pixels.shape[1:] == size, f"pictures are {tuple(pixels.shape[1:])}, the tower reads {size}"
        parts = self.vision_model
        x = parts.pre_layrnorm(parts.embeddings(pixels.to(parts.embeddings.patch_embedding.weight.dtype)))
        for block in self.layers_before(layer):
            x = block(x)
        return x

    def layers_before(self, layer: int) -> nn.ModuleList:
        """The layers that hidden state number `layer` needs."""
        layers = self.vision_model.encoder.layers
        return layers[: range(len(layers) + 1)[layer]]


class Projector(nn.Module):
    """LLaVA-1.5's: linear_2(gelu(linear_1(x))), (...,E) -> (...,D)."""

    def __init__(self, config: VisionLanguageConfig):
        super().__init__()
        E, D, bias = config.vision.hidden_size, config.text.hidden_size, config.multimodal_projector_bias
        self.std, self.activation = config.text.initializer_range, ACTIVATIONS[config.projector_hidden_act]
        self.linear_1 = nn.Linear(E, D, bias=bias)
        self.linear_2 = nn.Linear(D, D, bias=bias)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices from N(0, the text's initializer_range^2), biases 0: Hugging Face's scheme."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, self.std, generator=generator)
            else:
                parameter.fill_(0.0)

    def forward(self, x):
        return self.linear_2(self.activation(self.linear_1(x)))


class VisionLanguageModel(nn.Module):
    """A Transformer that also reads pictures: ids (N,T) with n placeholders an image -> logits (N,T,V).

    `config` is the text's, as a Transformer's is; `vlm_config` says the rest. Weights are drawn from
    `generator`, the language model's first; `language_model`, where given, is taken as it is.
    """

    def __init__(
        self,
        config: VisionLanguageConfig,
        generator: torch.Generator | None = None,
        language_model: Transformer | None = None,
    ):
        super().__init__()
        self.config, self.vlm_config = config.text, config
        device = torch.get_default_device()
        self.language_model = language_model or Transformer(config.text, generator)
        with torch.device("meta"):  # so that nothing is drawn from the global generator
            self.vision_tower = VisionEncoder(config.vision)
            self.multi_modal_projector = Projector(config)
        if device.type != "meta":
            for part in (self.vision_tower, self.multi_modal_projector):
                part.to_empty(device=device).reset_parameters(generator)
        used = self.vision_tower.layers_before(config.vision_feature_layer)
        parts = self.vision_tower.vision_model  # what no feature depends on rides along, untrained
        for part in (*parts.encoder.layers[len(used) :], parts.post_layernorm, parts.head):
            part.requires_grad_(False)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (I,C,H,W) -> the features (I,n,D) that stand where the images' placeholders are."""
        hidden = self.vision_tower(pixels, self.vlm_config.vision_feature_layer)
        first = 1 if self.vlm_config.vision_feature_select_strategy == "default" else 0
        return self.multi_modal_projector(hidden[:, first:])

    def embed(self, ids: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        """ids (N,T) -> (N,T,D), the features of image i in the places of the i-th run of n placeholders.

        images: pixels (I,C,H,W), or the features (I,n,D) that encode_images made of them, in the order in
            which ids are read, row by row; a row may have none, one or several. A run of 2n is two images.
        ValueError where the placeholders of ids are not I runs of n.
        """
        T, n, token = ids.shape[1], self.vlm_config.image_seq_length, self.vlm_config.image_token_id
        holes = ids == token
        embeds = self.language_model.embed(ids.masked_fill(holes, 0))
        if images is None:
            images = embeds.new_empty(0, n, embeds.shape[-1])
        features = self.encode_images(images) if images.dim() == 4 else images
        assert features.shape[1:] == (n, embeds.shape[-1]), (
            f"features {tuple(features.shape)}; this model's are (I, {n}, {embeds.shape[-1]})"
        )
        at = holes.flatten().nonzero()[:, 0]  # places in ids, counted row by row
        if len(at) != len(features) * n:
            raise ValueError(
                f"ids hold {len(at)} image placeholders (id {token}), but {len(features)} "
                f"images need {len(features) * n}, {n} each"
            )
        first, last = at.view(-1, n)[:, 0], at.view(-1, n)[:, -1]
        broken = (last - first != n - 1) | (last // T != first // T)
        if broken.any():
            raise ValueError(
                f"the placeholders (id {token}) of image {broken.int().argmax().item()} do not "
                f"stand next to each other, {n} in one row of ids"
            )
        filled = embeds.flatten(0, 1).index_copy(0, at, features.flatten(0, 1).to(embeds.dtype))
        return filled.view_as(embeds)

    def hidden_states(self, embeds, *, pad_mask=None, positions=None, attention=None, cache=None):
        """As Transformer.hidden_states, (N,T,D) -> (N,T,D): images need nothing more once embedded."""
        return self.language_model.hidden_states(
            embeds, pad_mask=pad_mask, positions=positions, attention=attention, cache=cache
        )

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (...,D) -> logits (...,V)."""
        return self.language_model.head(hidden)

    def forward(self, ids, images=None, pad_mask=None):
        """ids (N,T) -> logits (N,T,V)."""
        return self.head(self.hidden_states(self.embed(ids, images), pad_mask=pad_mask))
