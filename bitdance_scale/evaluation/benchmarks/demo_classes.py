"""The classes of the demo, a colour and a shape each, for class-conditional models that were trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitdance_scale.demo.scenes import class_names as class_names_of_demo
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Settings
from bitdance_scale.evaluation.benchmarks.demo_scenes import DemoBenchmark
from bitdance_scale.evaluation.benchmarks.prompt import Prompt


@dataclass(frozen=True)
class DemoClasses(DemoBenchmark):
    """A prompt for every class: its text is the number of the class, its category the shape."""

    condition = "class"
    name = "demo-classes"
    settings = Settings(
        (32, 32), 20, 2.0, "those that the demo's results were drawn with: docs/results/class_conditional"
    )

    def of_model(self, num_classes: int, class_names: Sequence[str]) -> DemoClasses:
        """The benchmark, for a model with as many classes.

        Raises:
            ConfigError: the model has other classes.
        """
        names = class_names or class_names_of_demo()
        if num_classes != len(class_names_of_demo()) or tuple(names) != tuple(class_names_of_demo()):
            raise ConfigError(
                f"{self.name}: the model has {num_classes} classes that are not the {len(class_names_of_demo())} of "
                "the demo; draw imagenet, which takes the classes of any model"
            )
        return self

    def prompts(self) -> list[Prompt]:
        """The classes in the order of their numbers; the record has the name of the class."""
        return [
            Prompt(f"{number:05d}", str(number), name.split()[1], self.num_images, {"class": name})
            for number, name in enumerate(class_names_of_demo())
        ]
