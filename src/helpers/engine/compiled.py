"""The machine code of ``loops``: gradients of small perceptrons by loops that fill vector registers.

All numbers of one replica lie in one array ``a``, where names such as ``at`` and ``delta`` are places. Numba compiles
these functions at their first use (some ten seconds), and keeps the result for other processes.
"""

from __future__ import annotations

import math

import numba
import numpy as np

_ZERO, _ONE, _EPS = np.float32(0), np.float32(1), np.float32(1e-8)
BLOCK = 64  # rows that are added at a time, so that they stay in the cache
# A layer of fewer inputs is stored by inputs, so that the loops run along its outputs; and from so many examples on
# they run along the examples, in a net of so few inputs.
NARROW, _ACROSS = 8, 24
PLAIN, MOMENTUM, ADAM, ADAMW = range(4)  # updates


def kept(function):
    """Compile a function, once for all processes where there is a folder to keep the result."""
    # Sums in any order, so that they fill vector registers; infinities and NaN stay what they are.
    options = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy", "nogil": True}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's own can be written: compiled anew in each process
        return numba.njit(**options)(function)


@kept
def _dots(a, m, rows, u, n, cols, v, by_n, by_row, alpha):
    """Add ``alpha`` times the products of each of ``n`` rows at ``u`` and each of ``rows`` at ``m``, three by three."""
    b = 0
    while b < n:
        b1, b2 = min(b + 1, n - 1), min(b + 2, n - 1)
        u0 = a[u + b * cols : u + (b + 1) * cols]
        u1 = a[u + b1 * cols : u + (b1 + 1) * cols]
        u2 = a[u + b2 * cols : u + (b2 + 1) * cols]
        for r in range(0, rows, 3):
            r1, r2 = min(r + 1, rows - 1), min(r + 2, rows - 1)
            k1, k2 = alpha if r1 > r else _ZERO, alpha if r2 > r1 else _ZERO
            m0 = a[m + r * cols : m + (r + 1) * cols]
            m1 = a[m + r1 * cols : m + (r1 + 1) * cols]
            m2 = a[m + r2 * cols : m + (r2 + 1) * cols]
            s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = _ZERO
            at = v + b * by_n
            if b1 == b:
                for c in range(cols):
                    s00 += u0[c] * m0[c]
                    s01 += u0[c] * m1[c]
                    s02 += u0[c] * m2[c]
                a[at + r * by_row] += alpha * s00
                a[at + r1 * by_row] += k1 * s01
                a[at + r2 * by_row] += k2 * s02
                continue
            for c in range(cols):
                p0, p1, p2, q0, q1, q2 = u0[c], u1[c], u2[c], m0[c], m1[c], m2[c]
                s00 += p0 * q0
                s01 += p0 * q1
                s02 += p0 * q2
                s10 += p1 * q0
                s11 += p1 * q1
                s12 += p1 * q2
                s20 += p2 * q0
                s21 += p2 * q1
                s22 += p2 * q2
            a[at + r * by_row] += alpha * s00
            a[at + r1 * by_row] += k1 * s01
            a[at + r2 * by_row] += k2 * s02
            at += by_n
            a[at + r * by_row] += alpha * s10
            a[at + r1 * by_row] += k1 * s11
            a[at + r2 * by_row] += k2 * s12
            if b2 > b1:
                at += by_n
                a[at + r * by_row] += alpha * s20
                a[at + r1 * by_row] += k1 * s21
                a[at + r2 * by_row] += k2 * s22
        b += 3


