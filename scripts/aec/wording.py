"""Generate AEC requests: building elements with their parameters, and two wordings for them.

A request asks for one building element. Its answer is one flat JSON object, the *spec*. `sample_spec` draws a spec,
`plain` words it in ordinary language, and `firm` words it as one architecture firm does: abbreviations of its drawings,
site shorthand and dictated notes. The starter model learns the plain wording only, and the loop learns the firm's
wording from the logs. All draws come from the `random.Random` argument, so a seed determines the text.

`make_benchmark.py`, `make_starter_model.py` and `make_sample_logs.py` use this module.
"""

import json
import re
from collections.abc import Callable, Sequence
from random import Random

Value = str | int | float | bool
Spec = dict[str, Value]

SLICES = ("walls", "doors_windows", "slabs_structure", "mep", "seismic", "fire_energy", "louisiana")

# All answers have their keys in this order, so that a small model need not choose the next key.
KEYS = (
    "element", "function", "material", "thickness_mm", "width_mm", "height_mm", "depth_mm", "diameter_mm", "span_mm",
    "insulation_mm", "glazing", "strength_mpa", "service", "airflow_ls", "fire_rating_hr", "u_factor", "r_value",
    "energy_code", "climate_zone", "wind_speed_mph", "impact_rated", "flood_elevation_ft", "parish", "location",
    "seismic_category", "importance_factor",
)  # fmt: skip

STATES = ("California", "Louisiana", "Oregon", "Washington", "Nevada", "Utah", "Texas")
SEISMIC_STATES = ("California", "Oregon", "Washington", "Nevada", "Utah")
PARISHES = ("Orleans", "Jefferson", "Terrebonne", "Plaquemines", "Lafourche", "Cameron")

# Minimum thickness (mm) of a concrete wall or slab for its hours of fire resistance, as a screening value.
CONCRETE_MM_FOR_HOURS = {1: 90, 2: 100, 3: 120, 4: 140}


def ordered(spec: Spec) -> Spec:
    """Return the spec with its keys in the order of `KEYS`."""
    return {key: spec[key] for key in KEYS if key in spec}


def answer_text(spec: Spec) -> str:
    """Return the expected answer: compact JSON with the keys in order."""
    return json.dumps(ordered(spec), ensure_ascii=False, separators=(",", ":"))


# --- Specs --------------------------------------------------------------------------------------------------------


def sample_spec(slice_name: str, rng: Random) -> Spec:
    """Draw a spec of the slice. It passes the schema and every compliance rule of the benchmark."""
    return ordered(_SAMPLERS[slice_name](rng))


def _step(rng: Random, low: int, high: int, step: int) -> int:
    return rng.randrange(low, high + 1, step)


def _thickness(material: Value, rng: Random) -> int:
    low, high = {"gypsum": (75, 180), "concrete_block": (100, 300), "cross_laminated_timber": (90, 260),
                 "glass_fiber_concrete": (30, 120), "insulated_metal_panel": (50, 150)}.get(
        str(material), (100, 400))  # fmt: skip
    return _step(rng, low, high, 10 if rng.random() < 0.7 else 5)


def _wall_rating(spec: Spec, rng: Random) -> None:
    hours = rng.choice((1, 2, 2, 3, 4))
    spec["fire_rating_hr"] = hours
    if spec["material"] in ("concrete", "concrete_block"):
        spec["thickness_mm"] = max(int(spec["thickness_mm"]), CONCRETE_MM_FOR_HOURS[hours])


def _wall(rng: Random) -> Spec:
    material = rng.choice(
        ("concrete", "concrete_block", "glass_fiber_concrete", "cross_laminated_timber", "gypsum", "brick",
         "insulated_metal_panel"))  # fmt: skip
    spec: Spec = {"element": "wall", "material": material, "thickness_mm": _thickness(material, rng)}
    inside = material in ("gypsum", "concrete", "concrete_block", "cross_laminated_timber")
    outside = material in ("glass_fiber_concrete", "insulated_metal_panel")
    if outside:
        spec["function"] = "exterior"
    elif inside and rng.random() < 0.8:
        spec["function"] = rng.choice(("exterior", "partition", "tenant_separation", "shaft"))
        if material == "gypsum" and spec["function"] == "exterior":
            spec["function"] = "tenant_separation"
    return spec


