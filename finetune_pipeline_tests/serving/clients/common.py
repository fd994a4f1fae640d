"""What the scripts of all clients share: `python SCRIPT CAPABILITY` prints one JSON object.

The scripts run in environments of their own, where only the client is installed.
"""

import json
import os
import sys
from typing import Literal

from pydantic import BaseModel

URL = os.environ["GATEWAY_URL"] + "/v1"
MODEL = os.environ["GATEWAY_MODEL"]
PROMPT = "Add a 150 mm brick wall"

PARAMETERS = {
    "type": "object",
    "properties": {"material": {"enum": ["brick", "concrete"], "type": "string"}, "thickness_mm": {"type": "integer"}},
    "required": ["material", "thickness_mm"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "add_wall", "description": "Adds.", "parameters": PARAMETERS}}


class Wall(BaseModel):
    """A wall."""

    material: Literal["brick", "concrete"]
    thickness_mm: int


def main(functions):
    """Call the function that the command line names, and print what it returns."""
    print(json.dumps(functions[sys.argv[1]]()))
