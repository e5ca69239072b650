"""What the numbers of an augmentation recipe may be: pydantic checks it where a recipe is read."""

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError


def _rising(values: tuple[float, float], least: float) -> tuple[float, float]:
    if not least <= values[0] <= values[1] < float("inf"):  # NaN too
        raise PydanticCustomError("range", "must be two numbers from {least} on, the lower first", {"least": least})
    return values


def _odd(sides: tuple[int, ...]) -> tuple[int, ...]:
    if not sides or any(side < 1 or side % 2 == 0 for side in sides):
        raise PydanticCustomError("sides", "must be one or more odd numbers from 1 on")
    return sides


Chance = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
OddSides = Annotated[tuple[int, ...], AfterValidator(_odd)]
Quality = Annotated[tuple[int, Annotated[int, Field(le=100)]], AfterValidator(partial(_rising, least=1))]
Range = Annotated[tuple[float, float], AfterValidator(partial(_rising, least=0))]
PositiveRange = Annotated[tuple[float, float], AfterValidator(partial(_rising, least=1e-3))]
Factors = Annotated[tuple[float, float], AfterValidator(partial(_rising, least=1))]