def _walls(rng: Random) -> Spec:
    spec = _wall(rng)
    if rng.random() < 0.75 and spec["material"] not in ("glass_fiber_concrete", "insulated_metal_panel"):
        _wall_rating(spec, rng)
    if rng.random() < 0.4:
        spec["height_mm"] = _step(rng, 2400, 4800, 100)
    if spec.get("function") == "exterior" and rng.random() < 0.7:
        spec["insulation_mm"] = _step(rng, 20, 150, 10)
    if rng.random() < 0.35 or len(spec) < 5:
        spec["location"] = rng.choice(STATES)
    return spec


def _opening_size(spec: Spec, rng: Random) -> None:
    if spec["element"] == "door":
        spec["width_mm"], spec["height_mm"] = _step(rng, 700, 1800, 50), _step(rng, 2000, 2700, 50)
    else:
        spec["width_mm"], spec["height_mm"] = _step(rng, 400, 2800, 50), _step(rng, 400, 2200, 50)


def _door(rng: Random) -> Spec:
    spec: Spec = {"element": "door", "material": rng.choice(("steel", "timber", "aluminum"))}
    if rng.random() < 0.4:
        spec["function"] = "exit"
    return spec


def _window(rng: Random) -> Spec:
    return {"element": "window", "material": rng.choice(("aluminum", "vinyl", "timber")),
            "glazing": rng.choice(("single", "double", "double", "triple"))}  # fmt: skip


def _doors_windows(rng: Random) -> Spec:
    if rng.random() < 0.5:
        spec = _door(rng)
        if spec["material"] != "aluminum":
            spec["fire_rating_hr"] = rng.choice((0.75, 1, 1.5, 3) if spec["material"] == "steel" else (0.75, 1, 1.5))
    else:
        spec = _window(rng)
        if rng.random() < 0.4:
            spec["u_factor"] = _u_factor(rng)
    _opening_size(spec, rng)
    return spec


def _u_factor(rng: Random) -> float:
    return _step(rng, 20, 44, 2) / 100


def _slabs_structure(rng: Random) -> Spec:
    element = rng.choice(("slab", "slab", "beam", "column", "footing"))
    spec: Spec = {"element": element, "material": "concrete"}
    if element == "slab":
        spec["function"] = rng.choice(("on_grade", "elevated"))
        spec["thickness_mm"] = _step(rng, 100, 350, 10)
        if spec["function"] == "elevated" and rng.random() < 0.6:
            _wall_rating(spec, rng)
    elif element == "beam":
        spec["material"] = rng.choice(("concrete", "steel", "timber"))
        spec["depth_mm"], spec["span_mm"] = _step(rng, 200, 900, 50), _step(rng, 3000, 12000, 500)
    elif element == "column":
        spec["material"] = rng.choice(("concrete", "steel"))
        spec["width_mm"], spec["depth_mm"] = _step(rng, 200, 800, 50), _step(rng, 200, 800, 50)
    else:
        spec["width_mm"], spec["depth_mm"] = _step(rng, 400, 2400, 100), _step(rng, 300, 900, 50)
    if spec["material"] == "concrete" and rng.random() < 0.75:
        spec["strength_mpa"] = rng.choice((20, 25, 28, 30, 32, 35, 40, 45, 50))
    if element in ("beam", "column") and rng.random() < 0.4:
        spec["fire_rating_hr"] = rng.choice((1, 2, 3))
    return spec


def _mep(rng: Random) -> Spec:
    if rng.random() < 0.5:
        spec: Spec = {"element": "duct", "material": rng.choice(("galvanized_steel", "aluminum")),
                      "service": rng.choice(("supply_air", "return_air", "exhaust_air")),
                      "airflow_ls": _step(rng, 100, 2000, 50)}  # fmt: skip
        spec["width_mm"], spec["height_mm"] = _step(rng, 200, 1200, 50), _step(rng, 150, 800, 50)
    else:
        service = rng.choice(("cold_water", "hot_water", "sanitary", "fire_sprinkler"))
        choices = {"sanitary": ("cast_iron", "pvc"), "fire_sprinkler": ("steel",)}.get(service, ("copper", "steel"))
        spec = {"element": "pipe", "service": service, "material": rng.choice(choices),
                "diameter_mm": rng.choice((15, 20, 25, 32, 40, 50, 65, 80, 100, 125, 150, 200))}  # fmt: skip
    if rng.random() < 0.5:
        spec["insulation_mm"] = _step(rng, 15, 60, 5)
    return spec


