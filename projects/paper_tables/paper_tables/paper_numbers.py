"""The numbers that the paper prints in its Tables 1 to 3, as it prints them."""

# (n_in, n_out, G): what it measured of Eqs. A to D; an average over 10⁵ experiments.
TABLE1: dict[tuple[int, int, int], dict[str, str]] = {
    (1024, 512, 128): {"A": "511.236", "B": "1.979", "C": "0.500", "D": "0.995"},
    (512, 256, 64): {"A": "255.160", "B": "1.959", "C": "0.499", "D": "0.989"},
    (256, 128, 32): {"A": "127.189", "B": "2.015", "C": "0.500", "D": "1.032"},
    (128, 64, 16): {"A": "63.185", "B": "1.900", "C": "0.500", "D": "0.992"},
}

TABLE2_SAMPLES = 10_000_000  # for each activation and σ
# In the paper's order; it gives PReLU the slope 0.25.
TABLE2_ACTIVATIONS = (
    *("relu", "prelu", "gelu", "silu", "elu", "selu"),
    *("sigmoid", "tanh", "softplus", "softsign", "logsigmoid"),
)
_TABLE2 = {
    (0.1, "F"): "0.500 0.531 0.255 0.252 0.928 1.876 25.079 0.981 48.438 0.751 48.495",
    (0.1, "B"): "0.500 0.531 0.256 0.253 0.929 1.879 0.062 0.981 0.251 0.757 0.251",
    (0.1, "B/F"): "1.000 1.000 1.006 1.002 1.001 1.001 0.002 1.000 0.005 1.007 0.005",
    (1.0, "F"): "0.500 0.532 0.425 0.356 0.645 1.000 0.293 0.394 0.921 0.183 0.921",
    (1.0, "B"): "0.500 0.532 0.456 0.379 0.668 1.071 0.045 0.464 0.293 0.228 0.293",
    (1.0, "B/F"): "1.000 1.000 1.072 1.067 1.036 1.072 0.153 1.178 0.318 1.245 0.319",
    (10.0, "F"): "0.500 0.531 0.500 0.499 0.504 0.565 0.005 0.009 0.501 0.007 0.501",
    (10.0, "B"): "0.500 0.531 0.506 0.507 0.520 0.613 0.007 0.053 0.461 0.026 0.461",
    (10.0, "B/F"): "1.000 1.000 1.011 1.017 1.032 1.085 1.434 5.780 0.920 3.908 0.921",
}
# (activation, σ, "F", "B" or "B/F"): the digits that are printed tell how they were rounded.
TABLE2: dict[tuple[str, float, str], str] = {
    (name, sigma, gain): text
    for (sigma, gain), line in _TABLE2.items()
    for name, text in zip(TABLE2_ACTIVATIONS, line.split(), strict=True)
}

# G: test error in percent of the MLP on MNIST, an average over three runs.
TABLE3: dict[int, str] = {
    **{1: "1.827", 2: "1.720", 4: "1.773", 8: "1.730", 16: "1.727"},
    **{32: "1.720", 64: "1.670", 128: "1.753", 256: "3.240", 512: "88.650"},
}