@kept
def _add(a, t, targets, s, sources, cols, k, by_target, by_source, alpha, active):
    """Add all source rows at ``s``, each times ``alpha`` and its coefficient at ``k``, to each target row at ``t``.

    Two by four; zero coefficients, of which ReLU makes many, cost nothing.
    """
    for first in range(0, sources, len(active)):
        last = min(first + len(active), sources)
        for i in range(0, targets, 2):
            i1 = min(i + 1, targets - 1)
            p, q = k + i * by_target, k + i1 * by_target
            t0, t1 = a[t + i * cols : t + (i + 1) * cols], a[t + i1 * cols : t + (i1 + 1) * cols]
            count = 0
            for j in range(first, last):
                if a[p + j * by_source] != 0 or a[q + j * by_source] != 0:
                    active[count] = j
                    count += 1
            for e in range(0, count, 4):
                j0, j1 = active[e], active[min(e + 1, count - 1)]
                j2, j3 = active[min(e + 2, count - 1)], active[min(e + 3, count - 1)]
                f1, f2, f3 = alpha if j1 > j0 else _ZERO, alpha if j2 > j1 else _ZERO, alpha if j3 > j2 else _ZERO
                k0, k1, k2, k3 = (
                    alpha * a[p + j0 * by_source],
                    f1 * a[p + j1 * by_source],
                    f2 * a[p + j2 * by_source],
                    f3 * a[p + j3 * by_source],
                )
                l0, l1, l2, l3 = (
                    alpha * a[q + j0 * by_source],
                    f1 * a[q + j1 * by_source],
                    f2 * a[q + j2 * by_source],
                    f3 * a[q + j3 * by_source],
                )
                s0, s1 = a[s + j0 * cols : s + (j0 + 1) * cols], a[s + j1 * cols : s + (j1 + 1) * cols]
                s2, s3 = a[s + j2 * cols : s + (j2 + 1) * cols], a[s + j3 * cols : s + (j3 + 1) * cols]
                if j1 == j0:
                    if k0 != 0:
                        for c in range(cols):
                            t0[c] += k0 * s0[c]
                    if l0 != 0 and i1 > i:
                        for c in range(cols):
                            t1[c] += l0 * s0[c]
                elif i1 == i:
                    for c in range(cols):
                        t0[c] += k0 * s0[c] + k1 * s1[c] + k2 * s2[c] + k3 * s3[c]
                else:
                    for c in range(cols):
                        p0, p1, p2, p3 = s0[c], s1[c], s2[c], s3[c]
                        t0[c] += k0 * p0 + k1 * p1 + k2 * p2 + k3 * p3
                        t1[c] += l0 * p0 + l1 * p1 + l2 * p2 + l3 * p3


@kept
def _loss_and_slope(a, z, n, classes, by_n, by_class, labels, squared):
    """The mean loss of the logits at ``z``, which its gradient by them overwrites."""
    total, share = 0.0, _ONE / np.float32(n)
    for b in range(n):
        p = z + b * by_n
        right = p + labels[b] * by_class
        if squared:
            a[right] -= _ONE
            for c in range(p, p + classes * by_class, by_class):
                total += a[c] * a[c] / 2
                a[c] *= share
            continue
        top = a[p]
        for c in range(p, p + classes * by_class, by_class):
            top = max(top, a[c])
        mass, own = _ZERO, a[right] - top
        for c in range(p, p + classes * by_class, by_class):
            a[c] = math.exp(a[c] - top)
            mass += a[c]
        total += math.log(mass) - own
        scale = share / mass
        for c in range(p, p + classes * by_class, by_class):
            a[c] *= scale
        a[right] -= share
    return total / n


@kept
def _forward(a, net, n, across, active):
    """From the inputs to the logits."""
    layers = net.shape[1] - 1
    for layer in range(layers):
        given, out, at, h, z = net[0, layer], net[0, layer + 1], net[1, layer], net[2, layer], net[2, layer + 1]
        bias, narrow = at + given * out, given < NARROW
        if across:
            for o in range(out):
                row = a[z + o * n : z + (o + 1) * n]
                for b in range(n):
                    row[b] = a[bias + o]
            by_out, by_given = (1, out) if narrow else (given, 1)
            _add(a, z, out, h, given, n, at, by_out, by_given, _ONE, active)
        else:
            for b in range(n):
                row, start = a[z + b * out : z + (b + 1) * out], a[bias : bias + out]
                for o in range(out):
                    row[o] = start[o]
            if narrow:
                _add(a, z, n, at, given, out, h, given, 1, _ONE, active)
            else:
                _dots(a, at, out, h, n, given, z, out, 1, _ONE)
        if layer < layers - 1:
            units = a[z : z + n * out]
            for k in range(n * out):
                units[k] = _ZERO if units[k] <= 0 else units[k]