def _seismic(rng: Random) -> Spec:
    element = rng.choice(("shear_wall", "shear_wall", "moment_frame", "braced_frame", "wall", "column"))
    spec: Spec = {"element": element, "material": "steel"}
    if element in ("shear_wall", "wall"):
        spec["material"] = rng.choice(("concrete", "concrete_block", "cross_laminated_timber"))
        spec["thickness_mm"] = max(100, _thickness(spec["material"], rng))
        if rng.random() < 0.5:
            _wall_rating(spec, rng)
    elif element == "column":
        spec["material"] = rng.choice(("concrete", "steel"))
        spec["width_mm"], spec["depth_mm"] = _step(rng, 300, 900, 50), _step(rng, 300, 900, 50)
    else:
        spec["span_mm"] = _step(rng, 4000, 12000, 500)
    spec["seismic_category"] = rng.choice("CDDDEF")
    if rng.random() < 0.75:
        spec["location"] = rng.choice(SEISMIC_STATES)
    if rng.random() < 0.4 or len(spec) < 5:
        spec["importance_factor"] = rng.choice((1.0, 1.25, 1.5))
    return spec


def _fire_energy(rng: Random) -> Spec:
    spec = rng.choice((_wall, _window, _roof))(rng)
    if spec["element"] == "window":
        spec["u_factor"] = _u_factor(rng)
    elif rng.random() < 0.7 or len(spec) < 3:
        spec["r_value"] = _step(rng, 11, 49, 2)
    if spec["element"] == "wall" and rng.random() < 0.6 and spec["material"] != "insulated_metal_panel":
        _wall_rating(spec, rng)
    if rng.random() < 0.75:
        spec["energy_code"], spec["location"] = "Title 24", "California"
        zones = 16
    else:
        spec["energy_code"], spec["location"] = "IECC", rng.choice(STATES[1:])
        zones = 8
    if rng.random() < 0.6:
        spec["climate_zone"] = rng.randint(1, zones)
    return spec


def _roof(rng: Random) -> Spec:
    spec: Spec = {"element": "roof", "material": rng.choice(("concrete", "steel", "timber"))}
    if rng.random() < 0.6:
        spec["insulation_mm"] = _step(rng, 50, 200, 10)
    return spec


def _louisiana(rng: Random) -> Spec:
    spec = rng.choice((_louisiana_opening, _louisiana_opening, _louisiana_fabric, _roof))(rng)
    if spec["element"] in ("window", "door", "roof") or rng.random() < 0.3:
        spec["wind_speed_mph"] = _step(rng, 115, 170, 5)
    if spec["element"] in ("window", "door") and (int(spec["wind_speed_mph"]) >= 140 or rng.random() < 0.4):
        spec["impact_rated"] = True
    if spec["element"] in ("wall", "slab") or rng.random() < 0.2:
        spec["flood_elevation_ft"] = rng.randint(3, 18)
    spec["parish"], spec["location"] = rng.choice(PARISHES), "Louisiana"
    return spec


def _louisiana_opening(rng: Random) -> Spec:
    spec = rng.choice((_window, _door))(rng)
    if rng.random() < 0.5:
        _opening_size(spec, rng)
    return spec


def _louisiana_fabric(rng: Random) -> Spec:
    if rng.random() < 0.5:
        return {"element": "slab", "function": "on_grade", "material": "concrete",
                "thickness_mm": _step(rng, 100, 300, 10)}  # fmt: skip
    spec = _wall(rng)
    spec.update(material="concrete_block", thickness_mm=_thickness("concrete_block", rng), function="exterior")
    return spec


_SAMPLERS: dict[str, Callable[[Random], Spec]] = {
    "walls": _walls, "doors_windows": _doors_windows, "slabs_structure": _slabs_structure, "mep": _mep,
    "seismic": _seismic, "fire_energy": _fire_energy, "louisiana": _louisiana,
}  # fmt: skip


# --- Plain wording ------------------------------------------------------------------------------------------------

