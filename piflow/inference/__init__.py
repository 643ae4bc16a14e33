"""Few-step students as diffusers pipelines, one a family; each call is the family's own.

pipe = PiFluxPipeline.from_pretrained(base, adapter="…", torch_dtype=torch.bfloat16)
image = pipe("a red heart").images[0]
pipe = load("models:/NAME@champion")    # from MLflow's registry

May import the data and what stands below it.
"""

from piflow.inference.dit import PiDiTPipeline
from piflow.inference.flux import PiFluxPipeline
from piflow.inference.flux2 import PiFlux2Pipeline
from piflow.inference.flux2_klein import PiFlux2KleinPipeline
from piflow.inference.flux_kontext import PiFluxKontextPipeline
from piflow.inference.qwen_image import PiQwenImagePipeline
from piflow.inference.qwen_image_edit import PiQwenImageEditPipeline
from piflow.inference.registered import load
from piflow.inference.sd3 import PiSD3Pipeline
from piflow.inference.wan import PiWanPipeline
from piflow.inference.z_image import PiZImagePipeline

__all__ = [
    "PiDiTPipeline",
    "PiFlux2KleinPipeline",
    "PiFlux2Pipeline",
    "PiFluxKontextPipeline",
    "PiFluxPipeline",
    "PiQwenImageEditPipeline",
    "PiQwenImagePipeline",
    "PiSD3Pipeline",
    "PiWanPipeline",
    "PiZImagePipeline",
    "load",
]