@kept
def _backward(a, net, n, across, active):
    """From the loss's gradient by the logits to those by each hidden layer's outputs."""
    for layer in range(net.shape[1] - 2, 0, -1):
        given, out, at, h = net[0, layer], net[0, layer + 1], net[1, layer], net[2, layer]
        delta, below = net[3, layer + 1], net[3, layer]
        units, slopes = a[h : h + n * given], a[below : below + n * given]
        for k in range(n * given):
            slopes[k] = _ZERO
        if across:
            by_out, by_given = (1, out) if given < NARROW else (given, 1)
            _add(a, below, given, delta, out, n, at, by_given, by_out, _ONE, active)
        elif given < NARROW:
            _dots(a, at, given, delta, n, out, below, given, 1, _ONE)
        else:
            _add(a, below, n, at, out, given, delta, out, 1, _ONE, active)
        for k in range(n * given):
            slope = slopes[k]
            slopes[k] = _ZERO if units[k] <= 0 else slope


@kept
def _accumulate(a, into, net, n, across, alpha, active):
    """Add ``alpha`` times the mean loss's gradient by the parameters."""
    for layer in range(net.shape[1] - 1):
        given, out, h, delta = net[0, layer], net[0, layer + 1], net[2, layer], net[3, layer + 1]
        at = into + net[1, layer]
        if across:
            by_out, by_given = (1, out) if given < NARROW else (given, 1)
            _dots(a, h, given, delta, out, n, at, by_out, by_given, alpha)
        elif given < NARROW:
            _add(a, at, given, delta, n, out, h, 1, given, alpha, active)
        else:
            _add(a, at, out, h, n, given, delta, 1, out, alpha, active)
        bias = a[at + given * out : at + (given + 1) * out]
        if across:
            for o in range(out):
                total, row = _ZERO, a[delta + o * n : delta + (o + 1) * n]
                for b in range(n):
                    total += row[b]
                bias[o] += alpha * total
        else:
            for b in range(n):
                row = a[delta + b * out : delta + (b + 1) * out]
                for o in range(out):
                    bias[o] += alpha * row[o]


@kept
def _single(a, net, labels, squared, into, alpha):
    """All of a step on one example, of a net with narrow inputs and one hidden layer, without a call to the others.

    Where a step is so short, calling them takes longer than what they compute. Returns the loss.
    """
    given, units, classes, head = net[0, 0], net[0, 1], net[0, 2], net[1, 1]
    h, z, slope = a[net[2, 1] : net[2, 1] + units], net[2, 2], a[net[3, 1] : net[3, 1] + units]
    bias = a[given * units : head]
    for k in range(units):
        h[k] = bias[k]
    for i in range(given):
        row, x = a[i * units : (i + 1) * units], a[net[2, 0] + i]
        for k in range(units):
            h[k] += x * row[k]
    for k in range(units):
        h[k] = _ZERO if h[k] <= 0 else h[k]
        slope[k] = _ZERO
    for o in range(classes):
        row, total = a[head + o * units : head + (o + 1) * units], _ZERO
        for k in range(units):
            total += row[k] * h[k]
        a[z + o] = a[head + classes * units + o] + total
    loss = _loss_and_slope(a, z, 1, classes, classes, 1, labels, squared)
    for o in range(classes):
        row, own = a[head + o * units : head + (o + 1) * units], a[z + o]
        for k in range(units):
            slope[k] += own * row[k]
    for o in range(classes):
        at, step = into + head + o * units, alpha * a[z + o]
        row = a[at : at + units]
        for k in range(units):
            row[k] += step * h[k]
        a[into + head + classes * units + o] += step
    for k in range(units):
        own = slope[k]
        slope[k] = _ZERO if h[k] <= 0 else own
    for i in range(given):
        row, x = a[into + i * units : into + (i + 1) * units], alpha * a[net[2, 0] + i]
        for k in range(units):
            row[k] += x * slope[k]
    row = a[into + given * units : into + head]
    for k in range(units):
        row[k] += alpha * slope[k]
    return loss