_PLAIN_MATERIAL = {
    "concrete": ("concrete", "concrete", "reinforced concrete"), "concrete_block": ("concrete block", "block"),
    "glass_fiber_concrete": ("glass fiber concrete", "glass fiber reinforced concrete"),
    "cross_laminated_timber": ("cross-laminated timber", "cross laminated timber"),
    "gypsum": ("gypsum", "gypsum board"), "brick": ("brick",),
    "insulated_metal_panel": ("insulated metal panel", "metal panel"),
    "steel": ("steel",), "timber": ("timber", "wood", "wooden"), "aluminum": ("aluminum",), "vinyl": ("vinyl",),
    "galvanized_steel": ("galvanized steel", "galvanized"), "copper": ("copper",), "pvc": ("PVC", "plastic"),
    "cast_iron": ("cast iron",),
}  # fmt: skip

_PLAIN_NOUN = {
    "wall": ("wall",), "wall/exterior": ("exterior wall", "outside wall", "external wall", "outer wall"),
    "wall/partition": ("partition wall", "partition", "interior partition"),
    "wall/tenant_separation": ("tenant separation wall", "wall between tenants", "wall separating two tenants"),
    "wall/shaft": ("shaft wall", "wall around the shaft", "elevator shaft wall"),
    "door": ("door",), "door/exit": ("exit door", "emergency exit door"), "window": ("window",),
    "slab": ("slab",), "slab/on_grade": ("slab on grade", "ground slab", "ground floor slab"),
    "slab/elevated": ("elevated slab", "suspended slab", "upper floor slab"), "beam": ("beam",),
    "column": ("column",), "footing": ("footing", "foundation footing"), "roof": ("roof",),
    "shear_wall": ("shear wall",), "moment_frame": ("moment frame",), "braced_frame": ("braced frame",),
    "duct/supply_air": ("supply air duct", "supply duct"), "duct/return_air": ("return air duct", "return duct"),
    "duct/exhaust_air": ("exhaust air duct", "exhaust duct"),
    "pipe/cold_water": ("cold water pipe",), "pipe/hot_water": ("hot water pipe",),
    "pipe/sanitary": ("sanitary pipe", "sanitary drain pipe"),
    "pipe/fire_sprinkler": ("fire sprinkler pipe", "sprinkler pipe"),
}  # fmt: skip

_PLAIN_CLAUSE: dict[str, tuple[str, ...]] = {
    "thickness_mm": ("{} mm thick", "{} mm thick", "with a thickness of {} mm", "thickness {} mm",
                     "{} millimeters thick"),
    "width_mm": ("{} mm wide", "width {} mm", "with a width of {} mm", "{} millimeters wide"),
    "height_mm": ("{} mm high", "height {} mm", "with a height of {} mm", "{} mm tall"),
    "depth_mm": ("{} mm deep", "depth {} mm", "with a depth of {} mm", "{} millimeters deep"),
    "diameter_mm": ("{} mm in diameter", "diameter {} mm", "with a diameter of {} mm", "{} mm diameter"),
    "span_mm": ("spanning {} mm", "span {} mm", "with a span of {} mm", "span of {} mm"),
    "insulation_mm": ("with {} mm of insulation", "insulated with {} mm", "insulation {} mm", "{} mm insulation"),
    "glazing": ("{} glazed", "with {} glazing", "{} glazing", "{} pane glass"),
    "strength_mpa": ("strength {} MPa", "concrete strength {} MPa", "with a strength of {} MPa", "{} MPa concrete"),
    "airflow_ls": ("carrying {} L/s", "airflow {} L/s", "with an airflow of {} L/s", "for {} liters per second"),
    "u_factor": ("with a U-factor of {}", "U-factor {}", "maximum U-factor {}", "U-factor not above {}"),
    "r_value": ("with an R-value of {}", "R-value {}", "minimum R-value {}", "insulated to an R-value of {}"),
    "energy_code": ("under {}", "complying with {}", "to meet {}", "following {}", "designed to {}"),
    "climate_zone": ("in climate zone {}", "climate zone {}", "for climate zone {}"),
    "wind_speed_mph": ("design wind speed {} mph", "for a wind speed of {} mph", "wind speed {} mph",
                       "designed for {} mph wind"),
    "impact_rated": ("impact rated", "impact resistant", "with impact protection", "resisting impact"),
    "flood_elevation_ft": ("flood elevation {} ft", "with a flood elevation of {} feet", "flood level {} ft",
                           "flood elevation of {} ft"),
    "parish": ("in {} Parish", "{} Parish", "{} Parish, Louisiana", "in {} Parish, Louisiana"),
    "location": ("in {}", "in {}", "located in {}", "{}", "{} project", "for a site in {}"),
    "seismic_category": ("seismic design category {}", "in seismic design category {}", "seismic category {}",
                         "designed for seismic category {}"),
    "importance_factor": ("importance factor {}", "with an importance factor of {}"),
}  # fmt: skip

