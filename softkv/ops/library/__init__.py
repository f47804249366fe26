"""Engines built on a library's attention kernel: one call for the prefix and one for the tokens, merged by log-sum-exp.

    lse = log(exp(lse_prefix) + exp(lse_tokens) + exp(sink)),     out = Σ_part exp(lse_part − lse) out_part

Backward: a library's backward, given the *merged* out and lse, computes each part's share exp(s − lse), so one call per
part gives exact gradients; dq is their sum. A prefix shared by all rows is one key sequence for all queries of the
batch, laid out as a single row, so its gradient is already summed over the rows.

`parts` splits and merges; `cudnn` and `flash` are the engines. Calls that the kernels don't support raise; nothing is
emulated.
"""
