"""Small random models of each architecture that targets are found in, and batches for them. Sizes are odd on purpose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 61


def llama(seed: int = 0, layers: int = 2, bias: bool = False, tied: bool = False) -> nn.Module:
    """Grouped-query attention: 4 query heads on 2 key heads; hidden 36, intermediate 52."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=36, intermediate_size=52, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=9 + 1, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=tied, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if bias:  # transformers starts biases at zero, which would hide what they do
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return model


def gpt2(seed: int = 0) -> nn.Module:
    """Conv1D weights, stored [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=36, n_layer=2, n_head=4, n_inner=52, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config).eval()


def bert(seed: int = 0, labels: int = 3) -> nn.Module:
    """A BERT classifier; linear maps with biases."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        num_labels=labels, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def vit(seed: int = 0) -> nn.Module:
    """A ViT classifier on 16 x 16 images."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8, num_labels=3,
                       hidden_dropout_prob=0, attention_probs_dropout_prob=0)  # fmt: skip
    return ViTForImageClassification(config).eval()


class Conv(nn.Module):
    """Two convolutions in blocks, one of them strided, then a grouped one and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 14, 3, stride=2, padding=1, bias=False), nn.ReLU())
        self.depthwise = nn.Conv2d(14, 14, 3, groups=14)
        self.classifier = nn.Linear(14, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classifier(self.depthwise(self.blocks(pixels)).mean((2, 3)))


def conv(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Conv().eval()


def causal_batches(count: int = 3, seed: int = 0, rows: int = 4, length: int = 11) -> list[dict[str, Tensor]]:
    """Batches with padding at the end and labels on the second half only."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : length // 2] = -100
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return batches


def classifier_batches(count: int = 3, seed: int = 0, labels: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(1, VOCABULARY, (4, 9), generator=generator), "attention_mask": torch.ones(4, 9, dtype=torch.long),
         "labels": torch.randint(0, labels, (4,), generator=generator)} for _ in range(count)
    ]  # fmt: skip


SMALL_SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 3, "initial_rank": 5},
    "block-lora": {"rank": 4},
    "boft": {"block": 4, "factors": 3},
    "bone": {"block": 4},
    "c3a": {"block": 18},
    "eva": {"rank": 3},
    "fourierft": {"count": 40},
    "galore": {"rank": 3, "update_interval": 3},
    "gralora": {"rank": 6, "hybrid_rank": 2},
    "hra": {"rank": 4, "orthogonality": 0.01},
    "hydra": {"rank": 3, "output_rank": 5},
    "int-tune": {"rank": 8},
    "lamda": {"rank": 5, "eta": 0.8},
    "lamda++": {"rank": 4, "eta": 0.8},
    "lisa": {"active_blocks": 1, "interval": 2},
    "loca": {"count": 40, "share": 0.8, "value_updates": 1, "place_updates": 2},
    "loldu": {},
    "lora-ga": {"rank": 3},
    "lora-xs": {"rank": 8},
    "mos": {"rank": 3, "private": 1},
    "nola": {"rank": 3, "count": 20},
    "oft": {"block": 5},
    "randlora": {"rank": 5},
    "road": {"group": 4},
    "s2ft": {"down": 0.2, "o": 0.5},
    "shira": {"rank": 3},
    "svfit": {},
    "tlora": {"rank": 2},
    "tri-adapt-lora": {"rank": 3, "initial_rank": 2, "block": 2, "interval": 2},
    "vblora": {"rank": 3, "vectors": 9, "length": 4},
    "vera": {"rank": 11},
    "waveft": {"count": 40, "wavelet": "db2"},
}


def settings(method: str) -> dict[str, Any]:
    """Hyper-parameters that fit the tiny models."""
    from graft import methods

    small = {"rank": 3} if any(o.name == "rank" for o in methods()[method].options()) else {}
    return SMALL_SETTINGS.get(method, small)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]], steps: int) -> list[float]:
    """A plain training loop; returns the losses."""
    model.train()
    losses = []
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
