"""Sizes as tables show them."""


def in_bytes(count: int) -> str:
    unit = next((i for i in range(4) if count < 1024 ** (i + 1) * 0.9995), 4)
    return f"{count / 1024**unit:.{min(unit, 2)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def in_flops(count: int) -> str:
    unit = next((i for i in range(1, 6) if count < 1000 ** (i + 1) * 0.9995), 5)
    return f"{count / 1000**unit:.2f} {('', 'k', 'M', 'G', 'T', 'P')[unit]}FLOP"
