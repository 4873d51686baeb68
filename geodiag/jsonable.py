"""Any data as strict JSON can hold it."""

import math
from collections.abc import Mapping
from typing import Any


def jsonable(data: Any) -> Any:
    """Return `data` as dicts, lists, strings, finite numbers, booleans and None.

    NaN and infinity become None; scalars and arrays of numpy and torch become numbers and lists;
    anything else becomes text.
    """
    if data is None or isinstance(data, bool | int | str):
        return data
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(k): jsonable(v) for k, v in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [jsonable(v) for v in data]
    if hasattr(data, "tolist"):
        return jsonable(data.tolist())
    return str(data)
