"""Paths and masks on codes, against their closed forms on small codebooks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import discrete
from opensora_jax.diffusion.objective import Network
from opensora_jax.diffusion.on_codes import Masked, Metric
from opensora_jax.diffusion.samplers import TIME_SCALE
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.models.fsq import FSQ
from opensora_jax.tasks.dit import Latents

TABLE = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
X_1 = 3
# Evenly spaced, so that shares are probabilities to one in so many.
UNIFORM = (np.arange(20_000) + 0.5) / 20_000
LEVELS = (4, 3, 2)


def exact(beta, table=TABLE, x_1=X_1):
    """softmax(-beta d(x, x_1)) over all x."""
    weights = np.exp(-beta * ((table - table[x_1]) ** 2).sum(axis=1, dtype=np.float64))
    return weights / weights.sum()


def full(value, dtype=np.float32):
    return jnp.full(UNIFORM.shape, value, dtype)


def shares(values, n):
    return np.bincount(np.asarray(values), minlength=n) / len(values)


def grid_latents(turned=False):
    counts = np.random.default_rng(1).uniform(1, 2, size=24)
    latents = Latents.normalized(np.asarray(FSQ(LEVELS).codebook()), counts, LEVELS)
    return latents.principal(counts, 3) if turned else latents


@pytest.mark.parametrize("beta", [0.0, 0.3, 5.0, 1e6])
def test_the_path_has_its_marginals(beta):
    x = discrete.on_path(TABLE, full(X_1, int), full(beta), UNIFORM)
    np.testing.assert_allclose(shares(x, 7), exact(beta), atol=2e-4)


def test_jumps_keep_the_marginals_to_first_order():
    def kernel(beta, increase):
        rows = [
            discrete.jump(TABLE, full(x, int), full(X_1, int), full(beta), full(increase), UNIFORM)
            for x in range(7)
        ]
        return np.stack([shares(row, 7) for row in rows])

    start, end, errors = 0.3, 0.9, []
    for n in (2, 4, 8):
        p = exact(start)
        for beta in np.linspace(start, end, n + 1)[:-1]:
            p = p @ kernel(beta, (end - start) / n)
        errors.append(np.abs(p - exact(end)).sum())
    assert errors[0] < 0.06
    for coarse, fine in itertools.pairwise(errors):
        assert 0.4 < fine / coarse < 0.6


def test_jumps_only_come_nearer():
    for x in range(7):
        to = discrete.jump(TABLE, full(x, int), full(X_1, int), full(0.5), full(9.0), UNIFORM)
        away = ((TABLE - TABLE[X_1]) ** 2).sum(axis=1)
        assert away[np.asarray(to)].max() <= away[x] + 1e-6


def test_of_a_grid_the_path_of_each_digit_is_the_path_of_the_code():
    latents = grid_latents()
    code, beta = 17, 0.8
    tables = latents.digits()
    of_digits = [
        exact(beta, table, digit)
        for table, digit in zip(tables, discrete.to_digits(np.array(code), LEVELS), strict=True)
    ]
    digits = discrete.to_digits(np.arange(24), LEVELS)
    product = np.prod([p[d] for p, d in zip(of_digits, digits, strict=True)], axis=0)
    np.testing.assert_allclose(product, exact(beta, latents.table, code), rtol=1e-5)


def test_digits_are_those_of_the_grid():
    codes = jnp.arange(24)
    digits = discrete.to_digits(codes, LEVELS)
    np.testing.assert_array_equal(discrete.from_digits(digits, LEVELS), codes)
    latents = grid_latents()
    found = [table[d, 0] for table, d in zip(latents.digits(), digits, strict=True)]
    np.testing.assert_allclose(np.stack(found, axis=1), latents.table, rtol=1e-5)
    with pytest.raises(ValueError, match=r"dit\.components=3: expected auto or 0"):
        grid_latents(turned=True).digits()
    assert len(Latents(TABLE).digits()) == 1


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [(1.0, 1.0, [0.5, 0.3, 0.2]), (1.0, 0.6, [0.625, 0.375, 0]), (1e-3, 1.0, [1, 0, 0])],
)
def test_codes_are_drawn_by_their_probabilities(temperature, top_p, expected):
    p = np.array([0.5, 0.3, 0.2], np.float32)
    logits = jnp.broadcast_to(jnp.log(p), (len(UNIFORM), 3))
    values, logs = discrete.draw(logits, UNIFORM, temperature, top_p)
    np.testing.assert_allclose(shares(values, 3), expected, atol=2e-4)
    np.testing.assert_allclose(np.exp(logs), p[np.asarray(values)], rtol=1e-5)


def test_the_least_sure_are_hidden():
    confidence = jnp.array([[3.0, 1.0, 2.0, 0.0], [5.0, 7.0, 6.0, 8.0]]).reshape(2, 1, 2, 2)
    is_hidden = jnp.array([[True, True, True, False], [True] * 4]).reshape(2, 1, 2, 2)
    left = discrete.hide_least(confidence, is_hidden, jnp.int32(2))
    assert left.reshape(2, 4).tolist() == [[False, True, True, False], [True, False, True, False]]
    assert not discrete.hide_least(confidence, is_hidden, jnp.int32(0)).any()
    np.testing.assert_allclose(discrete.share_hidden(jnp.array([0, 1 / 3, 1])), [0, 0.5, 1])


def test_many_codes_go_in_parts(monkeypatch):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, 2, 6, 4, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(5, 4096)), jnp.float32)
    target = jnp.asarray(rng.integers(4096, size=x.shape[:4]))

    def loss(kernel):
        def entropy(x, target):
            return discrete.cross_entropy(x @ kernel, target)

        return discrete.in_parts(entropy, 4096, x, target).mean()

    def compiled():
        return jax.jit(jax.value_and_grad(loss)).lower(kernel).compile()

    whole = compiled()
    monkeypatch.setattr(discrete, "_MOST_NUMBERS", 5 * 4096)  # so that 48 positions go in twelves
    parts = compiled()
    for a, b in zip(whole(kernel), parts(kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    sizes = [run.memory_analysis().temp_size_in_bytes for run in (whole, parts)]
    assert sizes[0] > 2 * 48 * 4096 * 4 > 3 * sizes[1]


# ---------------------------------------------------------------------------------- objectives


@pytest.fixture(params=[(Metric, "joint"), (Metric, "factorized"), (Masked, "factorized")])
def objective(request):
    kind, head = request.param
    return kind(code_head=head)


def knowing(latents, objective, x_1, sharpness=1e4):
    """The network that gives x_1 whatever it sees."""
    joint = objective.sizes(latents).n_codes
    if joint:
        out, to_logits = x_1[..., None], lambda x: sharpness * jax.nn.one_hot(x[..., 0], joint)
    else:
        digits = discrete.to_digits(x_1, latents.levels)
        out = jnp.concatenate(
            [sharpness * jax.nn.one_hot(d, n) for d, n in zip(digits, latents.levels, strict=True)],
            axis=-1,
        )
        to_logits = None
    return Network(lambda x, time_B: out, to_logits)


def test_samples_are_what_the_network_knows(objective):
    latents = grid_latents()
    x_1 = jax.random.randint(jax.random.key(0), (2, 2, 4, 4), 0, 24)
    noise = objective.noise(jax.random.key(1), x_1.shape, latents)

    def draw(i):
        return objective.noise(jax.random.fold_in(jax.random.key(2), i), x_1.shape, latents)

    for steps in (1, 5):
        found = objective.sample(
            knowing(latents, objective, x_1), latents, noise, Sampling(steps), draw
        )
        np.testing.assert_array_equal(found, x_1)
    with pytest.raises(ValueError, match="sampler='euler': expected auto or one of"):
        objective.sample(None, latents, noise, Sampling(2, sampler="euler"), draw)


def test_what_the_network_does_not_know_costs_its_entropy(objective):
    latents = grid_latents()
    x_1 = jax.random.randint(jax.random.key(0), (2, 2, 4, 4), 0, 24)
    noise = objective.noise(jax.random.key(1), x_1.shape, latents)
    level_B = jnp.array([1.0, 1.0])  # where nothing is seen
    flat = knowing(latents, objective, x_1, sharpness=0.0)
    np.testing.assert_allclose(
        objective.loss(flat, latents, x_1, noise, level_B), np.log(24), rtol=1e-5
    )
    sure = knowing(latents, objective, x_1)
    np.testing.assert_allclose(objective.loss(sure, latents, x_1, noise, level_B), 0, atol=1e-5)


@pytest.mark.parametrize("code_head", ["joint", "factorized"])
def test_what_is_seen_of_a_code_need_not_be_learned(code_head):
    """A network that knows nothing: by either head the loss is that of softmax(-beta d)."""
    latents, objective = grid_latents(), Metric(code_head=code_head)
    x_1 = jnp.full((1, 1, 50, 50), 17)
    noise = objective.noise(jax.random.key(1), x_1.shape, latents)
    level = jnp.array([0.5])
    flat = knowing(latents, objective, x_1, sharpness=0.0)
    loss = objective.loss(flat, latents, x_1, noise, level)
    beta = float(objective.beta(level)[0])
    # exact(beta, x_1=x)[17] is what a seen x says of 17.
    expected = -sum(
        p * np.log(exact(beta, latents.table, x)[17])
        for x, p in enumerate(exact(beta, latents.table, 17))
    )
    np.testing.assert_allclose(loss, expected, rtol=0.05)


def test_the_network_sees_the_codes_of_the_path():
    latents, seen = Latents(TABLE), {}
    x_1 = jnp.full((2, 1, 100, 100), X_1)

    def network(x, time_B):
        seen.update(x=x, time=time_B)
        return jnp.zeros((*x.shape[:4], 32))

    objective = Metric(beta_scale=2.0, beta_power=1.0)
    noise = objective.noise(jax.random.key(1), x_1.shape, latents)
    levels = jnp.array([0.5, 0.8])
    objective.loss(Network(network, lambda x: x[..., :7]), latents, x_1, noise, levels)
    np.testing.assert_allclose(seen["time"], levels * TIME_SCALE)
    for x, beta in zip(seen["x"], (2.0, 0.5), strict=True):
        found = shares(latents.to_codes(x).reshape(-1), 7)
        np.testing.assert_allclose(found, exact(beta), atol=0.02)


def test_of_masked_codes_alone_there_is_a_loss():
    latents = grid_latents()
    x_1 = jax.random.randint(jax.random.key(0), (1, 2, 4, 4), 0, 24)
    objective, seen = Masked(), {}

    def network(x, time_B):
        seen.update(x=x)
        return jnp.zeros((*x.shape[:4], 9)).at[..., 0].set(7.0 * (x[..., -1] == 0))

    noise = objective.noise(jax.random.key(1), x_1.shape, latents)
    loss = objective.loss(Network(network), latents, x_1, noise, jnp.array([1 / 3]))
    np.testing.assert_allclose(loss, np.log(24), rtol=1e-5)
    hidden = np.asarray(seen["x"][..., -1], bool)
    np.testing.assert_array_equal(hidden, noise[..., 0] < 0.5)
    codes = np.asarray(seen["x"][..., :-1])
    assert not codes[hidden].any()
    np.testing.assert_array_equal(codes[~hidden], latents.table[np.asarray(x_1)[~hidden]])


def test_a_grid_is_asked_for_by_the_factorized_head():
    with pytest.raises(ValueError, match=r"dit\.code_head=factorized: expected joint"):
        Metric(code_head="factorized").sizes(Latents(TABLE))
    assert Masked().sizes(Latents(TABLE)).n_codes == 7
    assert Masked().sizes(grid_latents()).n_codes is None


def test_masks_need_no_grid_that_is_not_turned():
    latents, objective = grid_latents(turned=True), Masked()
    x_1 = jax.random.randint(jax.random.key(0), (2, 2, 4, 4), 0, 24)
    noise = objective.noise(jax.random.key(1), x_1.shape, latents)
    flat = knowing(latents, objective, x_1, sharpness=0.0)
    loss = objective.loss(flat, latents, x_1, noise, jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(loss, np.log(24), rtol=1e-5)
