from drawn import few_are_four, in_triton, launched, rounded  # noqa: F401