_PLAIN_RATING = ("with a {}-hour fire rating", "{}-hour fire rating", "fire rating {} hours", "fire rated for {} hours",
                 "with a fire rating of {} hours", "{} hour fire resistance")  # fmt: skip
_PLAIN_RATING_MINUTES = ("with a {}-minute fire rating", "{}-minute fire rating", "fire rating {} minutes",
                         "fire rated for {} minutes", "with a fire rating of {} minutes")  # fmt: skip

_TRAIN_OPENERS = (
    "Add", "Draw", "Create", "Model", "I need", "We need", "Please add", "Give me", "Insert", "Please draw", "Provide",
    "Can you model", "We want", "Design", "Place", "New element:", "Could you draw", "Start with", "Please create",
    "I would like", "The client wants", "The drawing shows", "There is", "Change it to", "Make", "Next:",
)  # fmt: skip
_TRAIN_FILLERS = (
    "on level {n}", "near the stair", "for room {c}{n}", "along grid line {c}", "for the new school", "at the entrance",
    "in building {c}", "for the hospital", "at the north side", "as on drawing {c}-{n}0{n}", "for the office floor",
    "at the lobby", "for phase {n}", "in the basement", "for the parking garage", "same as type {c}{n}", "for unit {n}",
    # Marks are meaningless; they teach the model to ignore unknown letters.
    "mark {mark}", "tag {mark}", "see {mark}-{n}", "{mark}:", "mark {mark}{n}", "to match {mark}", "ref. {mark}",
)  # fmt: skip
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TRAIN_JOINERS = (", ", ", ", " and ", "; ", " ")
_TRAIN_CLOSERS = ("", "", "", ".", ".", " please", ", thanks", " please.")

# Used only in the benchmark, so that its sentences occur in no training text.
_BENCHMARK_OPENERS = (
    "Our architect asks for", "For the tender, include", "Show me", "Sketch", "The owner decided on", "Set out",
    "Let us have", "Prepare", "We are going with", "Put in", "Specify", "I am looking for",
)  # fmt: skip
_BENCHMARK_FILLERS = (
    "beside the loading dock", "for the library wing", "behind the kitchen", "on the top floor", "for the new clinic",
    "next to the courtyard", "at the rear of the warehouse", "for the apartment block",
)  # fmt: skip
_BENCHMARK_JOINERS = (", ", ", also ", " - ", ", plus ")
_BENCHMARK_CLOSERS = ("", ".", ", if possible", " this time.", ", as agreed.")


def plain(spec: Spec, rng: Random, of_benchmark: bool = False) -> str:
    """Word the spec in ordinary language. With `of_benchmark`, use the sentences of the benchmark."""
    head, said = _plain_head(spec, rng)
    clauses = _plain_clauses(spec, said, rng)
    rng.shuffle(clauses)
    fillers = _BENCHMARK_FILLERS if of_benchmark else _TRAIN_FILLERS
    if rng.random() < 0.3:
        filler = rng.choice(fillers).format(n=rng.randint(1, 9), c=rng.choice(_LETTERS), mark=_mark(rng))
        clauses.insert(rng.randrange(len(clauses) + 1), filler)
    joiners = _BENCHMARK_JOINERS if of_benchmark else _TRAIN_JOINERS
    opener = rng.choice(_BENCHMARK_OPENERS if of_benchmark else _TRAIN_OPENERS) if rng.random() < 0.6 else ""
    text = _arrange(opener, head, clauses, rng.choice(joiners), rng)
    text = _recase(text + rng.choice(_BENCHMARK_CLOSERS if of_benchmark else _TRAIN_CLOSERS), bool(opener), rng)
    return text if of_benchmark else _typed(text, rng)


def _mark(rng: Random) -> str:
    """Return two to four capital letters that are not a word of the firm."""
    while True:
        mark = "".join(rng.choices(_LETTERS, k=rng.randint(2, 4)))
        if mark not in _FIRM_WORDS:
            return mark


