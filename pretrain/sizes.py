"""Sizes and times as people read them."""


def in_units(value: float, unit: str = "") -> str:
    """1234567 as "1.23 M", of bytes ("B") as "1.23 MB": three digits, units of 1000."""
    value = float(f"{value:.3g}") if value >= 1000 else value  # 999,600 is "1.00 M", not "1000 k"
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            decimals = 2 if scaled < 10 else 1 if scaled < 100 else 0
            return f"{scaled:.{decimals}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def in_time(seconds: float) -> str:
    """3725 as "1h02m", 65 as "1m05s", 5 as "5s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
