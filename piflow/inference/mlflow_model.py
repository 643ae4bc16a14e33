"""What MLflow runs to make a registered student a Python model; a copy lies in the model.

model = mlflow.pyfunc.load_model("models:/NAME@champion", model_config={"base": "s3://…"})
png, = model.predict(["a red heart"], params={"seed": 0})

`base`, `encoder`, `allowed` and `device` are as of `piflow.inference.served.ServedStudent`; the
model's own config allows the URIs that the recipe named.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from piflow.inference.served import ServedStudent


class StudentModel(PythonModel):
    """One column of prompts -> PNG files' bytes."""

    def load_context(self, context: PythonModelContext) -> None:
        self.student = ServedStudent(context.artifacts["adapter"], **(context.model_config or {}))

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,  # of another type MLflow would make a schema, beside ours
        params: dict[str, Any] | None = None,
    ) -> list[bytes]:
        prompts = [str(prompt) for prompt in model_input.iloc[:, 0]]
        return self.student.pictures(prompts, **(params or {}))


set_model(StudentModel())