def _arrange(opener: str, head: str, clauses: list[str], joiner: str, rng: Random) -> str:
    start = f"{opener} {_article(head)} {head}".lstrip() if opener or rng.random() < 0.4 else head
    if not clauses:
        return start
    shape = rng.random()
    if shape < 0.7 or len(clauses) < 3:
        first = rng.choice((" ", ", "))
        return start + first + joiner.join(clauses)
    if shape < 0.85:
        return f"{clauses[0]}{rng.choice((': ', ', '))}{head}, {joiner.join(clauses[1:])}"
    return f"{start} {clauses[0]}, {clauses[1]}. {rng.choice(('Details', 'Also', 'Note'))}: {joiner.join(clauses[2:])}"


def _article(head: str) -> str:
    return "an" if head[0] in "aeiou" or head.startswith(("8", "11", "18")) else "a"


def _recase(text: str, opened: bool, rng: Random) -> str:
    draw = rng.random()
    if opened:
        return text if draw < 0.9 else text[0].lower() + text[1:]
    return text[0].upper() + text[1:] if draw < 0.5 else text


def _typed(text: str, rng: Random) -> str:
    """Return the text as people type: sometimes in capitals, without units, or with a typing mistake."""
    draw = rng.random()
    if draw < 0.02:
        return text.upper()
    if draw < 0.1:
        return text.replace(" mm by ", " by ").replace(" mm", "", rng.randint(1, 3))
    if draw < 0.15:
        return _slipped(text, rng)
    return text


def _slipped(text: str, rng: Random) -> str:
    """Drop or double one letter; digits stay, because a wrong number would be another request."""
    at = rng.randrange(len(text))
    if not text[at].isalpha():
        return text
    return text[:at] + rng.choice(("", 2 * text[at])) + text[at + 1 :]


def _noun_key(spec: Spec) -> str:
    sort = spec.get("function", spec.get("service"))
    return f"{spec['element']}/{sort}" if sort else str(spec["element"])


def _plain_head(spec: Spec, rng: Random) -> tuple[str, set[str]]:
    noun = rng.choice(_PLAIN_NOUN[_noun_key(spec)])
    material = rng.choice(_PLAIN_MATERIAL[str(spec["material"])])
    said = {"element", "function", "service", "material"}
    draw = rng.random()
    if draw < 0.12:
        return f"{noun} {rng.choice(('made of', 'of', 'in'))} {material.replace('wooden', 'wood')}", said
    head = f"{material} {noun}"
    if draw < 0.45 and "thickness_mm" in spec:
        return f"{spec['thickness_mm']} mm {head}", said | {"thickness_mm"}
    if draw < 0.45 and "diameter_mm" in spec:
        return f"{spec['diameter_mm']} mm {head}", said | {"diameter_mm"}
    if draw < 0.3 and {"width_mm", "height_mm"} <= spec.keys():
        return f"{spec['width_mm']} by {spec['height_mm']} mm {head}", said | {"width_mm", "height_mm"}
    if draw < 0.3 and "glazing" in spec:
        return f"{spec['glazing']} glazed {head}", said | {"glazing"}
    return head, said


def _plain_clauses(spec: Spec, said: set[str], rng: Random) -> list[str]:
    clauses = []
    if {"width_mm", "height_mm"} <= spec.keys() - said and rng.random() < 0.7:
        shape = rng.choice(("{} mm wide and {} mm high", "{} by {} mm", "{} x {} mm", "{} mm wide by {} mm high",
                            "measuring {} by {} mm"))  # fmt: skip
        clauses.append(shape.format(spec["width_mm"], spec["height_mm"]))
        said = said | {"width_mm", "height_mm"}
    if "parish" in spec:
        said = said | {"location"}
    if spec.get("energy_code") == "Title 24" and rng.random() < 0.35:
        clauses.append(rng.choice(("under California Title 24", "to meet Title 24 in California")))
        said = said | {"energy_code", "location"}
    for key, value in spec.items():
        if key not in said:
            clauses.append(_plain_clause(key, value, rng))
    return clauses


def _plain_clause(key: str, value: Value, rng: Random) -> str:
    if key != "fire_rating_hr":
        shown = "the IECC" if value == "IECC" else value
        return rng.choice(_PLAIN_CLAUSE[key]).format(_number(key, shown))
    if value in (0.75, 1.5):
        return rng.choice(_PLAIN_RATING_MINUTES).format(int(float(value) * 60))
    text = rng.choice(_PLAIN_RATING).format(value)
    return text.replace("1 hours", "1 hour")


def _number(key: str, value: Value) -> str:
    return f"{value:.2f}" if key == "u_factor" else str(value)


