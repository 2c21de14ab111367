"""The lab's controls, as a table. To add one, add its row here; a setting's row in ``settings`` makes it act."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ipywidgets as widgets

from helpers.engine.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from helpers.live.lab import Lab

_PACES = {"1 epoch a second": 1.0, "5 epochs a second": 5.0, "25 epochs a second": 25.0, "as fast as it goes": 0.0}
_RATES = [float(f"{digit}e{power}") for power in range(-4, 1) for digit in (1, 1.5, 2, 3, 5, 7)] + [10.0]
_AXES = {"examples seen": "examples_seen", "steps": "steps", "seconds": "seconds"}
_WIDE = {"style": {"description_width": "92px"}, "layout": {"width": "285px", "max_width": "98%"}}


@dataclass(frozen=True)
class Control:
    """One control, which the lab has as its attribute ``name``.

    row, label, kind: where it stands, and which widget it is. small: whether a small lab has it too.
    traits: lab → the widget's traits. follows: set them anew whenever training starts over.
    act: called with the lab when the control is pressed or moved.
    """

    name: str
    row: int
    label: str
    kind: type[widgets.DOMWidget]
    traits: Callable[[Lab], dict[str, object]]
    act: Callable[[Lab], None]
    small: bool = False
    follows: bool = False


def _button(name: str, icon: str, tooltip: str, act: Callable[[Lab], None] | None = None) -> Control:
    """A button that calls the session's method of its name, or ``act``."""
    traits = {"icon": icon, "tooltip": tooltip, "layout": {"width": "96px"}}
    act = act or (lambda lab: lab.by_hand(name))
    return Control(name, 0, name.capitalize(), widgets.Button, lambda _: traits, act, small=True)


def setting(name: str, row: int, label: str, kind: type[widgets.DOMWidget], traits: Callable, small=False) -> Control:
    """A control of a setting. traits: (lab, the setting's value) → the widget's traits."""
    return Control(name, row, label, kind, lambda lab: traits(lab, lab.session.settings[name]) | _WIDE,
                   lambda lab: lab.by_hand("move", name, getattr(lab, name).value), small, follows=True)  # fmt: skip


def _sizes(lab: Lab, wanted: int) -> dict[str, object]:
    """Batch sizes to choose from: powers of two, those in use or asked for, and the full batch."""
    session, full = lab.session, lab.session.dataset.num_train
    sizes = {*(2**k for k in range(full.bit_length())), *lab.sizes_asked, session.settings["batch_size"], wanted}
    options = (*((f"{size:,}", size) for size in sorted(sizes) if size < full), (f"full ({full:,})", full))
    return {"options": options, "value": min(wanted, full)}


def _pinned(lab: Lab) -> dict[str, object]:
    shown = getattr(lab, "pinned_batch_size", None)
    wanted = lab.session.pinned_batch_size or (shown.value if shown else 64)
    return _sizes(lab, wanted) | {"disabled": not lab.pin.value} | _WIDE


def _paces(lab: Lab) -> dict[str, object]:
    own = lab.session.epochs_per_second
    paces = _PACES if own in _PACES.values() else {f"{own:g} epochs a second": own} | _PACES
    return {"options": paces, "value": own} | _WIDE


CONTROLS = (
    _button("play", "play", "Train"),
    _button("pause", "pause", "Stop after this step"),
    _button("step", "step-forward", "One update of the weights"),
    _button("reset", "refresh", "Start over: same initial weights, same order of examples; this run turns grey"),
    Control("pin", 0, "Pin a second run", widgets.ToggleButton, lambda _: {
        "icon": "thumb-tack", "tooltip": "From here on, a second run with its own batch size, fed the same examples"},
            lambda lab: lab.pin_run()),
    _button("export", "download", "Figure, history and code of this session", lambda lab: lab.show_export()),
    setting("batch_size", 1, "batch size", widgets.SelectionSlider, _sizes, small=True),
    # Not a FloatLogSlider: a browser rounds its value to the next step and sends that back unasked.
    setting("lr", 1, "learning rate", widgets.SelectionSlider, lambda _, lr: {
        "options": tuple((f"{rate:g}", rate) for rate in sorted({*_RATES, lr})), "value": lr}, small=True),
    setting("momentum", 1, "momentum", widgets.FloatSlider, lambda lab, value: {
        "min": 0, "max": max(0.99, value), "step": 0.01, "value": value,
        "disabled": lab.session.settings["optimizer"] != "sgd"}),
    Control("pinned_batch_size", 2, "pinned batch", widgets.SelectionSlider, _pinned, lambda lab: lab.pin_run(),
            follows=True),
    Control("pace", 2, "pace", widgets.Dropdown, _paces,
            lambda lab: lab.session.move("epochs_per_second", lab.pace.value)),
    Control("axis", 2, "x-axis", widgets.Dropdown, lambda _: {"options": _AXES, "value": "examples_seen"} | _WIDE,
            lambda lab: lab.draw(), small=True),
    setting("optimizer", 3, "optimizer", widgets.Dropdown, lambda _, value: {"options": OPTIMIZERS, "value": value}),
    setting("problem", 3, "problem", widgets.Dropdown, lambda lab, value: {
        "options": tuple(lab.session.problems), "value": value}),
)  # fmt: skip


def build(lab: Lab, small: bool) -> list[widgets.HBox]:
    """Make the controls as attributes of the lab, and return its rows of them."""
    rows: dict[int, list[widgets.DOMWidget]] = {}
    for control in CONTROLS:
        widget = control.kind(description=control.label, **control.traits(lab))
        setattr(lab, control.name, widget)
        if control.kind is widgets.Button:
            widget.on_click(lambda _, act=control.act: act(lab))
        else:
            widget.observe(lambda _, act=control.act: None if lab.following else act(lab), "value")
        if control.small or not small:
            rows.setdefault(control.row, []).append(widget)
    return [widgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows.values()]


def follow(lab: Lab) -> None:
    """Show the settings with which training has started over."""
    lab.builds, lab.following = lab.session.builds, True
    try:
        for control in CONTROLS:
            for name, value in control.traits(lab).items() if control.follows else ():
                if name not in _WIDE and getattr(getattr(lab, control.name), name) != value:
                    setattr(getattr(lab, control.name), name, value)
    finally:
        lab.following = False
