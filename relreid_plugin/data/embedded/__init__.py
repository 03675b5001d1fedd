"""The embedded data sets: rendered by the package, deterministic by seed.

``ensure_embedded("embedded_persons", root)`` writes persons in the layout of Market-1501 on first use and returns their
folder; ``ensure_embedded_vehicles("embedded_vehicles", root)`` does so for vehicles in three bands, in the layout of
RGBNT100.
"""

from __future__ import annotations

from .dataset import (
    GENERATOR_VERSION,
    MARKET_FOLDER,
    SPECS,
    EmbeddedPersonsSpec,
    ensure_embedded,
    ensure_embedded_persons,
    plan_embedded_persons,
)
from .render import render_person
from .sheet import contact_sheet
from .traits import CAMERAS, Camera, Identity, Shot, sample_identity, sample_shot
from .vehicle_render import Vehicle, VehicleShot, render_vehicle
from .vehicles import (
    VEHICLE_GENERATOR_VERSION,
    VEHICLE_SPECS,
    EmbeddedVehiclesSpec,
    ensure_embedded_vehicles,
    plan_embedded_vehicles,
    sample_vehicle_shot,
    vehicle_table,
    vehicles_sheet,
    write_embedded_vehicles,
)

__all__ = [
    "CAMERAS",
    "GENERATOR_VERSION",
    "MARKET_FOLDER",
    "SPECS",
    "VEHICLE_GENERATOR_VERSION",
    "VEHICLE_SPECS",
    "Camera",
    "EmbeddedPersonsSpec",
    "EmbeddedVehiclesSpec",
    "Identity",
    "Shot",
    "Vehicle",
    "VehicleShot",
    "contact_sheet",
    "ensure_embedded",
    "ensure_embedded_persons",
    "ensure_embedded_vehicles",
    "plan_embedded_persons",
    "plan_embedded_vehicles",
    "render_person",
    "render_vehicle",
    "sample_identity",
    "sample_shot",
    "sample_vehicle_shot",
    "vehicle_table",
    "vehicles_sheet",
    "write_embedded_vehicles",
]