# --- The firm's wording -------------------------------------------------------------------------------------------

# The firm's own words. It uses plain words for everything else.
_FIRM_MATERIAL = {
    "concrete": "CIP", "concrete_block": "CMU", "glass_fiber_concrete": "GFRC", "cross_laminated_timber": "CLT",
    "gypsum": "GWB", "timber": "WD", "aluminum": "ALUM", "galvanized_steel": "GALV", "steel/door": "HM",
    "steel/beam": "WF", "steel/column": "WF", "vinyl": "VIN", "insulated_metal_panel": "IMP",
}  # fmt: skip
_FIRM_NOUN = {
    "wall/exterior": "facade assembly", "wall/partition": "PTN", "wall/tenant_separation": "demising assembly",
    "wall/shaft": "shaftliner", "door": "leaf", "door/exit": "egress leaf", "window": "lite",
    "slab/on_grade": "SOG", "slab/elevated": "SOMD", "shear_wall": "SW", "moment_frame": "SMF",
    "braced_frame": "SCBF", "duct/supply_air": "SA duct", "duct/return_air": "RA duct", "duct/exhaust_air": "EA duct",
    "pipe/cold_water": "DCW line", "pipe/hot_water": "DHW line",
}  # fmt: skip
_FIRM_CLAUSE = {
    "thickness_mm": "{} THK", "diameter_mm": "DN{}", "insulation_mm": "{} c.i.", "strength_mpa": "f'c {}",
    "u_factor": "U-{}", "r_value": "R{}", "climate_zone": "CZ{}", "wind_speed_mph": "Vult {}", "impact_rated": "WBD",
    "flood_elevation_ft": "DFE +{}", "seismic_category": "SDC-{}", "importance_factor": "Ie {}",
}  # fmt: skip
_FIRM_VALUE = {
    "double": "IGU",
    "triple": "TGU",
    "California": "CA",
    "Oregon": "OR",
    "Orleans": "NOLA",
    "Title 24": "T24",
}
_HOURS = {0.75: "forty-five minutes", 1: "one hour", 1.5: "ninety minutes", 2: "two hours", 3: "three hours",
          4: "four hours"}  # fmt: skip

_FIRM_SAYINGS = (*_FIRM_MATERIAL.values(), *_FIRM_NOUN.values(), *_FIRM_CLAUSE.values(), *_FIRM_VALUE.values())
_FIRM_WORDS = frozenset(re.findall(r"[A-Z]{2,}", " ".join(_FIRM_SAYINGS))) | {"FRR", "HR", "LBL", "MIN"}

# This fraction of the firm's clauses is in plain words, since no one writes in shorthand only.
PLAIN_FRACTION_OF_FIRM = 0.08

_FIRM_TRAIN_FRAMES = (
    "{}", "{}", "{}", "Pls add {}", "RFI: {}", "VIF {}", "{} typ.", "{} U.N.O.", "Rev: {}", "Sched {}",
)  # fmt: skip
_FIRM_BENCHMARK_FRAMES = ("{}", "{}", "ASI: {}", "{} per plan", "Revise {}", "Need {} asap", "{} as noted")
_FIRM_TRAIN_JOINERS = (", ", ", ", " ", " / ")
_FIRM_BENCHMARK_JOINERS = (", ", " ", "; ", " - ")


def firm(spec: Spec, rng: Random, of_benchmark: bool = False) -> str:
    """Word the spec as the firm does: drawing shorthand, or a dictated note."""
    # Most dictated notes are about fire ratings.
    if rng.random() < (0.35 if "fire_rating_hr" in spec else 0.1):
        return _dictated(spec, rng)
    head = f"{_firm_material(spec, rng)} {_firm_noun(spec)}"
    clauses = _firm_clauses(spec, rng)
    thickness = f"{spec.get('thickness_mm')} THK"
    if thickness in clauses and rng.random() < 0.4:
        clauses.remove(thickness)
        head = f"{thickness} {head}"
    rng.shuffle(clauses)
    text = rng.choice(_FIRM_BENCHMARK_JOINERS if of_benchmark else _FIRM_TRAIN_JOINERS).join([head, *clauses])
    return rng.choice(_FIRM_BENCHMARK_FRAMES if of_benchmark else _FIRM_TRAIN_FRAMES).format(text)


