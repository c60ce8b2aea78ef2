"""Weights of MOKD's golden files in our modules."""

from ssl_distill.heads.t_head import THead

_PARTS = {"ln1": "norm1", "qkv": "attn.qkv", "attnout": "attn.proj", "ln2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_KINDS = {"w": "weight", "b": "bias"}


def ours(name):
    """Our name of a token head's parameter in a golden file; None for other tensors."""
    if name in ("pos_embed", "last_v", "last_g"):
        return {"last_v": "last_layer.weight_v", "last_g": "last_layer.weight_g"}.get(name, name)
    stem, _, kind = name.rpartition("_")
    if stem in ("inproj", "lnf"):
        return f"{'projection' if stem == 'inproj' else 'norm'}.{_KINDS[kind]}"
    if stem.startswith("blk"):
        block, part = stem.removeprefix("blk").split("_")
        return f"blocks.{block}.{_PARTS[part]}.{_KINDS[kind]}"
    return None


def t_head_state(tensors):
    return {ours(name): value for name, value in tensors.items() if ours(name)}


def t_head_of(params, in_dim, grid, tensors):
    head = THead(
        in_dim,
        params["out_dim"],
        (grid, grid),
        is_tokens="inproj_w" not in tensors,
        embed_dim=params["embed_dim"],
        depth=params["depth"],
        num_heads=params["num_heads"],
        mlp_ratio=params.get("mlp_ratio", 4),
        position_mode="dino_v1",
    ).to(tensors["last_v"].dtype)
    assert {block.norm1.eps for block in head.blocks} | {head.norm.eps} == {params["ln_eps"]}
    head.load_state_dict(t_head_state(tensors))
    return head


def mlp_head_state(tensors):
    """Weights of an MLP head in a golden file by our names."""
    layers = [i for i in range(1, 10) if f"w{i}" in tensors]
    state = {"last_layer.weight_v": tensors["last_v"], "last_layer.weight_g": tensors["last_g"]}
    for i in layers:
        state |= {f"mlp.{2 * (i - 1)}.weight": tensors[f"w{i}"], f"mlp.{2 * (i - 1)}.bias": tensors[f"b{i}"]}
    return state
