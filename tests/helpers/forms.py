"""The form of the graphs of every target and precision."""

from vae_export.rewrites.form import Form
from vae_export.targets import TARGETS, target_named

#: (target, precision) -> the form of its graphs
FORMS: dict[tuple[str, str], Form] = {
    (name, precision): form for name in TARGETS for precision, form in target_named(name).forms.items()
}
