"""Writes testdata/ops/<op>.safetensors: what PyTorch and transformers compute for the ops.

Run with torch, transformers and safetensors installed: python testdata/make/ops.py
Reference results are computed in float64 from float32 inputs and stored in float32, so that they carry the
rounding of one store only; where the order of float32 operations is the point (rope tables, AdamW), in float32.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

OUT = Path(__file__).parent.parent / "ops"
torch.manual_seed(1)
torch.set_num_threads(1)


def save(op, **tensors):
    tensors = {name.replace("__", "."): t.detach() for name, t in tensors.items()}
    tensors = {k: (t if t.dtype == torch.int64 else t.float()).contiguous() for k, t in tensors.items()}
    save_file(tensors, OUT / f"{op}.safetensors")


def leaf(*shape, scale=1.0):
    """Values that float32 represents exactly, as a float64 variable."""
    return (torch.randn(*shape) * scale).double().requires_grad_()


def rms_norm():
    x, weight, dy = leaf(5, 33), leaf(1, 33), leaf(5, 33)
    y = F.rms_norm(x, (33,), weight[0], eps=1e-5)
    y.backward(dy)
    save("rms_norm", x=x, weight=weight, dy=dy, y=y, dx=x.grad)


def rope():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    def table(positions, **parameters):
        config = LlamaConfig(hidden_size=96, num_attention_heads=3, head_dim=32, max_position_embeddings=1024)
        config.rope_parameters = {"rope_type": "default", **parameters}
        config.rope_theta = parameters["rope_theta"]
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(positions)[None])
        return torch.cat([cos[0, :, :16], sin[0, :, :16]], dim=1)

    llama3 = dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=128,
    )
    none = table(64, rope_theta=1e5)
    x = torch.randn(6, 3 * 32)
    positions = torch.tensor([0, 1, 2, 0, 1, 63])
    cos, sin = (torch.cat([half, half], dim=1)[positions][None] for half in none.split(16, dim=1))
    heads = x.view(1, 6, 3, 32).transpose(1, 2)
    y, _ = apply_rotary_pos_emb(heads.double(), heads.double(), cos.double(), sin.double())
    save(
        "rope",
        table__none=none,
        table__linear=table(64, rope_theta=1e4, rope_type="linear", factor=4.0),
        table__llama3=table(256, rope_theta=5e5, **llama3),
        x=x,
        positions=positions,
        y=y.transpose(1, 2).reshape(6, 96),
    )


def attention():
    n_heads, n_kv_heads, dim, starts = 6, 2, 16, torch.tensor([0, 5, 6, 29])
    tokens = int(starts[-1])
    q, k, v = leaf(tokens, n_heads * dim), leaf(tokens, n_kv_heads * dim), leaf(tokens, n_kv_heads * dim)
    do = leaf(tokens, n_heads * dim)
    heads = lambda x, a, b: x[a:b].view(b - a, -1, dim).transpose(0, 1)[None]
    parts = []
    for a, b in zip(starts[:-1].tolist(), starts[1:].tolist()):
        o = F.scaled_dot_product_attention(
            heads(q, a, b), heads(k, a, b), heads(v, a, b), is_causal=True, scale=0.3, enable_gqa=True
        )
        parts.append(o[0].transpose(0, 1).reshape(b - a, -1))
    o = torch.cat(parts)
    o.backward(do)
    save("attention", q=q, k=k, v=v, do=do, o=o, dq=q.grad, dk=k.grad, dv=v.grad, starts=starts)


def swiglu():
    gate, up, dy = leaf(5, 33, scale=4.0), leaf(5, 33), leaf(5, 33)
    y = F.silu(gate) * up
    y.backward(dy)
    save("swiglu", gate=gate, up=up, dy=dy, y=y, dgate=gate.grad, dup=up.grad)


def cross_entropy():
    logits, targets = leaf(7, 301, scale=5.0), torch.randint(301, (7,))
    nll = F.cross_entropy(logits, targets, reduction="none")
    nll.mean().backward()
    save("cross_entropy", logits=logits, targets=targets, nll=nll[None], dlogits=logits.grad)


def adamw():
    """Ten float32 steps with clipping at total norm 1.0 and a learning rate that changes."""
    start, grads = torch.randn(1, 203), torch.randn(10, 203) * torch.logspace(-4, 0, 203)
    lrs = torch.tensor([[1e-3 * (10 - i) / 10 for i in range(10)]])
    p = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    params, norms = [], []
    for grad, lr in zip(grads, lrs[0]):
        optimizer.param_groups[0]["lr"] = float(lr)
        p.grad = grad[None].clone()
        norms.append(torch.nn.utils.clip_grad_norm_([p], 1.0))
        optimizer.step()
        params.append(p.detach().clone())
    state = optimizer.state[p]
    save(
        "adamw",
        start=start,
        grads=grads,
        lrs=lrs,
        norms=torch.stack(norms)[None],
        params=torch.cat(params),
        m=state["exp_avg"],
        v=state["exp_avg_sq"],
    )


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for op in (rms_norm, rope, attention, swiglu, cross_entropy, adamw):
        op()
