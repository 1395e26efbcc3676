"""The columns of `coef` and `levels` by name; csrc's structs have members of the same names."""

# of coef [B, 8]: D = skip x_t + scale F and D' at t', the means' A and A', and the two weights
SKIP, SCALE, SKIP_P, SCALE_P, A, A_P, W_TD, W_BASE = range(8)

# of levels [B, 4]: the noise levels at t, tau, t' and tau'
SIGMA, SIGMA_TAU, SIGMA_P, SIGMA_TAU_P = range(4)
