"""Flash attention's entry points with the parameters that their releases have, computed by the plain definition.

Recorded from flash-attn 2.8.3 (flash_attn_interface.py), flash_attn_3 (hopper/flash_attn_interface.py at 0251105a), the
wheel flash_attn_4-4.0.0b36 (cute/interface.py) and the wheels of PyTorch 2.11.0 and 2.13.0 (nn/attention/varlen.py).
"""

# ruff: noqa: ARG001
from minimind_fast.ops.attention import attention

calls = []  # the arguments by name of each call


def _compute(given, cu_q, cu_k, max_q, max_k, causal):
    calls.append(given)
    for name in ("qv", "seqused_q", "seqused_k", "block_table", "page_table"):
        assert given.get(name) is None, f"{name} is for decoding"
    assert given[cu_q] is given[cu_k] and given[max_q] == given[max_k] and causal
    return attention(given["q"], given["k"], given["v"], given[cu_q], given[max_q], "eager")


def _dao(given):
    return _compute(given, "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", given["causal"])


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    return _dao(locals())


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    return _dao(locals())


def flash_attn_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    return _dao(locals()), None  # (out, lse)


def _torch(given):
    given = given | {name: given[long] for name, long in (("q", "query"), ("k", "key"), ("v", "value"))}
    same = given["q"].shape[1] == given["k"].shape[1]
    assert same or given.get("enable_gqa"), "Expect query and key/value to have the same number of heads"
    return _compute(given, "cu_seq_q", "cu_seq_k", "max_q", "max_k", given["window_size"] == (-1, 0))


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):  # fmt: skip
    return _torch(locals())


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    return _torch(locals())
