"""Write the JSON Schema of the AEC parser's answers, and the compliance rules that every answer must pass.

    python scripts/aec/make_rules.py

The rules screen for answers that no practitioner would accept; they do not replace a check against the building code.
Each rule is a JSON Schema, most with a condition (if, then), so that any validator can apply it.
"""

import json
from pathlib import Path
from typing import Any

from wording import CONCRETE_MM_FOR_HOURS, KEYS, PARISHES, STATES

BENCHMARKS = Path(__file__).parents[2] / "data" / "benchmarks"
SCHEMA = BENCHMARKS / "aec_parser.schema.json"
RULES = BENCHMARKS / "aec_parser.compliance.json"

Schema = dict[str, Any]

ELEMENTS = (
    "wall", "shear_wall", "door", "window", "slab", "beam", "column", "footing", "roof", "moment_frame",
    "braced_frame", "duct", "pipe",
)  # fmt: skip
MATERIALS = (
    "concrete", "concrete_block", "glass_fiber_concrete", "cross_laminated_timber", "gypsum", "brick",
    "insulated_metal_panel", "steel", "timber", "aluminum", "vinyl", "galvanized_steel", "copper", "pvc", "cast_iron",
)  # fmt: skip
STRUCTURAL = ("concrete", "concrete_block", "cross_laminated_timber", "steel", "timber")


def _millimeters(low: int, high: int, meaning: str) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high, "description": meaning}


def _one_of(values: tuple[Any, ...], meaning: str) -> Schema:
    return {"enum": list(values), "description": meaning}


PROPERTIES: dict[str, Schema] = {
    "element": _one_of(ELEMENTS, "What is asked for."),
    "function": _one_of(
        ("exterior", "partition", "tenant_separation", "shaft", "exit", "on_grade", "elevated"), "What it is for."
    ),
    "material": _one_of(MATERIALS, "What it is made of; of a window or door, its frame or leaf."),
    "thickness_mm": _millimeters(20, 600, "Thickness of a wall or slab."),
    "width_mm": _millimeters(100, 4000, "Width."),
    "height_mm": _millimeters(100, 6000, "Height."),
    "depth_mm": _millimeters(100, 2000, "Depth of a beam, column or footing."),
    "diameter_mm": _millimeters(10, 600, "Nominal diameter of a pipe."),
    "span_mm": _millimeters(1000, 30000, "Clear span."),
    "insulation_mm": _millimeters(10, 300, "Thickness of the insulation."),
    "glazing": _one_of(("single", "double", "triple"), "Panes of a window."),
    "strength_mpa": {
        "type": "integer", "minimum": 15, "maximum": 80, "description": "Compressive strength of the concrete.",
    },
    "service": _one_of(
        ("supply_air", "return_air", "exhaust_air", "cold_water", "hot_water", "sanitary", "fire_sprinkler"),
        "What a duct or pipe carries.",
    ),
    "airflow_ls": {"type": "integer", "minimum": 10, "maximum": 10000, "description": "Airflow in liters a second."},
    "fire_rating_hr": _one_of((0.75, 1, 1.5, 2, 3, 4), "Fire resistance in hours."),
    "u_factor": {"type": "number", "minimum": 0.1, "maximum": 1.3, "description": "U-factor in Btu/(h ft2 F)."},
    "r_value": {"type": "integer", "minimum": 1, "maximum": 60, "description": "R-value in h ft2 F/Btu."},
    "energy_code": _one_of(("Title 24", "IECC"), "Energy code that applies."),
    "climate_zone": {"type": "integer", "minimum": 1, "maximum": 16, "description": "Zone of the energy code."},
    "wind_speed_mph": {"type": "integer", "minimum": 85, "maximum": 200, "description": "Ultimate design wind speed."},
    "impact_rated": {"const": True, "description": "Withstands wind-borne debris; absent if not asked for."},
    "flood_elevation_ft": {"type": "integer", "minimum": 0, "maximum": 40, "description": "Design flood elevation."},
    "parish": _one_of(PARISHES, "Louisiana parish."),
    "location": _one_of(STATES, "State of the site."),
    "seismic_category": _one_of(("A", "B", "C", "D", "E", "F"), "Seismic design category."),
    "importance_factor": _one_of((1.0, 1.25, 1.5), "Seismic importance factor."),
}  # fmt: skip

OUTPUT_SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "AEC request",
    "description": "One building element with the parameters that the request names.",
    "type": "object",
    "properties": {key: PROPERTIES[key] for key in KEYS},
    "required": ["element", "material"],
    "additionalProperties": False,
}


def _has(**values: Any) -> Schema:
    """Return a schema for answers with all these keys; a value is a constant, a tuple of alternatives, or a schema."""
    schemas = {key: value if isinstance(value, dict) else _value(value) for key, value in values.items()}
    return {"properties": schemas, "required": list(values)}


def _value(value: Any) -> Schema:
    return {"enum": list(value)} if isinstance(value, tuple) else {"const": value}