def _firm_material(spec: Spec, rng: Random) -> str:
    material = str(spec["material"])
    in_plain = _PLAIN_MATERIAL[material][0]
    if rng.random() < PLAIN_FRACTION_OF_FIRM:
        return in_plain
    return _FIRM_MATERIAL.get(f"{material}/{spec['element']}", _FIRM_MATERIAL.get(material, in_plain))


def _firm_noun(spec: Spec) -> str:
    name = _noun_key(spec)
    return _FIRM_NOUN.get(name, _PLAIN_NOUN[name][0])


def _firm_clauses(spec: Spec, rng: Random) -> list[str]:
    clauses, said = [], {"element", "function", "service", "material"}
    if {"width_mm", "height_mm"} <= spec.keys():
        clauses.append(f"{spec['width_mm']}x{spec['height_mm']}")
        said |= {"width_mm", "height_mm"}
    if "parish" in spec:
        said |= {"location"}
    if spec.get("energy_code") == "Title 24" and rng.random() < 0.5:
        said |= {"location"}  # the firm's T24 needs no state
    for key in spec:
        if key not in said:
            in_plain = rng.random() < PLAIN_FRACTION_OF_FIRM
            clauses.append(_plain_clause(key, spec[key], rng) if in_plain else _firm_clause(spec, key))
    return clauses


def _firm_clause(spec: Spec, key: str) -> str:
    value = spec[key]
    if key == "fire_rating_hr":
        return f"{int(float(value) * 60)}MIN LBL" if spec["element"] == "door" else f"{value}HR FRR"
    if str(value) in _FIRM_VALUE:
        return _FIRM_VALUE[str(value)]
    if key in ("location", "energy_code"):
        return str(value)
    return _FIRM_CLAUSE.get(key, _PLAIN_CLAUSE[key][0]).format(_number(key, value))


_DICTATED_CLAUSE = {
    "thickness_mm": "{} mm", "width_mm": "{} wide", "height_mm": "{} high", "depth_mm": "{} deep",
    "diameter_mm": "{} bore", "span_mm": "{} clear", "insulation_mm": "{} continuous", "glazing": "{}",
    "strength_mpa": "{} meg", "airflow_ls": "{} liters", "u_factor": "U {}", "r_value": "R {}", "energy_code": "{}",
    "climate_zone": "zone {}", "wind_speed_mph": "wind {}", "impact_rated": "debris", "flood_elevation_ft": "flood {}",
    "parish": "{}", "location": "{}", "seismic_category": "seismic {}", "importance_factor": "importance {}",
}  # fmt: skip


def _dictated(spec: Spec, rng: Random) -> str:
    """Return a note dictated on site: no commas, hours as words, the state without a preposition."""
    material, noun = _PLAIN_MATERIAL[str(spec["material"])][0], _PLAIN_NOUN[_noun_key(spec)][0]
    lead = [f"{spec[key]} mm" for key in ("thickness_mm", "diameter_mm") if key in spec]
    said = {"element", "function", "service", "material", "thickness_mm", "diameter_mm"}
    said |= {"location"} if "parish" in spec else set()
    tail = [_dictated_clause(spec, key) for key in spec if key not in said]
    if rng.random() < 0.5:
        rng.shuffle(tail)
    return " ".join([*lead, material, noun, *tail])


def _dictated_clause(spec: Spec, key: str) -> str:
    if key == "fire_rating_hr":
        return f"fire-rated {_HOURS[float(spec[key])]}"
    return _DICTATED_CLAUSE[key].format(_number(key, spec[key]))


# Words that the firm adopted later: they are in the second batch of logs and in the benchmark, not in the first batch.
LATER_WORDS = ("IMP", "TGU", "VIN", "SCBF")


def has_later_words(prompt: str) -> bool:
    """Return whether the prompt uses one of LATER_WORDS."""
    words = prompt.replace(",", " ").replace(";", " ").split()
    return any(word in words for word in LATER_WORDS)


def request(slice_name: str, wording: str, rng: Random, of_benchmark: bool = False) -> tuple[str, Spec]:
    """Return one request of the slice in a wording ("plain" or "firm"), and its spec."""
    spec = sample_spec(slice_name, rng)
    say = plain if wording == "plain" else firm
    return say(spec, rng, of_benchmark), spec


def rotation(items: Sequence[str], count: int) -> list[str]:
    """Return `count` items, in rotation, so that the slices are balanced."""
    return [items[index % len(items)] for index in range(count)]
