"""Measure a machine with an NVIDIA GPU: one bundle built anywhere, one run there, one report.

python -m bench.gpu bundle --out build/gpu-bundle       # here; no GPU is needed
sh build/gpu-bundle/run.sh OUT                          # there; no network is needed
python -m bench.gpu report OUT/gpu.json --out build/gpu-report
python -m bench.gpu tensorrt                            # there, with TensorRT installed
"""
