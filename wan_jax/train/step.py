"""One step of training, whatever is trained: gradients in micro-batches, float32 masters, a moving average of them.

A `Task` says what is trained. Its parameters are flat, ``network.path -> array``: those that train live in the `State`
as float32 masters and are cast to the dtype of their network in every step; the frozen ones are held in that dtype.
All chance comes from the state's key and the number of the step, so a step can be repeated exactly.

Axes: ``B`` samples of a step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wan_jax.checkpoint import flatten_params, unflatten_like
from wan_jax.errors import InputError
from wan_jax.parallel import constrain, param_sharding, replicated

Array = jax.Array
Flat = dict[str, Array]

EMA_START = 10  # the average follows faster at first: its decay is at most (1 + step) / (EMA_START + step)


@dataclass(frozen=True)
class Recipe:
    """How the parameters move. Adam's constants beside `b2` are those of the paper."""

    steps: int
    batch: int = 16  # samples of a step
    accumulate: int = 1  # micro-batches that these are computed in
    optimizer: str = "adamw"  # or "muon": matrices by their momentum, made orthogonal; the rest by AdamW
    learning_rate: float = 1e-3
    warmup: int = 100  # steps from zero to the learning rate
    last: float = 0.03  # share of the learning rate at the end of the cosine
    b2: float = 0.98
    weight_decay: float = 0.01  # of matrices and tables
    clip: float = 1.0  # global norm of the gradient
    ema: float = 0.999
    remat: bool = False  # recompute blocks in the backward pass
    steps_per_call: int = 1  # of one program: small steps on a GPU are shorter than their launches
    seed: int = 0

    def __post_init__(self):
        if self.optimizer not in (known := ("adamw", "muon")):
            raise InputError(f"optimizer={self.optimizer!r}: use {' or '.join(known)}")
        if self.batch % self.accumulate:
            raise InputError(f"batch={self.batch}: need a multiple of accumulate={self.accumulate}")
        if self.steps % self.steps_per_call:
            near = -(-self.steps // self.steps_per_call) * self.steps_per_call
            raise InputError(f"steps={self.steps}: need a multiple of steps_per_call={self.steps_per_call}, try {near}")


class Task(NamedTuple):
    """What is trained, as pure functions.

    networks: name (a key of `wan_jax.parallel.RULES`) -> abstract module, in the dtypes that it computes in.
    draw: ``(shared, own, key) -> examples``, a pytree of arrays [B, ...]: all that is random in a step. ``shared``
        serves every step, ``own`` this one.
    loss: ``(networks, examples) -> losses, parts``: [B] float32, and a dictionary of more of that shape to report.
    """

    networks: dict[str, Any]
    draw: Callable[[Any, Any, Array], Any]
    loss: Callable[[dict[str, Any], Any], tuple[Array, dict[str, Array]]]


class State(NamedTuple):
    """All that training changes. It is donated to the step: use the returned one."""

    step: Array  # int32, steps done
    key: Array  # uint32, key data of the run
    params: Flat  # float32
    ema: Flat
    optimizer: Any


def split(networks: Mapping[str, Any], trains: Callable[[str], bool] = lambda path: True) -> tuple[Flat, Flat]:
    """Parameters that train, in float32, and the others as they are. ``trains`` takes ``network.path``."""
    flat = flatten_params(dict(networks))
    chosen = {path: jnp.asarray(x, jnp.float32) for path, x in flat.items() if trains(path)}
    if not chosen:
        raise InputError("no parameter of these networks trains: check what is to be trained")
    return chosen, {path: x for path, x in flat.items() if path not in chosen}


def assemble(task: Task, *parts: Flat) -> dict[str, Any]:
    """The networks of a task out of flat parameters, each cast to the dtype that its network computes in."""
    dtypes = {path: leaf.dtype for path, leaf in flatten_params(task.networks).items()}
    flat = {path: x.astype(dtypes[path]) for part in parts for path, x in part.items()}
    return unflatten_like(task.networks, flat)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    peak, warmup = recipe.learning_rate, min(recipe.warmup, recipe.steps - 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, recipe.steps, recipe.last * peak)

    def decays(params: Flat) -> dict[str, bool]:
        return {path: path.endswith((".kernel", ".embedding")) for path in params}

    if recipe.optimizer == "adamw":
        update = optax.adamw(rate, b2=recipe.b2, weight_decay=recipe.weight_decay, mask=decays)
    else:
        update = optax.contrib.muon(
            rate, weight_decay=recipe.weight_decay, weight_decay_mask=decays, adam_b2=recipe.b2,
            muon_weight_dimension_numbers=_matrices, consistent_rms=0.2,  # as large as Adam's: one rate serves both
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(recipe.clip), update)


def _matrices(params: Flat) -> dict[str, Any]:
    """Which axes of a kernel are its rows: all but the last, and but the first of a stack of layers."""

    def of(path: str, x: Any) -> Any:
        stacked = any(re.search(rf"\.{name}\.(?!\d)", path) for name in ("blocks", "layers", "transformer"))
        rows = tuple(range(stacked, getattr(x, "ndim", 0) - 1))
        return optax.contrib.MuonDimensionNumbers(rows, x.ndim - 1) if path.endswith(".kernel") and rows else None

    return {path: of(path, x) for path, x in params.items()}


def start(recipe: Recipe, params: Flat) -> State:
    """The state before the first step. Every entry is a buffer of its own, so that the state can be donated."""

    def copy() -> Flat:
        return {path: jnp.array(x, copy=True) for path, x in params.items()}

    key = jax.random.key_data(jax.random.key(recipe.seed))
    return State(jnp.zeros((), jnp.int32), key, copy(), copy(), make_optimizer(recipe).init(params))


def place(state: State, mesh: jax.sharding.Mesh | None) -> State:
    """The state on a mesh: masters, average and Adam's moments lie like the parameters of their network."""
    if mesh is None:
        return state
    return jax.device_put(state, shardings(state, mesh))


def shardings(state: State, mesh: jax.sharding.Mesh) -> State:
    """Where every array of a state, concrete or abstract, lies."""

    def of(keys: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        path = getattr(keys[-1], "key", None)  # parameters and moments are dictionaries by path, nothing else is
        return param_sharding(*path.split(".", 1), leaf.shape, mesh) if path in state.params else replicated(mesh)

    return jax.tree_util.tree_map_with_path(of, state)


def place_frozen(frozen: Flat, mesh: jax.sharding.Mesh | None) -> Flat:
    if mesh is None:
        return frozen
    return {path: jax.device_put(x, param_sharding(*path.split(".", 1), x.shape, mesh)) for path, x in frozen.items()}


def gradient(task: Task, recipe: Recipe, params: Flat, frozen: Flat, examples: Any) -> tuple[Flat, dict[str, Array]]:
    """Mean gradient over the examples, and the mean of every loss."""

    def loss(params: Flat, examples: Any) -> tuple[Array, dict[str, Array]]:
        losses, parts = task.loss(assemble(task, params, frozen), examples)
        means = {name: x.mean() for name, x in parts.items()}
        return losses.mean(), means | {"loss": losses.mean()}

    def one(examples: Any) -> tuple[Flat, dict[str, Array]]:
        return jax.grad(loss, has_aux=True)(params, jax.tree.map(_spread, examples))

    if recipe.accumulate == 1:
        return one(examples)
    parts = jax.tree.map(lambda x: x.reshape(recipe.accumulate, -1, *x.shape[1:]), examples)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(part)), None

    like = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    # XLA:CPU runs the convolutions inside a loop on one thread and without its fast kernels: 60 times as long.
    total, _ = jax.lax.scan(add, zeros, parts, unroll=jax.default_backend() == "cpu")
    return jax.tree.map(lambda x: x / recipe.accumulate, total)


def take_step(
    task: Task, recipe: Recipe, state: State, frozen: Flat, shared: Any, own: Any
) -> tuple[State, dict[str, Array]]:
    """One step (pure). Returns the state and the means of the step: the losses, and the gradient's norm."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    gradients, means = gradient(task, recipe, state.params, frozen, task.draw(shared, own, key))
    updates, optimizer = make_optimizer(recipe).update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(recipe.ema, (1 + state.step) / (EMA_START + state.step))
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    means["gradient"] = optax.tree.norm(gradients)
    return State(state.step + 1, state.key, params, ema, optimizer), means


def make_step(
    task: Task, recipe: Recipe, state: State, mesh: jax.sharding.Mesh | None = None
) -> Callable[[State, Flat, Any, Any], tuple[State, dict[str, Array]]]:
    """The compiled step: ``(state, frozen, shared, own) -> state, means``, ``recipe.steps_per_call`` steps at once.

    ``own`` has a leading axis of that length (or is None), and so have the means. The state is donated.
    """

    def run(state: State, frozen: Flat, shared: Any, own: Any) -> tuple[State, dict[str, Array]]:
        def body(state: State, own: Any) -> tuple[State, dict[str, Array]]:
            return take_step(task, recipe, state, frozen, shared, own)

        if recipe.steps_per_call > 1:
            return jax.lax.scan(body, state, own, length=recipe.steps_per_call)
        state, means = body(state, jax.tree.map(lambda x: x[0], own))
        return state, jax.tree.map(lambda x: x[None], means)

    out = {} if mesh is None else {"out_shardings": (shardings(state, mesh), replicated(mesh))}
    return jax.jit(run, donate_argnums=0, **out)


def _spread(x: Array) -> Array:
    """Samples over the mesh's data axis."""
    return constrain(x, "B", *[None] * (x.ndim - 1))
