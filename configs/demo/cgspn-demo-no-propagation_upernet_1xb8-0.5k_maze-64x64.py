# The same with the propagation taken out: the state restarts at every line, so that nothing passes
# from one to the next. Parameters and computation stay what they are.
_base_ = "./cgspn-demo_upernet_1xb8-0.5k_maze-64x64.py"
model = dict(backbone=dict(mixer=dict(type="cgspn", segment_length=1)))
