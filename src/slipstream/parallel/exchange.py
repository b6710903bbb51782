"""How what spread experts gave comes together: by all-reduce, or by all-to-all, which sends less and takes longer to begin.

No torch.

Attention that is shared by heads leaves every token on every rank, so tokens need not be sent to experts; only what experts gave
has to come together. An all-reduce sends a row of every token, also of those that no expert of a rank had: 2 (n - 1) / n rows a
token from each of n ranks. In an all-to-all a rank is responsible for every n-th part of the tokens, gets a row from each rank that
had the token, and an all-gather gives all ranks the sums: (1 + f) (n - 1) / n rows, where a rank had a token by chance

    f = 1 - (1 - 1 / n) ^ top_k        0.94 of two ranks, 0.68 of four and 0.41 of eight, for 4 experts a token

But all have to know how many rows come from where before it can begin: the host looks at the router's choice in every layer.
"""

from __future__ import annotations

from slipstream.config import ModelConfig

# Bytes that a link could send while the host looks, and one collective more begins: 30 microseconds at 300 GB/s, 100 at 2 GB/s.
WORTH = {"cuda": 8 << 20, "cpu": 200 << 10}


def had(ranks: int, top_k: int) -> float:
    """The part of all tokens that a rank's experts had, if the router has no preference."""
    return 1 - (1 - 1 / ranks) ** top_k


def least_tokens(config: ModelConfig, ranks: int, itemsize: int, device: str) -> int:
    """Of a step for which the all-to-all is taken."""
    row = config.hidden_size * itemsize
    saved = (
        (1 - had(ranks, config.num_experts_per_tok)) * (ranks - 1) / ranks * row
    )  # bytes a token that a rank need not send
    return int(WORTH.get(device, WORTH["cpu"]) / saved) + 1


def reason(config: ModelConfig, ranks: int, least: int, most: int) -> str:
    """For people.

    Args:
        least: tokens from which on it is taken.
        most: tokens of the largest step.
    """
    f = had(ranks, config.num_experts_per_tok)
    part = f"sends (1 + f) / 2 = {(1 + f) / 2:.2f} of an all-reduce's bytes, f = 1 - (1 - 1/{ranks})^{config.num_experts_per_tok}"
    taken = (
        "which pays from {:,} tokens on, and no step has so many"
        if least > most
        else "taken in steps of {:,} tokens and more"
    )
    return (
        "attention shared by heads leaves every token on every rank, so nothing is sent to experts, and what they gave is added up. "
        f"All-to-all of rows that a rank's experts had {part}: {taken.format(least)}, as the host has to count first; "
        "else all-reduce"
    )