def _rule(name: str, title: str, condition: Schema, then: Schema) -> Schema:
    return {"id": name, "title": title, "schema": {"if": condition, "then": then}}


def _concrete_rule(hours: int, least: int) -> Schema:
    return _rule(
        f"concrete-{hours}h-thickness",
        f"A concrete wall or slab rated for {hours} h is at least {least} mm thick",
        _has(element=("wall", "shear_wall", "slab"), material="concrete", fire_rating_hr=hours, thickness_mm={}),
        _has(thickness_mm={"minimum": least}),
    )


COMPLIANCE: list[Schema] = [
    _rule("door-rating", "A fire door is rated for 45, 60, 90 or 180 minutes",
          _has(element="door", fire_rating_hr={}), _has(fire_rating_hr=(0.75, 1, 1.5, 3))),
    _rule("timber-door-rating", "A timber fire door is rated for 90 minutes at most",
          _has(element="door", material="timber", fire_rating_hr={}), _has(fire_rating_hr={"maximum": 1.5})),
    _rule("assembly-rating", "Walls, slabs, beams and columns are rated in whole hours",
          _has(element=("wall", "shear_wall", "slab", "beam", "column", "roof"), fire_rating_hr={}),
          _has(fire_rating_hr=(1, 2, 3, 4))),
    *(_concrete_rule(hours, least) for hours, least in CONCRETE_MM_FOR_HOURS.items()),
    _rule("aluminum-rating", "Aluminum, vinyl and metal panels carry no fire rating",
          _has(material=("aluminum", "vinyl", "insulated_metal_panel")), {"not": {"required": ["fire_rating_hr"]}}),
    _rule("title-24-state", "Title 24 applies in California",
          _has(energy_code="Title 24"), _has(location="California")),
    _rule("iecc-state", "California has its own energy code, not the IECC",
          _has(energy_code="IECC", location={}), _has(location={"not": {"const": "California"}})),
    _rule("iecc-zone", "The IECC has climate zones 1 to 8", _has(energy_code="IECC", climate_zone={}),
          _has(climate_zone={"maximum": 8})),
    _rule("zone-code", "A climate zone belongs to an energy code", _has(climate_zone={}), _has(energy_code={})),
    _rule("title-24-window", "A window under Title 24 has a U-factor of 0.58 at most",
          _has(element="window", energy_code="Title 24", u_factor={}), _has(u_factor={"maximum": 0.58})),
    _rule("seismic-material", "In seismic design categories D to F the material is a structural one",
          _has(seismic_category=("D", "E", "F")), _has(material=STRUCTURAL)),
    _rule("frame-material", "Moment and braced frames are of steel",
          _has(element=("moment_frame", "braced_frame")), _has(material="steel")),
    _rule("shear-wall-material", "A shear wall is of concrete, reinforced block or cross-laminated timber",
          _has(element="shear_wall"), _has(material=("concrete", "concrete_block", "cross_laminated_timber"))),
    _rule("parish-state", "A parish lies in Louisiana", _has(parish={}), _has(location="Louisiana")),
    _rule("wind-borne-debris", "Windows and doors are impact rated where the wind reaches 140 mph",
          _has(element=("window", "door"), wind_speed_mph={"minimum": 140}), _has(impact_rated=True)),
    _rule("impact-openings", "Impact rating is for windows and doors",
          _has(impact_rated={}), _has(element=("window", "door"))),
    _rule("glazing-window", "Glazing belongs to a window", _has(glazing={}), _has(element="window")),
    _rule("duct-size", "A duct has a width, a height and a service",
          _has(element="duct"), _has(width_mm={}, height_mm={}, service=("supply_air", "return_air", "exhaust_air"))),
    _rule("pipe-size", "A pipe has a diameter and a service", _has(element="pipe"),
          _has(diameter_mm={}, service=("cold_water", "hot_water", "sanitary", "fire_sprinkler"))),
    _rule("sprinkler-material", "A fire sprinkler pipe is of steel",
          _has(element="pipe", service="fire_sprinkler"), _has(material="steel")),
    _rule("water-material", "Cast iron carries no drinking water",
          _has(element="pipe", service=("cold_water", "hot_water")), _has(material={"not": {"const": "cast_iron"}})),
    _rule("slab-material", "Slabs and footings are of concrete",
          _has(element=("slab", "footing")), _has(material="concrete")),
    _rule("slab-thickness", "A slab is at least 100 mm thick",
          _has(element="slab", thickness_mm={}), _has(thickness_mm={"minimum": 100})),
    _rule("exit-width", "An exit door is at least 700 mm wide and 2000 mm high",
          _has(element="door", function="exit"),
          {"properties": {"width_mm": {"minimum": 700}, "height_mm": {"minimum": 2000}}}),
    _rule("strength-concrete", "A concrete strength belongs to concrete", _has(strength_mpa={}),
          _has(material="concrete")),
]  # fmt: skip


def main() -> None:
    """Write both files."""
    for path, content in ((SCHEMA, OUTPUT_SCHEMA), (RULES, COMPLIANCE)):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