@kept
def _adam(a, size, gradient, first, rate, betas, keep, t):
    """One step of Adam, as torch's; ``keep`` is the share of the weights that AdamW's decay leaves."""
    w, g = a[:size], a[gradient : gradient + size]
    m, v = a[first : first + size], a[first + size : first + 2 * size]
    beta, gamma = np.float32(betas[0]), np.float32(betas[1])
    pull, scale = np.float32(rate / (1 - betas[0] ** t)), np.float32(1 / math.sqrt(1 - betas[1] ** t))
    for k in range(size):
        m[k] += (_ONE - beta) * (g[k] - m[k])
        v[k] = gamma * v[k] + (_ONE - gamma) * g[k] * g[k]
        w[k] = keep * w[k] - pull * m[k] / (np.sqrt(v[k]) * scale + _EPS)


@kept
def descend(
    params,
    moments,
    gradient,
    net,
    x,
    y,
    order,
    sizes,
    rates,
    squared,
    rule,
    betas,
    decay,
    done,
    a,
    labels,
    active,
    losses,
):
    """Take all steps of every replica: ``params`` and ``moments`` move, ``gradient`` becomes the last step's.

    a: memory of one replica: its parameters, their gradient, their moments, then what ``net`` places.
    net: of each layer of units the width, where its weights lie among the parameters, and where its activations and
        their gradient lie in ``a``.
    """
    size, last = params.shape[1], net.shape[1] - 1
    dim, classes, single = net[0, 0], net[0, last], last == 2 and net[0, 0] < NARROW <= net[0, 1]
    kept = 2 * size  # the first moment; the last one collects a step's move
    into = kept + (moments.shape[1] - 1) * size
    for r in range(len(params)):
        start, w, collected, move, own = 0, a[:size], a[size:kept], a[into : into + size], params[r]
        for k in range(size):
            w[k] = own[k]
        for i in range(moments.shape[1]):
            moment, own = a[kept + i * size : kept + (i + 1) * size], moments[r, i]
            for k in range(size):
                moment[k] = own[k]
        for step in range(len(sizes)):
            n, rate = sizes[step], rates[step, r]
            across = dim < NARROW and n >= _ACROSS
            for b in range(n):
                example = order[r, start + b]
                labels[b], row = y[example], x[example]
                if across:
                    for i in range(dim):
                        a[net[2, 0] + i * n + b] = row[i]
                else:
                    copied = a[net[2, 0] + b * dim : net[2, 0] + (b + 1) * dim]
                    for i in range(dim):
                        copied[i] = row[i]
            start += n
            if rule != PLAIN:
                for k in range(size):
                    before = betas[0] * move[k] if rule == MOMENTUM else _ZERO
                    move[k] = before + decay * w[k] if rule != ADAMW else _ZERO
            target, alpha = (0, -rate) if rule == PLAIN else (into, _ONE)
            if single and n == 1:
                losses[step, r] = _single(a, net, labels, squared, target, alpha)
            else:
                _forward(a, net, n, across, active)
                by_n, by_class = (1, n) if across else (classes, 1)
                losses[step, r] = _loss_and_slope(a, net[2, last], n, classes, by_n, by_class, labels, squared)
                _backward(a, net, n, across, active)
                _accumulate(a, target, net, n, across, alpha, active)
            if step == len(sizes) - 1:
                for k in range(size):
                    collected[k] = _ZERO
                _accumulate(a, size, net, n, across, _ONE, active)
            if rule == MOMENTUM:
                for k in range(size):
                    w[k] -= rate * move[k]
            elif rule != PLAIN:
                keep = np.float32(1 - rate * decay) if rule == ADAMW else _ONE
                _adam(a, size, into, kept, rate, betas, keep, done + step + 1)
        own, its = params[r], gradient[r]
        for k in range(size):
            own[k], its[k] = w[k], collected[k]
        for i in range(moments.shape[1]):
            moment, own = a[kept + i * size : kept + (i + 1) * size], moments[r, i]
            for k in range(size):
                own[k] = moment[k]
