"""A recipe as a job on a cluster: what each stage needs, and the files that ask for it.

`values.py`: what a recipe can't know of a cluster, typed. `demand.py`: machines of a stage, from
recipe and values. `pods.py`, `kuberay.py`, `shared.py`, `kustomize.py`, `kueue.py`: Kubernetes.
`render.py`: a target's files. `submission.py`, `package.py`, `fit.py`: a job for a cluster that is
there, what it takes along, and whether there is room; `arrival.py` goes along with it.

Every number comes from the recipe or the values, once: world size, GPU requests and replicas can't
disagree. Nothing is started here and Ray isn't imported. May import what stands below `runtime`.
"""
