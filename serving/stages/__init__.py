"""The two stages of an edit, MLLM and diffusion, as plain classes. Know no Ray and no HTTP.

health.py       proof that a model works
autoscaling.py  how many replicas the work needs
model_pool.py   bundles loaded on demand
batcher.py      greedy batching around one worker thread
messages.py     what the stages are asked and answer
packing.py      conditions as records that travel without torch
base.py         what both stages have in common
mllm.py         photo and words -> condition
diffusion.py    condition -> pixels, in the engine
"""
