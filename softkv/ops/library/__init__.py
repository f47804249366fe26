"""Engines made of a library's attention kernel: the prefix and the tokens are two calls, merged by their log-sum-exp.

    lse = log(exp(lse_prefix) + exp(lse_tokens) + exp(sink)),     out = Σ_part exp(lse_part − lse) out_part

Backward: a library's backward, given the *merged* out and lse, computes each part's own share exp(s − lse), so one call
a part gives exact gradients; dq is their sum. A prefix shared by all rows is one key sequence for all queries of the
batch in one line, so its gradient comes out summed over the rows.

`parts` splits and merges; `cudnn` and `flash` are the engines. Calls that their kernels don't support raise; nothing is
emulated.
"""
